"""The search for a grid of each channel's own (see :mod:`maskaq_brevitas.quant.equalize`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskaq_brevitas.quant.grid import rounded
from maskaq_brevitas.quant.grid import row_importance

__all__ = ["ChannelGrids", "best_grids"]

#: Scales per channel: what is left of a channel's range about its median, and by how many steps its grid is moved.
_CLIPS = tuple(0.86**index for index in range(14))
_PHASES = (-0.25, 0.08, 0.41)
#: The range with the least error is then widened by this share, because other images reach further; and a hidden unit
#: gets at least this share of the median range (others: next to nothing, against division by zero). Mean output error
#: on crops of photographs (those shipped with scikit-image, gradio and others, five blocks of ViT-Tiny) of ranges from
#: synthetic images, for fc1 / qkv / fc2: at four bits 0.0109 / 0.0099 / 0.0343 with these, 0.0117 / 0.0103 / 0.0369
#: without the margin, 0.0123 / 0.0114 / 0.0374 with 0.3, fc2 0.0360 without the floor; at three bits 0.0346 / 0.0324 /
#: 0.0822, against 0.0533 / 0.0492 / 0.1215 with a range that is cut at fixed shares of values and widened by 0.25.
_MARGIN, _DEAD, _SILENT = 0.15, 1e-3, 0.75
_CACHED_VALUES = 2**16


@dataclass(frozen=True)
class ChannelGrids:
    """What :func:`best_grids` found.

    Attributes:
        shift, scale: of each channel's grid, ``(channels,)``.
        error, error_before: squared error of the layer's output, with them and with ranges about zero.
    """

    shift: Tensor
    scale: Tensor
    error: float
    error_before: float


def best_grids(rows: Tensor, weight: Tensor, bits: int, is_bounded: bool) -> ChannelGrids:
    """For each channel the shift and scale of a signed grid without zero point that has the least error.

    Args:
        rows: ``(rows, channels)``.
        weight: of the layer behind, ``(outputs, channels)``.
        bits: width.
        is_bounded: whether an activation function bounds the values below, so that only their upper end can be cut, or
            lie further out elsewhere.
    """
    top = 2 ** (bits - 1) - 1
    target = rows @ weight.T
    importance = row_importance(target)

    def output_error(shift: Tensor, scale: Tensor) -> float:
        output = (rounded(rows - shift, scale, bits) + shift) @ weight.T
        return float(((output - target).square() * importance).sum())

    low, high, middle = rows.amin(dim=0), rows.amax(dim=0), rows.median(dim=0).values
    before = output_error(torch.zeros_like(low), (rows.abs().amax(dim=0) / top).clamp_min(1e-12))
    lows, widths = [], []
    for share in _CLIPS:
        bottom = low if is_bounded else middle + (low - middle) * share
        width = middle + (high - middle) * share - bottom
        for phase in _PHASES:
            lows.append(bottom + phase * width / (2 * top + 1))
            widths.append(width)
    grids = [_grid(lower, lower + width, top) for lower, width in zip(lows, widths, strict=True)]
    best = _grid_errors(rows, importance, grids, bits).argmin(dim=0, keepdim=True)
    lowest, width = (torch.stack(found).gather(0, best)[0] for found in (lows, widths))
    # A channel that is silent on these images may speak on others.
    silent = _SILENT if is_bounded else _DEAD
    wider = torch.maximum((1 + _MARGIN) * width, silent * (1 + _MARGIN) * width.median())
    lowest = lowest if is_bounded else lowest - (wider - width) / 2
    shift, scale = _grid(lowest, lowest + wider, top)
    return ChannelGrids(shift, scale, output_error(shift, scale), before)


def _grid_errors(rows: Tensor, importance: Tensor, grids: list[tuple[Tensor, Tensor]], bits: int) -> Tensor:
    """Error of each channel on each grid, a shift and a scale per channel: ``(grids, channels)``."""
    errors = rows.new_zeros(len(grids), rows.shape[1])
    # Few rows at a time stay in the cache of a CPU from one grid to the next.
    count = len(rows) if rows.is_cuda else max(1, _CACHED_VALUES // rows.shape[1])
    for part, weight in zip(rows.split(count), importance[:, 0].split(count), strict=True):
        for index, (shift, scale) in enumerate(grids):
            moved = part - shift
            errors[index] += weight @ rounded(moved, scale, bits).sub_(moved).square_()
    return errors


def _grid(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Shift and scale of each channel, so that its lowest and highest code fall on ``low`` and ``high``."""
    scale = ((high - low) / (2 * top + 1)).clamp_min(1e-12)
    return high - top * scale, scale
