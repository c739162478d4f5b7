"""Signed grids without zero point: rounding to them, the best scale, and how much each token counts in an error."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_scale", "quantize_symmetric", "rounded", "rounded_through", "row_importance"]

_IMPORTANCE_EXPONENT = 0.75


def row_importance(target: Tensor) -> Tensor:
    """Weight of each row (token) in an error: power^-0.75, floored at the median power.

    A few tokens of a ViT carry activations a hundred times as large as the rest (ViT-Tiny, output of blocks.7.mlp). The
    next LayerNorm divides them away, but in a plain squared error (exponent 0) they outweigh all other tokens together,
    and with relative errors (exponent 1) they are sacrificed although later attention leans on them. The exponent
    was chosen among 0, 0.25, 0.5, 0.75 and 1 by agreement with the float model on crops of the photographs shipped with
    scikit-image, at w8a8, w6a6, w4a8 and w4a4.

    Args:
        target: ``(rows, channels)``.

    Returns:
        ``(rows, 1)``; ``(error.square() * importance).sum()`` is 1 if every row has the median power and an error as
        large as itself.
    """
    power = target.square().sum(dim=-1, keepdim=True)
    median = power.median().clamp_min(1e-12)
    return 1 / (
        len(target) * torch.maximum(power, median) ** _IMPORTANCE_EXPONENT * median ** (1 - _IMPORTANCE_EXPONENT)
    )


def best_scale(
    values: Tensor,
    bits: int,
    importance: Tensor | None = None,
    *,
    per_row: bool = False,
    candidates: int = 20,
) -> Tensor:
    """The scale of a signed grid without zero point that rounds ``values`` with the least squared error.

    Args:
        values: ``(rows, columns)``.
        bits: width.
        importance: weight of each value in the squared error, ``(rows, 1)`` or ``(1, columns)``; equal if None.
        per_row: one scale per row instead of one for all.
        candidates: scales tried, in even ratios from the largest absolute value down to a thirtieth of it (a third per
            row).

    Returns:
        ``()``, or ``(rows, 1)`` per row.
    """
    peak = values.abs().amax(dim=-1, keepdim=True) if per_row else values.abs().amax()
    largest = peak.clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    lowest = 0.3 if per_row else 0.03
    best, best_error = largest, None
    for index in range(candidates):
        scale = largest * lowest ** (index / (candidates - 1))
        error = rounded(values, scale, bits).sub_(values).square_()
        if importance is not None:
            error = error.mul_(importance)
        error = error.sum(dim=-1, keepdim=True) if per_row else error.sum()
        if best_error is None:
            best_error = error
        else:
            best = torch.where(error < best_error, scale, best)
            best_error = torch.minimum(error, best_error)
    return best


def quantize_symmetric(values: Tensor, bits: int, importance: Tensor | None = None, *, per_row: bool = False) -> Tensor:
    """``values`` rounded to the grid of :func:`best_scale`."""
    return rounded(values, best_scale(values, bits, importance, per_row=per_row), bits)


def rounded(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``values`` on the grid of that scale and width."""
    top = 2 ** (bits - 1) - 1
    return (values / scale).round_().clamp_(-top - 1, top).mul_(scale)


def rounded_through(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The same, with straight-through gradients to values and scale."""
    top = 2 ** (bits - 1) - 1
    steps = values / scale
    return (steps + (steps.round() - steps).detach()).clamp(-top - 1, top) * scale
