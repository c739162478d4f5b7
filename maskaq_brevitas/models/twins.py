"""timm's Twins: attention inside windows, and of all patches to a coarser grid of keys, in turn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from typing import cast

from timm.models.twins import Block
from timm.models.twins import GlobalSubSampleAttn
from timm.models.twins import LocallyGroupedAttn
from timm.models.twins import PatchEmbed
from timm.models.twins import Twins
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.family import ChannelPlace
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import attention_place
from maskaq_brevitas.models.family import has_affine
from maskaq_brevitas.models.family import mlp_places
from maskaq_brevitas.models.layout import AttentionLayout

__all__ = ["ExplicitGroupedAttention", "ExplicitSubsampledAttention", "TWINS"]


class ExplicitGroupedAttention(ExplicitAttention):
    """``LocallyGroupedAttn``, written out: ``(batch, tokens, dim)`` to the same, windows inside."""

    def __init__(self, source: LocallyGroupedAttn):
        super().__init__(source)
        self.scale = source.scale
        self.ws: int = source.ws
        self.qkv = source.qkv
        self.add_places(source.attn_drop)
        self.proj = source.proj
        self.proj_drop = source.proj_drop

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        (height, width), side, channels = size, self.ws, x.shape[-1]
        x = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % side, 0, -height % side))
        down, across = x.shape[1] // side, x.shape[2] // side
        # (batch, down, side, across, side, channels) -> (batch * windows, side * side, channels)
        x = x.reshape(-1, down, side, across, side, channels).transpose(2, 3).reshape(-1, side * side, channels)
        q, k, v = self.heads(self.qkv(x), 3).unbind(0)
        x = self.attend(q * self.scale, k, v)
        x = x.reshape(-1, down, across, side, side, channels).transpose(2, 3)
        x = x.reshape(-1, down * side, across * side, channels)[:, :height, :width].flatten(1, 2)
        return self.proj_drop(self.proj(x))


class ExplicitSubsampledAttention(ExplicitAttention):
    """``GlobalSubSampleAttn``, written out: ``(batch, tokens, dim)`` to the same, with fewer keys than tokens."""

    def __init__(self, source: GlobalSubSampleAttn):
        super().__init__(source)
        self.scale = source.scale
        self.q = source.q
        self.sr = source.sr
        self.norm = source.norm
        self.kv = source.kv
        self.add_places(source.attn_drop)
        self.proj = source.proj
        self.proj_drop = source.proj_drop

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        (q,) = self.heads(self.q(x))
        if self.sr is not None:
            x = self.norm(self.sr(x.transpose(1, 2).unflatten(2, tuple(size))).flatten(2).transpose(1, 2))
        k, v = self.heads(self.kv(x), 2).unbind(0)
        return self.proj_drop(self.proj(self.attend(q * self.scale, k, v)))


def _stages(model: Twins) -> list[tuple[tuple[int, int], list[Block]]]:
    """Grid and blocks of each stage."""
    embeddings, stages = cast(Iterable[PatchEmbed], model.patch_embeds), cast(Iterable[Iterable[Block]], model.blocks)
    return [((embed.H, embed.W), list(blocks)) for embed, blocks in zip(embeddings, stages, strict=True)]


def _layouts(model: Twins) -> tuple[AttentionLayout, ...]:
    layouts = []
    for grid, blocks in _stages(model):
        for block in blocks:
            attention: Any = block.attn
            side = getattr(attention, "ws", None)
            if side is not None:
                layouts.append(AttentionLayout(grid=grid, window=(side, side)))
            else:
                stride = 1 if attention.sr is None else attention.sr.stride[0]
                keys = grid[0] // stride, grid[1] // stride
                layouts.append(AttentionLayout(grid=keys, query_grid=None if keys == grid else grid))
    return tuple(layouts)


def _places(name: str, block: nn.Module) -> list[ChannelPlace]:
    attention: Any = block.attn
    places = mlp_places(name, block)
    if getattr(attention, "ws", None) is not None:
        # Windows that do not fit are padded behind the LayerNorm; the block does not know its grid.
        return places
    if attention.sr is None:
        return [*attention_place(name, block), *places]
    keys = [ChannelPlace(f"{name}.attn.norm", None, (f"{name}.attn.kv",))] if has_affine(attention.norm) else []
    return [*keys, *places]  # a convolution reads norm1


TWINS = Family(
    name="Twins",
    examples={
        "twins_svt_small": dict(
            img_size=32, embed_dims=(16, 32), depths=(2, 1), num_heads=(2, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1),
            wss=(4, 2), num_classes=10,
        )
    },  # fmt: skip
    models=(Twins,),
    attention={
        LocallyGroupedAttn: ExplicitGroupedAttention, GlobalSubSampleAttn: ExplicitSubsampledAttention
    },  # fmt: skip
    blocks=(Block,),
    places=_places,
    layouts=_layouts,
    grid=lambda model: _stages(model)[0][0],
    input_size=lambda model: model.patch_embeds[0].img_size,
    whole_grid="convolutions between its blocks need the whole grid",
    tail="convolutions between its blocks",
)
