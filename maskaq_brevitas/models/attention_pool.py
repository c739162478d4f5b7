"""timm's AttentionPoolLatent: learned queries that gather an image's tokens (SigLIP, SO-ViT, some EVA)."""

from __future__ import annotations

from timm.layers import AttentionPoolLatent
from torch import Tensor

from maskaq_brevitas.models.attention import ExplicitAttention

__all__ = ["ExplicitPool"]


class ExplicitPool(ExplicitAttention):
    """``AttentionPoolLatent``, written out: ``(batch, tokens, dim)`` to ``(batch, dim)``."""

    def __init__(self, source: AttentionPoolLatent):
        super().__init__(source)
        self.scale = source.scale
        self.pool: str = source.pool
        self.latent_len: int = source.latent_len
        self.latent = source.latent
        self.pos_embed = source.pos_embed
        self.q = source.q
        self.kv = source.kv
        self.q_norm = source.q_norm
        self.k_norm = source.k_norm
        self.add_places()
        self.proj = source.proj
        self.proj_drop = source.proj_drop
        self.norm = source.norm
        self.mlp = source.mlp

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        (q,) = self.heads(self.q(self.latent.expand(len(x), -1, -1)))
        k, v = self.heads(self.kv(x), 2).unbind(0)
        x = self.proj_drop(self.proj(self.attend(self.q_norm(q) * self.scale, self.k_norm(k), v, attn_mask)))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(dim=1) if self.pool == "avg" else x
