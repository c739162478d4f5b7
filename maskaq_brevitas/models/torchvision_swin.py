"""torchvision's Swin Transformer and Swin V2 (``swin_t``, ``swin_v2_t`` ...): windows are cut inside of attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional as F
from torchvision.models import SwinTransformer
from torchvision.models.swin_transformer import PatchMerging
from torchvision.models.swin_transformer import PatchMergingV2
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.models.swin_transformer import SwinTransformerBlockV2
from torchvision.ops.misc import MLP

from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.attention import joined_linear
from maskaq_brevitas.models.family import ChannelPlace
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import attention_place
from maskaq_brevitas.models.family import data_config
from maskaq_brevitas.models.family import has_affine
from maskaq_brevitas.models.layout import AttentionLayout
from maskaq_brevitas.models.swin import WINDOWS_NEED_ALL
from maskaq_brevitas.models.swin import FlatPatchMerging
from maskaq_brevitas.models.swin import table_bias
from maskaq_brevitas.models.swin import window_bias
from maskaq_brevitas.models.swin_v2 import FlatPatchMerging as FlatPatchMergingV2
from maskaq_brevitas.models.torchvision_vit import IdleMLP
from maskaq_brevitas.models.torchvision_vit import idle_mlp_places
from maskaq_brevitas.models.torchvision_vit import only_model
from maskaq_brevitas.models.windows import cut_windows
from maskaq_brevitas.models.windows import joined_windows
from maskaq_brevitas.models.windows import shift_mask
from maskaq_brevitas.models.windows import window_shift

__all__ = ["ExplicitShiftedAttention", "ExplicitShiftedAttentionV2", "TORCHVISION_SWIN"]


class ExplicitShiftedAttention(ExplicitAttention):
    """torchvision's ``ShiftedWindowAttention``, written out: ``(batch, rows, columns, dim)`` to the same."""

    relative_position_index: Tensor

    def __init__(self, source: Any):
        super().__init__(source)
        self.scale = (source.qkv.in_features // source.num_heads) ** -0.5
        self.window: tuple[int, int] = tuple(source.window_size)
        self.shift: tuple[int, int] = tuple(source.shift_size)
        self.add_position(source)
        self.qkv = source.qkv
        self.add_places(nn.Dropout(source.attention_dropout))
        self.proj = source.proj
        self.proj_drop = nn.Dropout(source.dropout)
        self.train(source.training)

    def add_position(self, source: Any) -> None:
        """Take over what gives the position bias: a table, looked up in every pass so that it can be trained."""
        self.relative_position_bias_table = source.relative_position_bias_table
        self.register_buffer("relative_position_index", source.relative_position_index, persistent=False)

    def position_bias(self) -> Tensor:
        """``(heads, tokens, tokens)``."""
        tokens = self.window[0] * self.window[1]
        return table_bias(self.relative_position_bias_table, self.relative_position_index, tokens)

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys whose product is the logits."""
        return q * self.scale, k

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[1], x.shape[2]
        shift = window_shift(grid, self.window, self.shift)
        mask = shift_mask(grid, self.window, shift, x) if any(shift) else None
        q, k, v = self.heads(self.qkv(cut_windows(x, self.window, shift)), 3).unbind(0)
        x = self.attend(*self.scaled(q, k), v, window_bias(self.position_bias(), mask))
        return joined_windows(self.proj_drop(self.proj(x)), grid, self.window, shift)


class ExplicitShiftedAttentionV2(ExplicitShiftedAttention):
    """torchvision's ``ShiftedWindowAttentionV2``, written out: cosine attention, and positions from a small network.

    That network reads coordinates alone; its output is computed once, and kept as a parameter.
    """

    def __init__(self, source: Any):
        super().__init__(source)
        if source.qkv.bias is not None:  # keys have none, whatever the parameter holds
            q, k, v = source.qkv.bias.chunk(3)
            self.qkv = joined_linear(source.qkv.weight, q, torch.zeros_like(k), v)

    def add_position(self, source: Any) -> None:
        self.logit_scale = source.logit_scale
        with torch.no_grad():
            bias = source.get_relative_position_bias()[0]
        self.relative_position_bias = nn.Parameter(bias, requires_grad=source.proj.weight.requires_grad)

    def position_bias(self) -> Tensor:
        return self.relative_position_bias

    @property
    def scale(self) -> Tensor:
        """Of each head, ``(heads, 1, 1)``."""
        return self.logit_scale.clamp(max=math.log(100.0)).exp()

    @scale.setter
    def scale(self, _value: float | Tensor) -> None:
        """The one of Swin is not used."""

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(q, dim=-1) * self.scale, F.normalize(k, dim=-1)


def _input_size(model: Any) -> tuple[int, int]:
    """Height and width by the model's ``pretrained_cfg``, else those that torchvision's weights were trained with."""
    v2 = isinstance(model.features[1][0], SwinTransformerBlockV2)
    return data_config(model, dict(input_size=(3, 256, 256) if v2 else (3, 224, 224)))["input_size"][1:]


def _stages(model: Any) -> list[tuple[int, tuple[int, int]]]:
    """Index in ``features`` of each stage, and the grid of its tokens."""
    embedding = model.features[0][0]
    rows, columns = (side // step for side, step in zip(_input_size(model), embedding.stride, strict=True))
    stages = []
    for index, part in enumerate(model.features[1:], start=1):
        if isinstance(part, nn.Sequential):
            stages.append((index, (rows, columns)))
        else:
            rows, columns = -(-rows // 2), -(-columns // 2)
    return stages


def _layouts(model: Any) -> tuple[AttentionLayout, ...]:
    layouts = []
    for index, grid in _stages(model):
        for block in model.features[index]:
            attention = block.attn
            explicit = isinstance(attention, ExplicitShiftedAttention)
            window = tuple(attention.window if explicit else attention.window_size)
            shift = window_shift(grid, window, tuple(attention.shift if explicit else attention.shift_size))
            layouts.append(AttentionLayout(grid=grid, window=window, shift=shift))
    return tuple(layouts)


def _passages(model: Any) -> dict[str, str]:
    """The first block of each stage but the first, and the patch merging in front of it."""
    return {f"features.{index}.0": f"features.{index - 1}" for index, _ in _stages(model)[1:]}


def _tell_grids(model: Any) -> None:
    """Let each block know its grid, ``(rows, columns)``."""
    if isinstance(model, SwinTransformer):
        for index, grid in _stages(model):
            for block in model.features[index]:
                block.grid = grid


def _places(name: str, module: Any) -> list[ChannelPlace]:
    if isinstance(module, SwinTransformerBlockV2):  # normalises behind attention and MLP
        return [place for place in idle_mlp_places(name, module, "norm2") if place.norm is None]
    if not isinstance(module, SwinTransformerBlock):
        return [ChannelPlace(f"{name}.norm", None, (f"{name}.reduction",))] if has_affine(module.norm) else []
    # Windows that do not fit are filled up with zeros behind the LayerNorm, and a shifted channel's zero is another.
    grid = getattr(module, "grid", None)
    fits = grid is not None and all(side % part == 0 for side, part in zip(grid, module.attn.window, strict=True))
    return [*(attention_place(name, module) if fits else []), *idle_mlp_places(name, module, "norm2")]


def _head(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda tokens: model.flatten(model.avgpool(model.permute(model.norm(tokens))))


def _create(name: str, **options: Any) -> nn.Module:
    size = options.pop("img_size")
    v2 = dict(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2) if "_v2_" in name else {}
    model = SwinTransformer(**options, **v2)
    model.pretrained_cfg = dict(input_size=(3, *size))  # no layer tells it
    return model


_SMALL = dict(
    img_size=(32, 32), patch_size=[4, 4], embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=[4, 4],
    num_classes=10
)  # fmt: skip

TORCHVISION_SWIN = Family(
    name="torchvision Swin, Swin V2",
    examples={"torchvision:swin_t": _SMALL, "torchvision:swin_v2_t": _SMALL},
    create=_create,
    models=(SwinTransformer,),
    attention={
        ShiftedWindowAttention: ExplicitShiftedAttention, ShiftedWindowAttentionV2: ExplicitShiftedAttentionV2
    },  # fmt: skip
    blocks=(SwinTransformerBlock, SwinTransformerBlockV2),
    places=_places,
    other_places=(PatchMerging, FlatPatchMerging),
    rewrites={PatchMerging: FlatPatchMerging, PatchMergingV2: FlatPatchMergingV2, MLP: IdleMLP},
    activated=lambda module: ("3",) if type(module) in (MLP, IdleMLP) else (),
    prepare=_tell_grids,
    layouts=only_model(SwinTransformer, _layouts),
    grid=only_model(SwinTransformer, lambda model: _stages(model)[0][1]),
    input_size=_input_size,
    passages=_passages,
    prefix=lambda model: 0,
    class_token=lambda model: False,
    classifier=lambda model: (model.head,),
    embedding="features.0.*",
    head=_head,
    whole_grid=WINDOWS_NEED_ALL,
)
