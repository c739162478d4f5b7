"""timm's Eva: EVA, EVA-02, DINOv3 and others with rotary position embedding."""

from __future__ import annotations

from timm.layers import AttentionPoolLatent
from timm.layers import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed
from timm.models.eva import Eva
from timm.models.eva import EvaAttention
from timm.models.eva import EvaBlock
from timm.models.eva import EvaBlockPostNorm
from torch import Tensor
from torch import cat
from torch import nn

from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.attention import additive_mask
from maskaq_brevitas.models.attention import joined_linear
from maskaq_brevitas.models.attention_pool import ExplicitPool
from maskaq_brevitas.models.family import ChannelPlace
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import block_places
from maskaq_brevitas.models.family import has_affine
from maskaq_brevitas.models.family import mlp_places
from maskaq_brevitas.models.vit import SMALL
from maskaq_brevitas.models.vit import plain_layouts

__all__ = ["EVA", "ExplicitRopeAttention"]


class ExplicitRopeAttention(ExplicitAttention):
    """``EvaAttention`` or ``AttentionRope``, written out: ``(batch, tokens, dim)`` to the same."""

    def __init__(self, source: EvaAttention | AttentionRope):
        super().__init__(source)
        self.scale = source.scale
        self.num_prefix_tokens: int = source.num_prefix_tokens
        self.rotate_half: bool = getattr(source, "rotate_half", False)
        self.groups: int = getattr(source, "num_kv_groups", 1)
        self.qkv = source.qkv
        if getattr(source, "q_bias", None) is not None:
            biases = source.get_parameter("q_bias"), source.get_buffer("k_bias"), source.get_parameter("v_bias")
            self.qkv = joined_linear(source.qkv.weight, *biases)
        self.q_proj, self.k_proj, self.v_proj = source.q_proj, source.k_proj, source.v_proj
        self.q_norm = source.q_norm
        self.k_norm = source.k_norm
        self.add_places(source.attn_drop)
        self.norm = source.norm
        self.gate = getattr(source, "gate", None)
        self.proj = source.proj
        self.proj_drop = source.proj_drop

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        bias = additive_mask(attn_mask, is_causal, x)
        if self.qkv is not None:
            q, k, v = self.heads(self.qkv(x), 3).unbind(0)
        else:
            batch, tokens, _ = x.shape
            q = self.q_proj(x).reshape(batch, tokens, self.num_heads, -1).transpose(1, 2)
            k, v = (
                layer(x).reshape(batch, tokens, self.num_heads // self.groups, -1).transpose(1, 2)
                for layer in (self.k_proj, self.v_proj)
            )
        q, k = self._rotated(self.q_norm(q), rope).type_as(v), self._rotated(self.k_norm(k), rope).type_as(v)
        if self.groups > 1:
            k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        x = self.norm(self.attend(q * self.scale, k, v, bias))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))

    def _rotated(self, x: Tensor, rope: Tensor | None) -> Tensor:
        """Patch tokens turned by their position, ``(batch, heads, tokens, head_dim)``; prefix tokens have none."""
        if rope is None:
            return x
        first, patches = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        # Not rope.chunk(2): qonnx folds the Split of a constant and keeps its first output only.
        size = rope.shape[-1] // 2
        return cat([first, apply_rot_embed(patches, rope[..., :size], rope[..., size:], half=self.rotate_half)], dim=2)


def _places(name: str, block: nn.Module) -> list[ChannelPlace]:
    if isinstance(block, (AttentionPoolLatent, ExplicitPool)):
        return mlp_places(name, block, norm="norm")
    if isinstance(block, EvaBlockPostNorm):
        places = mlp_places(name, block, norm=None)
    else:
        places = block_places(name, block)
    attention = block.attn
    if has_affine(attention.norm) and getattr(attention, "gate", None) is None:
        places.append(ChannelPlace(f"{name}.attn.norm", None, (f"{name}.attn.proj",)))
    return places


EVA = Family(
    name="EVA-02, DINOv3",
    examples={
        "eva02_tiny_patch14_224": SMALL,
        "vit_small_patch16_dinov3": dict(SMALL, num_classes=0),
    },
    models=(Eva,),
    attention={
        EvaAttention: ExplicitRopeAttention, AttentionRope: ExplicitRopeAttention, AttentionPoolLatent: ExplicitPool
    },  # fmt: skip
    blocks=(EvaBlock, EvaBlockPostNorm),
    places=_places,
    other_places=(AttentionPoolLatent, ExplicitPool),
    layouts=plain_layouts,
    whole_grid="its rotary position embedding is of the whole grid",
)
