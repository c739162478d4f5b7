"""Brings the channels of LayerNorm outputs and MLP hidden units to one range, without changing the float function.

The channels of a ViT's LayerNorm outputs and GELU outputs differ in range by a factor of ten and more; one scale per
tensor then spends its codes on a few of them. Each channel c is replaced by ``(x_c - m_c) / r_c``. The inverse goes
into the next linear layer (``W[:, c] *= r_c``, ``bias += W m``), the change itself into the LayerNorm's affine part, or
into a :class:`~maskaq_brevitas.models.attention.ChannelAffine` where there is none (RepQ-ViT derives the LayerNorm
case). The graph keeps one scale per tensor and zero point 0.

Widening columns of W costs weight accuracy, so both are chosen together, per place: the least squared error of the
layer's output on the images given, with both operands quantized at the layer's own widths. A grid comes first:
``r_c = range_c ** alpha`` (alpha = 1 makes all ranges equal, alpha = 0 only shifts them), ranges cut at either end (a
GELU output has its tail on one side only). Then gradient descent refines every m_c and r_c through straight-through
rounding (learnable equivalent transformation, OmniQuant).

Where the quantizer has a scale per channel (``Scheme.input_scales``), there is no ratio to find: each channel is only
shifted, so that a signed grid without zero point covers its values, skewed ones too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field
from typing import cast

import torch
from brevitas.nn import QuantLinear
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas.models.attention import ChannelAffine
from maskaq_brevitas.models.families import ChannelPlace
from maskaq_brevitas.models.families import channel_places
from maskaq_brevitas.quant.observe import collect_rows

__all__ = ["EqualizedPlace", "best_scale", "equalize", "has_channel_scales", "quantize_symmetric", "row_importance"]

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
_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Shares of values that a channel's range leaves out at its lower and upper end.
_TAILS = ((0.0, 0.0), (1e-3, 1e-3), (1e-3, 0.01), (1e-3, 0.05))
_ROWS = 1024
# Ranges per channel need more: at 1,024 rows there are five class tokens among them, and ViT-Tiny's activations at four
# bits cost 3.6 nats; at 8,192 rows 1.1 (crops of the photographs shipped with scikit-image).
_CHANNEL_ROWS = 8192
_CACHED_VALUES = 2**16
_OUTLIERS, _OUTLIER_PEAK, _OUTLIER_FACTORS = 3, 10.0, (4.0, 16.0, 64.0, 256.0)
_REFINE_STEPS = 100
_REFINE_ROWS = 512
_REFINE_RATE = 0.02
_IMPORTANCE_EXPONENT = 0.75


@dataclass(frozen=True)
class EqualizedPlace:
    """What the search chose at one place.

    Attributes:
        name: of the LayerNorm or slot.
        alpha: exponent of the channel ranges; 0 means that channels are only shifted.
        per_channel: whether the quantizer has a scale per channel; then channels are shifted, each with its own tails,
            and alpha, tails, outliers and refined stay empty.
        consumers, scales: with ``per_channel``, the linear layers and the scale of each of their input channels,
            ``(channels,)``, that belongs to the shift.
        tails: shares of values that a channel's range leaves out at its lower and upper end.
        outliers: channels that got a ratio of their own, because they carry values of another order of magnitude
            (ViT-Tiny has one: hidden unit 417 of blocks.7.mlp reaches 214 in four tokens per image, the others 2).
        refined: whether gradient descent found better shifts and ratios than these.
        error, error_before: relative squared error of the next layer's output (mean over tokens), with and without.
    """

    name: str
    alpha: float
    tails: tuple[float, float]
    outliers: tuple[int, ...]
    refined: bool
    error: float
    error_before: float
    per_channel: bool = False
    consumers: tuple[str, ...] = ()
    scales: Tensor | None = field(default=None, repr=False, compare=False)


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
    batches, found = list(batches), {}
    for per_channel, change, count in ((True, _centre_place, _CHANNEL_ROWS), (False, _equalize_place, _ROWS)):
        chosen = {
            place.consumers[0]: place
            for place in places
            if has_channel_scales(quant_model.get_submodule(place.consumers[0]).input_quant) == per_channel
        }
        # A layer that the model bypasses has no rows; calibration names it.
        rows = collect_rows(quant_model, chosen, batches, count) if chosen or not places else {}
        found.update({name: change(quant_model, chosen[name], rows[name]) for name in chosen if name in rows})
    return [found[place.consumers[0]] for place in places if place.consumers[0] in found]


def has_channel_scales(proxy: ActQuantProxyFromInjectorBase) -> bool:
    """Whether an activation quantizer has one scale per channel of the last axis."""
    scale = proxy.scale() if proxy.is_quant_enabled else None
    return scale is not None and scale.numel() > 1


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
        error = _rounded(values, scale, bits).sub_(values).square_()
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
    return _rounded(values, best_scale(values, bits, importance, per_row=per_row), bits)


def _rounded(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    return (values / scale).round_().clamp_(-top - 1, top).mul_(scale)


def _rounded_through(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The same, with straight-through gradients to values and scale."""
    top = 2 ** (bits - 1) - 1
    steps = values / scale
    return (steps + (steps.round() - steps).detach()).clamp(-top - 1, top) * scale


def _is_applicable(quant_model: nn.Module, place: ChannelPlace) -> bool:
    if not all(isinstance(quant_model.get_submodule(name), QuantLinear) for name in place.consumers):
        return False  # a layer kind without a quantized twin, which the swap has named
    return place.norm is not None or not isinstance(quant_model.get_submodule(place.slot or ""), nn.Identity)


def _equalize_place(quant_model: nn.Module, place: ChannelPlace, rows: Tensor) -> EqualizedPlace:
    layers: list[QuantLinear] = [quant_model.get_submodule(name) for name in place.consumers]
    weight = torch.cat([layer.weight for layer in layers]).float()
    weight_bits = int(layers[0].weight_quant.bit_width())
    activation_bits = int(layers[0].input_quant.bit_width())
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
    _apply(quant_model, place, layers, shift, ratio)
    return EqualizedPlace(place.norm or place.slot or "", alpha, tails, tuple(outliers), is_refined, error, before)


def _centre_place(quant_model: nn.Module, place: ChannelPlace, rows: Tensor) -> EqualizedPlace:
    """Shift each channel so that the least error of its own signed grid becomes smallest."""
    layers: list[QuantLinear] = [quant_model.get_submodule(name) for name in place.consumers]
    weight = torch.cat([layer.weight for layer in layers]).float()
    bits = int(layers[0].input_quant.bit_width())
    top = 2 ** (bits - 1) - 1
    target = rows @ weight.T
    importance = row_importance(target)

    def output_error(shift: Tensor, scale: Tensor) -> float:
        output = (_rounded(rows - shift, scale, bits) + shift) @ weight.T
        return float(((output - target).square() * importance).sum())

    low, high, middle = rows.amin(dim=0), rows.amax(dim=0), rows.median(dim=0).values
    before = output_error(torch.zeros_like(low), (rows.abs().amax(dim=0) / top).clamp_min(1e-12))
    # An activation function bounds its output below, so only its upper end can be cut, or lie further out elsewhere.
    is_bounded = place.norm is None and place.bounded
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
    error = output_error(shift, scale)
    _apply(quant_model, place, layers, shift, torch.ones_like(shift))
    name = place.norm or place.slot or ""
    return EqualizedPlace(
        name, 0.0, (0.0, 0.0), (), False, error, before, per_channel=True, consumers=place.consumers, scales=scale
    )


def _grid_errors(rows: Tensor, importance: Tensor, grids: list[tuple[Tensor, Tensor]], bits: int) -> Tensor:
    """Error of each channel on each grid, a shift and a scale per channel: ``(grids, channels)``."""
    errors = rows.new_zeros(len(grids), rows.shape[1])
    # Few rows at a time stay in the cache of a CPU from one grid to the next.
    count = len(rows) if rows.is_cuda else max(1, _CACHED_VALUES // rows.shape[1])
    for part, weight in zip(rows.split(count), importance[:, 0].split(count), strict=True):
        for index, (shift, scale) in enumerate(grids):
            moved = part - shift
            errors[index] += weight @ _rounded(moved, scale, bits).sub_(moved).square_()
    return errors


def _grid(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Shift and scale of each channel, so that its lowest and highest code fall on ``low`` and ``high``."""
    scale = ((high - low) / (2 * top + 1)).clamp_min(1e-12)
    return high - top * scale, scale


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
        inputs = _rounded_through((rows[pick] - shift) / ratio, log_scale.exp(), activation_bits)
        output = inputs @ _rounded_through(wide, peak * clip, weight_bits).T + weight @ shift
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


def _apply(
    quant_model: nn.Module, place: ChannelPlace, layers: list[QuantLinear], shift: Tensor, ratio: Tensor
) -> None:
    if place.norm is not None:
        norm = cast(nn.LayerNorm, quant_model.get_submodule(place.norm))
        norm.bias.data = (norm.bias.data - shift) / ratio
        norm.weight.data = norm.weight.data / ratio
    else:
        affine = cast(ChannelAffine, quant_model.get_submodule(place.slot or ""))
        affine.offset = (affine.offset - shift) / ratio
        affine.multiplier = affine.multiplier / ratio
    for layer in layers:
        layer.bias.data = layer.bias.data + F.linear(shift, layer.weight.data)
        # Assigning a new Parameter makes Brevitas forget the weight scale of the old one.
        layer.weight = nn.Parameter(layer.weight.data * ratio, requires_grad=layer.weight.requires_grad)
