"""Cuts a grid of tokens into shifted windows, and joins them again; for models that do so inside of attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cut_windows", "joined_windows", "shift_mask", "window_shift"]

Pair = tuple[int, int]


def window_shift(grid: Pair, window: Pair, shift: Pair) -> Pair:
    """The shift in rows and columns that is left: none along a side that one window covers."""
    rows, columns = (0 if part >= side else step for side, part, step in zip(grid, window, shift, strict=True))
    return rows, columns


def cut_windows(x: Tensor, window: Pair, shift: Pair) -> Tensor:
    """``(batch, rows, columns, channels)`` to ``(batch * windows, tokens, channels)``.

    Zeros fill up windows that do not fit; then the grid is rolled by ``shift`` up and to the left.
    """
    (height, width), channels = window, x.shape[-1]
    x = F.pad(x, (0, 0, 0, -x.shape[2] % width, 0, -x.shape[1] % height))
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))
    down, across = x.shape[1] // height, x.shape[2] // width
    # (batch, down, height, across, width, channels) -> (batch * down * across, height * width, channels)
    return x.reshape(-1, down, height, across, width, channels).transpose(2, 3).reshape(-1, height * width, channels)


def joined_windows(x: Tensor, grid: Pair, window: Pair, shift: Pair) -> Tensor:
    """The inverse of :func:`cut_windows`; ``grid`` is ``(rows, columns)`` without what fills up."""
    (height, width), channels = window, x.shape[-1]
    down, across = -(-grid[0] // height), -(-grid[1] // width)
    x = x.reshape(-1, down, across, height, width, channels).transpose(2, 3)
    x = x.reshape(-1, down * height, across * width, channels)
    if any(shift):
        x = torch.roll(x, shift, dims=(1, 2))
    return x[:, : grid[0], : grid[1]]


def shift_mask(grid: Pair, window: Pair, shift: Pair, like: Tensor) -> Tensor:
    """What keeps tokens apart that rolling brought into one window: ``(windows, tokens, tokens)``, 0 or -100.

    ``like`` gives dtype and device.
    """
    axes = []
    for side, part, step in zip(grid, window, shift, strict=True):
        place = torch.arange(-(-side // part) * part, device=like.device)
        # Three regions along a side: what did not move, and the two parts of the last window.
        axes.append((place >= len(place) - part).long() + (place >= len(place) - step) if step else 0 * place)
    regions = (3 * axes[0][:, None] + axes[1]).to(like.dtype)  # (rows, columns)
    regions = cut_windows(regions[None, :, :, None], window, (0, 0)).squeeze(-1)  # (windows, tokens)
    return (regions[:, None] != regions[:, :, None]).to(like.dtype) * -100.0
