"""The search for shifts and ratios that bring channels to one range (see :mod:`maskaq_brevitas.quant.equalize`).

A grid comes first: ``r_c = range_c ** alpha`` (alpha = 1 makes all ranges equal, alpha = 0 only shifts them), ranges
cut at either end (a GELU output has its tail on one side only). Then gradient descent refines every m_c and r_c through
straight-through rounding (learnable equivalent transformation, OmniQuant).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskaq_brevitas.quant.grid import best_scale
from maskaq_brevitas.quant.grid import quantize_symmetric
from maskaq_brevitas.quant.grid import rounded_through
from maskaq_brevitas.quant.grid import row_importance

__all__ = ["ChannelRatios", "best_ratios"]

_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Shares of values that a channel's range leaves out at its lower and upper end.
_TAILS = ((0.0, 0.0), (1e-3, 1e-3), (1e-3, 0.01), (1e-3, 0.05))
_OUTLIERS, _OUTLIER_PEAK, _OUTLIER_FACTORS = 3, 10.0, (4.0, 16.0, 64.0, 256.0)
_REFINE_STEPS = 100
_REFINE_ROWS = 512
_REFINE_RATE = 0.02


@dataclass(frozen=True)
class ChannelRatios:
    """What :func:`best_ratios` found.

    Attributes:
        shift, ratio: m_c and r_c, ``(channels,)``.
        alpha, tails, outliers, refined: how, see :class:`~maskaq_brevitas.quant.equalize.EqualizedPlace`.
        error, error_before: squared error of the layer's output, with them and with the channels as they are.
    """

    shift: Tensor
    ratio: Tensor
    alpha: float
    tails: tuple[float, float]
    outliers: tuple[int, ...]
    refined: bool
    error: float
    error_before: float


def best_ratios(rows: Tensor, weight: Tensor, activation_bits: int, weight_bits: int) -> ChannelRatios:
    """Shifts and ratios with the least error of ``rows @ weight.T``, both quantized, one scale for all of ``rows``.

    Args:
        rows: ``(rows, channels)``.
        weight: ``(outputs, channels)``; has a scale per row.
        activation_bits, weight_bits: widths.
    """
    target = rows @ weight.T
    importance = row_importance(target)

    def error_of(shift: Tensor, ratio: Tensor) -> float:
        inputs = quantize_symmetric((rows - shift) / ratio, activation_bits, importance)
        # A column counts by the power of its channel, else one column that was widened takes its whole row.
        power = (inputs.square() * importance).mean(dim=0, keepdim=True)
        wide = quantize_symmetric(weight * ratio, weight_bits, power + 1e-3 * power.mean(), per_row=True)
        output = inputs @ wide.T + weight @ shift
        return float(((output - target).square() * importance).sum())

    zero, one = rows.new_zeros(rows.shape[1]), rows.new_ones(rows.shape[1])
    before = error_of(zero, one)
    best = (before, 0.0, (0.0, 0.0), zero, one)
    for tails in _TAILS:
        low, high = _channel_range(rows, *tails)
        shift = (low + high) / 2
        width = ((high - low) / 2).clamp_min(1e-6)
        # A dead channel must not be blown up: it gets the typical range.
        width = torch.where(width < 1e-4 * width.median(), width.median(), width)
        width = width / width.log().mean().exp()
        for alpha in _ALPHAS:
            error = error_of(shift, width**alpha)
            if error < best[0]:
                best = (error, alpha, tails, shift, width**alpha)
    error, alpha, tails, shift, ratio = best
    outliers = []
    for channel in _outlier_channels((rows - shift) / ratio):
        trials = []
        for factor in _OUTLIER_FACTORS:
            widened = ratio.clone()
            widened[channel] *= factor
            trials.append((error_of(shift, widened), widened))
        least, widened = min(trials, key=lambda trial: trial[0])
        if least < error:
            error, ratio = least, widened
            outliers.append(int(channel))
    refined = _refine(rows, target, importance, weight, (activation_bits, weight_bits), shift, ratio)
    refined_error = error_of(*refined)
    is_refined = refined_error < error
    if is_refined:
        error, (shift, ratio) = refined_error, refined
    return ChannelRatios(shift, ratio, alpha, tails, tuple(outliers), is_refined, error, before)


def _outlier_channels(rows: Tensor) -> list[int]:
    """The few channels whose largest value is far beyond what is usual in the tensor, largest first."""
    peaks = rows.abs().amax(dim=0)
    largest = peaks.topk(min(_OUTLIERS, len(peaks)))
    return [int(channel) for peak, channel in zip(*largest, strict=True) if peak > _OUTLIER_PEAK * peaks.median()]


@torch.enable_grad()
def _refine(
    rows: Tensor,
    target: Tensor,
    importance: Tensor,
    weight: Tensor,
    bits: tuple[int, int],
    shift: Tensor,
    ratio: Tensor,
) -> tuple[Tensor, Tensor]:
    """Shifts and ratios after gradient descent on the error of the layer's output, ``(channels,)`` each."""
    activation_bits, weight_bits = bits
    generator = torch.Generator().manual_seed(0)
    shift, log_ratio = shift.clone().requires_grad_(), ratio.log().requires_grad_()
    with torch.no_grad():
        first = best_scale((rows - shift) / ratio, activation_bits, importance).log()
    log_scale = first.requires_grad_()
    spread = max(float(rows.std(dim=0).median()), 1e-6)
    optimizer = torch.optim.Adam([
        dict(params=[log_ratio, log_scale], lr=_REFINE_RATE),
        dict(params=[shift], lr=_REFINE_RATE * spread),
    ])  # fmt: skip
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, _REFINE_STEPS)
    clip = weight.new_ones(len(weight), 1)
    for step in range(_REFINE_STEPS):
        pick = torch.randint(len(rows), (min(_REFINE_ROWS, len(rows)),), generator=generator).to(rows.device)
        ratio = log_ratio.exp()
        wide = weight * ratio
        peak = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
        if step % 10 == 0:  # where to clip a row changes slowly
            with torch.no_grad():
                power = ((rows - shift) / ratio).square().mul(importance).mean(dim=0, keepdim=True)
                power += 1e-3 * power.mean()
                clip = best_scale(wide, weight_bits, power, per_row=True, candidates=10) / peak
        inputs = rounded_through((rows[pick] - shift) / ratio, log_scale.exp(), activation_bits)
        output = inputs @ rounded_through(wide, peak * clip, weight_bits).T + weight @ shift
        loss = ((output - target[pick]).square() * importance[pick]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return shift.detach(), log_ratio.detach().exp()


def _channel_range(rows: Tensor, below: float, above: float) -> tuple[Tensor, Tensor]:
    """Lower and upper end of each channel, without these shares of its values."""
    ordered = rows.sort(dim=0).values
    low, high = (min(len(rows) - 1, -(-share * len(rows) // 1)) for share in (below, above))
    return ordered[int(low)], ordered[-1 - int(high)]
