"""Hugging Face transformers' Swin (``SwinForImageClassification``, ``SwinModel``, ``SwinBackbone``): its encoder is
written out for one grid of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch import nn
from transformers.models.swin.modeling_swin import SwinAttention
from transformers.models.swin.modeling_swin import SwinBackbone
from transformers.models.swin.modeling_swin import SwinEncoder
from transformers.models.swin.modeling_swin import SwinEncoderOutput
from transformers.models.swin.modeling_swin import SwinForImageClassification
from transformers.models.swin.modeling_swin import SwinLayer
from transformers.models.swin.modeling_swin import SwinModel

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.family import ChannelPlace
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import has_affine
from maskaq_brevitas.models.family import mlp_places
from maskaq_brevitas.models.hf_common import ExplicitHFAttention
from maskaq_brevitas.models.hf_common import gives_maps
from maskaq_brevitas.models.hf_common import hf_places
from maskaq_brevitas.models.hf_common import hf_traits
from maskaq_brevitas.models.hf_common import timm_mlp
from maskaq_brevitas.models.hf_common import trunk_name
from maskaq_brevitas.models.layout import AttentionLayout
from maskaq_brevitas.models.swin import WINDOWS_NEED_ALL
from maskaq_brevitas.models.swin import merged_patches
from maskaq_brevitas.models.swin import table_bias
from maskaq_brevitas.models.swin import window_bias
from maskaq_brevitas.models.windows import cut_windows
from maskaq_brevitas.models.windows import joined_windows
from maskaq_brevitas.models.windows import shift_mask

__all__ = ["ExplicitHFWindowAttention", "FAMILY", "PlainSwinEncoder"]


class ExplicitHFWindowAttention(ExplicitHFAttention):
    """transformers' ``SwinAttention``, written out: ``(batch * windows, tokens, dim)`` to the same, and None.

    The bias is looked up in its table in every pass, so the table can be trained.
    """

    relative_position_index: Tensor

    def __init__(self, source: Any):
        super().__init__(source)
        table = source.relative_position_bias
        self.relative_position_bias_table = table.relative_position_bias_table
        self.register_buffer("relative_position_index", table.relative_position_index, persistent=False)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_ignored: Any
    ) -> tuple[Tensor, None]:
        return self.attended(hidden_states, window_bias(self.position_bias(), attention_mask)), None

    def position_bias(self) -> Tensor:
        """``(heads, tokens, tokens)``."""
        tokens = math.isqrt(len(self.relative_position_index))
        return table_bias(self.relative_position_bias_table, self.relative_position_index, tokens)


class PlainSwinLayer(nn.Module):
    """A block, ``(batch, tokens, channels)`` to the same, for tokens of one ``grid``, ``(rows, columns)``."""

    def __init__(self, source: Any, grid: tuple[int, int], whole_windows: bool):
        super().__init__()
        self.sizes = source.window_size, source.shift_size
        self.whole_windows = whole_windows
        self.lay_out(grid)
        self.fits = _fill(self.grid, self.window)
        self.layernorm_before = source.layernorm_before
        self.attention = ExplicitHFWindowAttention(source.attention)
        self.layernorm_after = source.layernorm_after
        self.mlp = timm_mlp(source.mlp)
        self.dropout = source.dropout
        self.drop_path = source.drop_path
        self.training = source.training

    def lay_out(self, grid: tuple[int, int]) -> None:
        """Take tokens of this grid from now on."""
        self.grid = grid
        self.window, self.shift = _window(self.sizes, grid, self.whole_windows)

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Refuse a grid whose windows are filled up with zeros, if channels were shifted on one that fills them:
        zeros behind the LayerNorm would stand for another value.
        """
        window, _ = _window(self.sizes, grid, self.whole_windows)
        if self.fits and not _fill(grid, window):
            raise ModelError(
                f"A grid of {grid[0]} x {grid[1]} patches does not fill windows of {window[0]} x {window[1]}, and that "
                "of the image_size for which the model was quantized does. Use images that do, or set image_size in "
                "its configuration before it is quantized."
            )

    def forward(self, x: Tensor) -> Tensor:
        windows = cut_windows(self.layernorm_before(x).unflatten(1, self.grid), self.window, self.shift)
        mask = shift_mask(self.grid, self.window, self.shift, x) if any(self.shift) else None
        attended = joined_windows(self.dropout(self.attention(windows, mask)[0]), self.grid, self.window, self.shift)
        x = x + self.drop_path(attended.flatten(1, 2))
        return x + self.dropout(self.mlp(self.layernorm_after(x)))


class PlainPatchMerging(nn.Module):
    """transformers' ``SwinPatchMerging`` for tokens of one grid."""

    def __init__(self, source: Any, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.norm = source.norm
        self.reduction = source.reduction
        self.training = source.training

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(merged_patches(x.unflatten(1, self.grid))[0]))


class PlainSwinStage(nn.Module):
    """Blocks, and the patch merging behind them."""

    def __init__(self, source: Any, grid: tuple[int, int], whole_windows: bool):
        super().__init__()
        self.grid = grid
        self.blocks = nn.ModuleList([PlainSwinLayer(block, grid, whole_windows) for block in source.blocks])
        self.downsample = None if source.downsample is None else PlainPatchMerging(source.downsample, grid)
        self.training = source.training

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens behind the blocks, ``(batch, tokens, channels)``, and behind the patch merging."""
        for block in self.blocks:
            x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


class PlainSwinEncoder(nn.Module):
    """transformers' ``SwinEncoder`` for the image size of its configuration, blocks taking and giving tokens alone.

    It computes as a ``SwinBackbone`` wants it, with windows of full size on small grids, if the encoder that it is made
    from has been told so (``whole_windows``); else as the other models do.
    """

    def __init__(self, source: Any):
        super().__init__()
        self.whole_windows = bool(getattr(source, "whole_windows", False))
        stages = zip(source.layers, _grids(source), strict=True)
        self.layers = nn.ModuleList([PlainSwinStage(stage, grid, self.whole_windows) for stage, grid in stages])
        self.training = source.training

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        output_hidden_states: bool = False,
        output_hidden_states_before_downsampling: bool = False,
        **_ignored: Any,
    ) -> SwinEncoderOutput:
        if always_partition != self.whole_windows:
            raise ModelError(
                "This Swin encoder was quantized apart from what it is part of, which cuts windows in another way. "
                "Quantize the whole SwinBackbone (backbone='backbone', not 'backbone.swin')."
            )
        stages: Any = self.layers
        if tuple(input_dimensions) != stages[0].grid:
            self._lay_out((int(input_dimensions[0]), int(input_dimensions[1])))
        maps = [_as_map(hidden_states, stages[0].grid)]
        for stage in stages:
            inner, hidden_states = stage(hidden_states)
            if output_hidden_states_before_downsampling or stage.downsample is None:
                maps.append(_as_map(inner, stage.grid))
            else:
                maps.append(_as_map(hidden_states, _halved(stage.grid)))
        return SwinEncoderOutput(
            last_hidden_state=hidden_states, reshaped_hidden_states=tuple(maps) if output_hidden_states else None
        )


    def _lay_out(self, grid: tuple[int, int]) -> None:
        """Take images of another size."""
        layers: Any = self.layers
        laid_out = list(zip(layers, _halvings(grid, len(layers)), strict=True))
        for stage, own in laid_out:  # before any is changed
            for block in stage.blocks:
                block.check_grid(own)
        for stage, own in laid_out:
            stage.grid = own
            for block in stage.blocks:
                block.lay_out(own)
            if stage.downsample is not None:
                stage.downsample.grid = own


def _fill(grid: tuple[int, int], window: tuple[int, int]) -> bool:
    """Whether windows of that size fill a grid."""
    return all(side % part == 0 for side, part in zip(grid, window, strict=True))


def _as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(batch, tokens, channels)`` to ``(batch, channels, rows, columns)``."""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def _halved(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid behind patch merging."""
    return -(-grid[0] // 2), -(-grid[1] // 2)


def _halvings(grid: tuple[int, int], stages: int) -> list[tuple[int, int]]:
    """The grid of each stage."""
    grids = [grid]
    for _ in range(stages - 1):
        grids.append(_halved(grids[-1]))
    return grids


def _window(
    sizes: tuple[int, int], grid: tuple[int, int], whole: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sides of windows, and their shift, from the ``sizes`` of both: a window that is as large as the grid is not
    shifted, nor larger than that, unless windows are ``whole``.
    """
    side, shift = sizes
    if min(grid) <= side and not whole:
        side, shift = min(grid), 0
    return (side, side), (shift, shift)


def _grids(encoder: Any) -> list[tuple[int, int]]:
    """Of each stage; the first block knows that of the image."""
    first = encoder.layers[0].blocks[0]
    grid = first.grid if isinstance(first, PlainSwinLayer) else first.input_resolution
    return _halvings(grid, len(encoder.layers))


def _tell_encoder(model: Any) -> None:
    model.base_model.encoder.whole_windows = isinstance(model, SwinBackbone)


def _layouts(model: Any) -> tuple[AttentionLayout, ...]:
    encoder, layouts = model.base_model.encoder, []
    for grid, stage in zip(_grids(encoder), encoder.layers, strict=True):
        for block in stage.blocks:
            if isinstance(block, PlainSwinLayer):
                window, shift = block.window, block.shift
            else:
                window, shift = _window((block.window_size, block.shift_size), grid, isinstance(model, SwinBackbone))
            layouts.append(AttentionLayout(grid=grid, window=window, shift=shift))
    return tuple(layouts)


def _passages(model: Any) -> dict[str, str]:
    """The first block of each stage but the first, and the patch merging in front of it."""
    name = f"{trunk_name(model)}encoder.layers"
    return {
        f"{name}.{index}.blocks.0": f"{name}.{index - 1}.downsample"
        for index in range(1, len(model.base_model.encoder.layers))
    }


def _places(name: str, module: Any) -> list[ChannelPlace]:
    if isinstance(module, PlainPatchMerging):
        return [ChannelPlace(f"{name}.norm", None, (f"{name}.reduction",))] if has_affine(module.norm) else []
    # Windows that do not fit are filled up with zeros behind the LayerNorm, and a shifted channel's zero is another.
    fits = isinstance(module, PlainSwinLayer) and module.fits
    both = hf_places("layernorm_before", "layernorm_after")
    return both(name, module) if fits else mlp_places(name, module, "layernorm_after")


def _head(model: Any) -> Callable[[Tensor], Tensor] | None:
    return None if gives_maps(model) else lambda tokens: model.base_model.layernorm(tokens).mean(dim=1)


_SMALL = dict(
    image_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2), num_labels=10
)  # fmt: skip

FAMILY = Family(
    name="transformers Swin",
    examples={
        "transformers:SwinForImageClassification": _SMALL,
        "transformers:SwinModel": _SMALL,
        "transformers:SwinBackbone": dict(_SMALL, out_indices=[1, 2]),
    },
    attention={SwinAttention: ExplicitHFWindowAttention},
    blocks=(SwinLayer, PlainSwinLayer),
    places=_places,
    other_places=(PlainPatchMerging,),
    rewrites={SwinEncoder: PlainSwinEncoder},
    prepare=_tell_encoder,
    layouts=_layouts,
    passages=_passages,
    head=_head,
    whole_grid=WINDOWS_NEED_ALL,
    **hf_traits(SwinForImageClassification, without_classes=(SwinModel, SwinBackbone), prefix=0),
)
