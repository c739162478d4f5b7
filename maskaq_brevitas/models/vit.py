"""timm's VisionTransformer: ViT, DeiT, DeiT III, DINOv2, augreg, SigLIP, SO-ViT ..."""

from __future__ import annotations

from timm.layers import AttentionPoolLatent
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import ParallelThingsBlock
from timm.models.vision_transformer import ResPostBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch import nn

from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.attention import additive_mask
from maskaq_brevitas.models.attention_pool import ExplicitPool
from maskaq_brevitas.models.family import ChannelPlace
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import block_places
from maskaq_brevitas.models.family import mlp_places
from maskaq_brevitas.models.layout import AttentionLayout

__all__ = ["SMALL", "VIT", "ExplicitViTAttention", "plain_layouts"]


class ExplicitViTAttention(ExplicitAttention):
    """timm's ``Attention``, written out: ``(batch, tokens, dim)`` to the same."""

    def __init__(self, source: Attention):
        super().__init__(source)
        self.head_dim: int = source.head_dim
        self.scale = source.scale
        self.qkv = source.qkv
        self.q_norm = source.q_norm
        self.k_norm = source.k_norm
        self.add_places(source.attn_drop)
        # Both came to timm during 1.0.x.
        self.norm = getattr(source, "norm", None) or nn.Identity()
        self.gate = getattr(source, "gate", None)
        self.proj = source.proj
        self.proj_drop = source.proj_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = self.heads(self.qkv(x), 3).unbind(0)
        bias = additive_mask(attn_mask, is_causal, x)
        x = self.norm(self.attend(self.q_norm(q) * self.scale, self.k_norm(k), v, bias))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


def plain_layouts(model: VisionTransformer | Eva) -> tuple[AttentionLayout, ...]:
    """Every block sees the whole image; empty (nothing to say) unless the model pools by attention in the end."""
    pool = getattr(model, "attn_pool", None)
    if not isinstance(pool, (AttentionPoolLatent, ExplicitPool)):
        return ()
    grid, prefix = tuple(model.patch_embed.grid_size), model.num_prefix_tokens
    blocks = sum(isinstance(module, (Attention, ExplicitAttention)) for module in model.blocks.modules())
    seen = prefix if getattr(model, "pool_include_prefix", True) else 0
    has_class = getattr(model, "cls_token", None) is not None
    return (
        *[AttentionLayout(grid=grid, prefix=prefix, class_token=has_class)] * blocks,
        AttentionLayout(grid=grid, prefix=seen, pooling=pool.latent_len),
    )


def _places(name: str, block: nn.Module) -> list[ChannelPlace]:
    if isinstance(block, (AttentionPoolLatent, ExplicitPool)):
        return mlp_places(name, block, norm="norm")
    if isinstance(block, ResPostBlock):  # normalises behind attention and MLP
        return mlp_places(name, block, norm=None)
    return [] if isinstance(block, ParallelThingsBlock) else block_places(name, block)


#: A small model, for the examples of families that take these arguments.
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=10)

VIT = Family(
    name="ViT, DeiT, DINOv2, SigLIP",
    examples={
        "vit_base_patch32_384": dict(SMALL, img_size=64, patch_size=32, depth=2),
        "deit_tiny_distilled_patch16_224": SMALL,
        "deit3_small_patch16_224": SMALL,
        "vit_small_patch14_reg4_dinov2": dict(SMALL, num_classes=0),
        "vit_so150m_patch16_reg4_map_256": SMALL,
    },
    models=(VisionTransformer,),
    attention={Attention: ExplicitViTAttention, AttentionPoolLatent: ExplicitPool},
    blocks=(Block, ResPostBlock, ParallelThingsBlock),
    places=_places,
    other_places=(AttentionPoolLatent, ExplicitPool),
    layouts=plain_layouts,
)
