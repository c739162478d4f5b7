"""Brings the channels of LayerNorm outputs and MLP hidden units to one range, without changing the float function.

The channels of a ViT's LayerNorm outputs and GELU outputs differ in range by a factor of ten and more; one scale per
tensor then spends its codes on a few of them. Each channel c is replaced by ``(x_c - m_c) / r_c``. The inverse goes
into the next linear layer (``W[:, c] *= r_c``, ``bias += W m``), the change itself into the LayerNorm's affine part, or
into a :class:`~maskaq_brevitas.models.attention.ChannelAffine` where there is none (RepQ-ViT derives the LayerNorm
case). The graph keeps one scale per tensor and zero point 0.

``r_c = range_c ** alpha``: alpha = 1 makes all ranges equal, alpha = 0 only centres them. Widening columns of W costs
weight accuracy, so alpha is searched per place: the least squared error of the layer's output on the images given, with
both operands quantized at the layer's own widths.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from brevitas.nn import QuantLinear
from torch import Tensor, nn
from torch.nn import functional as F

from maskaq_brevitas.models.families import ChannelPlace, channel_places
from maskaq_brevitas.quant.observe import collect_rows

__all__ = ["EqualizedPlace", "equalize", "quantize_symmetric", "row_importance"]

_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
_TAILS = (0.0, 1e-3)
_ROWS = 2048
_IMPORTANCE_EXPONENT = 0.75


@dataclass(frozen=True)
class EqualizedPlace:
    """What the search chose at one place.

    Attributes:
        name: of the LayerNorm or slot.
        alpha: exponent of the channel ranges; 0 means that channels are only centred.
        tail: share of values that a channel's range leaves out at each end.
        error, error_before: relative squared error of the next layer's output (mean over tokens), with and without.
    """

    name: str
    alpha: float
    tail: float
    error: float
    error_before: float


@torch.no_grad()
def equalize(quant_model: nn.Module, batches: Iterable[Tensor]) -> list[EqualizedPlace]:
    """Equalise every place of a quant model in place, on ``batches``; calibrate afterwards.

    The float function of the model is the same before and after (to rounding), so it can be repeated on new images.
    A place whose output error would not fall is left as it is.

    Args:
        quant_model: made by :func:`~maskaq_brevitas.quant.swap.swap_layers` with ``scheme.equalize``.
        batches: normalised images, ``(batch, channels, height, width)`` each.

    Raises:
        InputError: if there is no batch.
    """
    places = [place for place in channel_places(quant_model) if _is_applicable(quant_model, place)]
    rows = collect_rows(quant_model, [place.consumers[0] for place in places], batches, _ROWS)
    # A layer that the model bypasses has no rows; calibration names it.
    places = [place for place in places if place.consumers[0] in rows]
    return [_equalize_place(quant_model, place, rows[place.consumers[0]]) for place in places]


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
    return 1 / (len(target) * torch.maximum(power, median) ** _IMPORTANCE_EXPONENT * median ** (1 - _IMPORTANCE_EXPONENT))


def quantize_symmetric(
    values: Tensor, bits: int, importance: Tensor | None = None, *, per_row: bool = False, candidates: int = 20
) -> Tensor:
    """``values`` rounded to a signed grid without zero point, at the scale of least squared error.

    Args:
        values: ``(rows, columns)``.
        bits: width.
        importance: weight of each row in the error, ``(rows, 1)``; equal if None.
        per_row: one scale per row instead of one for all.
        candidates: scales tried, in even ratios from the largest absolute value down to a thirtieth of it.
    """
    top = 2 ** (bits - 1) - 1
    peak = values.abs().amax(dim=-1, keepdim=True) if per_row else values.abs().amax()
    peak = peak.clamp_min(1e-12)
    best, best_error = values, None
    lowest = 0.3 if per_row else 0.03
    for index in range(candidates):
        scale = peak * lowest ** (index / (candidates - 1)) / top
        rounded = (values / scale).round_().clamp_(-top - 1, top).mul_(scale)
        error = (rounded - values).square_()
        if importance is not None:
            error = error.mul_(importance)
        error = error.sum(dim=-1, keepdim=True) if per_row else error.sum()
        if best_error is None:
            best, best_error = rounded, error
        else:
            better = error < best_error
            best = torch.where(better, rounded, best)
            best_error = torch.where(better, error, best_error)
    return best


def _is_applicable(quant_model: nn.Module, place: ChannelPlace) -> bool:
    if not all(isinstance(quant_model.get_submodule(name), QuantLinear) for name in place.consumers):
        return False  # a layer kind without a quantized twin, which the swap has named
    return place.norm is not None or not isinstance(quant_model.get_submodule(place.slot or ""), nn.Identity)


def _equalize_place(quant_model: nn.Module, place: ChannelPlace, rows: Tensor) -> EqualizedPlace:
    layers = [quant_model.get_submodule(name) for name in place.consumers]
    weight = torch.cat([layer.weight for layer in layers]).float()
    weight_bits = int(layers[0].weight_quant.bit_width())
    activation_bits = int(layers[0].input_quant.bit_width())
    target = rows @ weight.T
    importance = row_importance(target)

    def error_of(shift: Tensor, ratio: Tensor) -> float:
        inputs = quantize_symmetric((rows - shift) / ratio, activation_bits, importance)
        output = inputs @ quantize_symmetric(weight * ratio, weight_bits, per_row=True).T + weight @ shift
        return float(((output - target).square() * importance).sum())

    zero, one = rows.new_zeros(rows.shape[1]), rows.new_ones(rows.shape[1])
    before = error_of(zero, one)
    best = (before, 0.0, 0.0, zero, one)
    for tail in _TAILS:
        low, high = _channel_range(rows, tail)
        shift = (low + high) / 2
        width = ((high - low) / 2).clamp_min(1e-6)
        # A dead channel must not be blown up: it gets the typical range.
        width = torch.where(width < 1e-4 * width.median(), width.median(), width)
        width = width / width.log().mean().exp()
        for alpha in _ALPHAS:
            error = error_of(shift, width**alpha)
            if error < best[0]:
                best = (error, alpha, tail, shift, width**alpha)
    error, alpha, tail, shift, ratio = best
    _apply(quant_model, place, layers, shift, ratio)
    return EqualizedPlace(place.norm or place.slot or "", alpha, tail, error, before)


def _channel_range(rows: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    if tail == 0:
        return rows.amin(dim=0), rows.amax(dim=0)
    count = max(1, int(tail * len(rows)))
    ordered = rows.sort(dim=0).values
    return ordered[count], ordered[-1 - count]


def _apply(quant_model: nn.Module, place: ChannelPlace, layers: list[nn.Module], shift: Tensor, ratio: Tensor) -> None:
    if place.norm is not None:
        norm = quant_model.get_submodule(place.norm)
        norm.bias.data = (norm.bias.data - shift) / ratio
        norm.weight.data = norm.weight.data / ratio
    else:
        affine = quant_model.get_submodule(place.slot or "")
        affine.offset = (affine.offset - shift) / ratio
        affine.multiplier = affine.multiplier / ratio
    for layer in layers:
        layer.bias.data = layer.bias.data + F.linear(shift, layer.weight.data)
        # Assigning a new Parameter makes Brevitas forget the weight scale of the old one.
        layer.weight = nn.Parameter(layer.weight.data * ratio, requires_grad=layer.weight.requires_grad)
