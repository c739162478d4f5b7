"""timm's PVT v2: attention of all patches to a coarser grid of keys, convolutions in the MLP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from timm.models.pvt_v2 import Attention
from timm.models.pvt_v2 import Block
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from timm.models.pvt_v2 import PyramidVisionTransformerStage
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor

from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.family import ChannelPlace
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import attention_place
from maskaq_brevitas.models.family import configured_input_size
from maskaq_brevitas.models.family import has_affine
from maskaq_brevitas.models.layout import AttentionLayout

__all__ = ["PVT", "ExplicitPvtAttention"]


class ExplicitPvtAttention(ExplicitAttention):
    """PVT v2's ``Attention``, written out: ``(batch, tokens, dim)`` to the same, with fewer keys than tokens."""

    def __init__(self, source: Attention):
        super().__init__(source)
        self.scale = source.scale
        self.q = source.q
        self.pool = source.pool
        self.sr = source.sr
        self.norm = source.norm
        self.act = source.act
        self.kv = source.kv
        self.add_places(source.attn_drop)
        self.proj = source.proj
        self.proj_drop = source.proj_drop

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        (q,) = self.heads(self.q(x))
        if self.sr is not None:
            x = x.transpose(1, 2).unflatten(2, tuple(feat_size))
            x = self.sr(x if self.pool is None else self.pool(x))
            x = self.norm(x.flatten(2).transpose(1, 2))
            x = x if self.act is None else self.act(x)
        k, v = self.heads(self.kv(x), 2).unbind(0)
        return self.proj_drop(self.proj(self.attend(q * self.scale, k, v)))


def _grids(model: PyramidVisionTransformerV2) -> list[tuple[int, int]]:
    """Of each stage: the first embedding strides by four, the others by two, both padded to cover the border."""
    stride, grids = model.patch_embed.proj.stride, []
    rows, columns = (-(-side // step) for side, step in zip(configured_input_size(model), stride, strict=True))
    for index, _ in enumerate(model.stages):
        if index:
            rows, columns = -(-rows // 2), -(-columns // 2)
        grids.append((rows, columns))
    return grids


def _layouts(model: PyramidVisionTransformerV2) -> tuple[AttentionLayout, ...]:
    layouts = []
    stages = cast(Iterable[PyramidVisionTransformerStage], model.stages)
    for grid, stage in zip(_grids(model), stages, strict=True):
        for block in cast(Iterable[Block], stage.blocks):
            keys, attention = grid, block.attn
            if attention.pool is not None:
                keys = (cast(int, attention.pool.output_size),) * 2
            elif attention.sr is not None:
                keys = grid[0] // attention.sr.stride[0], grid[1] // attention.sr.stride[1]
            layouts.append(AttentionLayout(grid=keys, query_grid=None if keys == grid else grid))
    return tuple(layouts)


def _places(name: str, block: Block) -> list[ChannelPlace]:
    places = []
    if block.attn.sr is None:  # else a convolution reads norm1, too
        places += attention_place(name, block)
    elif block.attn.pool is None and has_affine(block.attn.norm):
        places.append(ChannelPlace(f"{name}.attn.norm", None, (f"{name}.attn.kv",)))
    if has_affine(block.norm2):
        places.append(ChannelPlace(f"{name}.norm2", None, (f"{name}.mlp.fc1",)))
    return places


PVT = Family(
    name="PVT v2",
    examples={
        "pvt_v2_b0": dict(
            embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1), num_classes=10,
            pretrained_cfg_overlay=dict(input_size=(3, 32, 32)),
        )
    },  # fmt: skip
    models=(PyramidVisionTransformerV2,),
    attention={Attention: ExplicitPvtAttention},
    blocks=(Block,),
    places=_places,
    activated=lambda module: ("fc2",) if isinstance(module, MlpWithDepthwiseConv) else (),
    layouts=_layouts,
    grid=lambda model: _grids(model)[0],
    input_size=configured_input_size,
    whole_grid="the convolutions in its blocks need the whole grid",
    tail="convolutions between its blocks",
)
