"""timm's TinyViT: convolutions first, then attention inside windows with a position bias, and a convolution behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from timm.models.tiny_vit import Attention
from timm.models.tiny_vit import MBConv
from timm.models.tiny_vit import NormMlp
from timm.models.tiny_vit import PatchEmbed
from timm.models.tiny_vit import PatchMerging
from timm.models.tiny_vit import TinyVit
from timm.models.tiny_vit import TinyVitBlock
from timm.models.tiny_vit import TinyVitStage
from torch import Tensor
from torch import nn

from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.family import ChannelPlace
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import configured_input_size
from maskaq_brevitas.models.family import has_affine
from maskaq_brevitas.models.layout import AttentionLayout

__all__ = ["TINY_VIT", "ExplicitTinyAttention"]


class ExplicitTinyAttention(ExplicitAttention):
    """TinyViT's ``Attention``, written out: ``(batch * windows, tokens, dim)`` to the same."""

    attention_bias_idxs: Tensor

    def __init__(self, source: Attention):
        super().__init__(source)
        self.scale = source.scale
        self.sizes: list[int] = [source.key_dim, source.key_dim, source.val_dim]
        self.attention_biases = source.attention_biases
        self.register_buffer("attention_bias_idxs", source.get_buffer("attention_bias_idxs"), persistent=False)
        self.norm = source.norm
        self.qkv = source.qkv
        self.add_places()
        self.proj = source.proj

    def forward(self, x: Tensor) -> Tensor:
        # (batch, tokens, heads * (q, k, v)) -> 3 x (batch, heads, tokens, size)
        qkv = self.qkv(self.norm(x)).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = qkv.split(self.sizes, dim=-1)
        return self.proj(self.attend(q * self.scale, k, v, self.attention_biases[:, self.attention_bias_idxs]))


def _grids(model: TinyVit) -> list[tuple[int, int]]:
    """Of each stage; every convolution with a stride halves the grid."""
    rows, columns = (-(-side // 4) for side in configured_input_size(model))
    grids = [(rows, columns)]
    for _ in range(len(model.stages) - 1):
        rows, columns = -(-rows // 2), -(-columns // 2)
        grids.append((rows, columns))
    return grids


def _layouts(model: TinyVit) -> tuple[AttentionLayout, ...]:
    stages = cast(Iterable[TinyVitStage], model.stages)
    return tuple(
        AttentionLayout(grid=grid, window=(block.window_size, block.window_size))
        for grid, stage in zip(_grids(model), stages, strict=True)
        for block in stage.blocks
        if isinstance(block, TinyVitBlock)
    )


def _places(name: str, block: nn.Module) -> list[ChannelPlace]:
    readers = (("attn", "qkv"), ("mlp", "fc1"))
    return [
        ChannelPlace(f"{name}.{part}.norm", None, (f"{name}.{part}.{layer}",))
        for part, layer in readers
        if has_affine(getattr(block, part).norm)
    ]


def _activated(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, NormMlp):
        return ("fc2",)
    if isinstance(module, PatchEmbed):
        return ("conv2.conv",)
    return ("conv2.conv", "conv3.conv") if isinstance(module, (MBConv, PatchMerging)) else ()


TINY_VIT = Family(
    name="TinyViT",
    examples={
        "tiny_vit_5m_224": dict(
            embed_dims=(16, 32, 32), depths=(1, 1, 1), num_heads=(1, 2, 2), window_sizes=(4, 2, 2), num_classes=10,
            pretrained_cfg_overlay=dict(input_size=(3, 32, 32)),
        )
    },  # fmt: skip
    models=(TinyVit,),
    attention={Attention: ExplicitTinyAttention},
    blocks=(TinyVitBlock,),
    places=_places,
    activated=_activated,
    layouts=_layouts,
    grid=lambda model: _grids(model)[min(1, len(model.stages) - 1)],
    input_size=configured_input_size,
    whole_grid="its windows and convolutions need the whole grid",
    tail="convolutions between its stages",
)
