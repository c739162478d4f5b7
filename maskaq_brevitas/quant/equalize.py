"""Brings the channels of LayerNorm outputs and MLP hidden units to one range, without changing the float function.

The channels of a ViT's LayerNorm outputs and GELU outputs differ in range by a factor of ten and more; one scale per
tensor then spends its codes on a few of them. Each channel c is replaced by ``(x_c - m_c) / r_c``. The inverse goes
into the next linear layer (``W[:, c] *= r_c``, ``bias += W m``), the change itself into the LayerNorm's affine part, or
into a :class:`~maskaq_brevitas.models.attention.ChannelAffine` where there is none (RepQ-ViT derives the LayerNorm
case). The graph keeps one scale per tensor and zero point 0.

Widening columns of W costs weight accuracy, so both are chosen together, per place: the least squared error of the
layer's output on the images given, with both operands quantized at the layer's own widths
(:mod:`~maskaq_brevitas.quant.channel_ratios`).

Where the quantizer has a scale per channel (``Scheme.input_scales``), there is no ratio to find: each channel is only
shifted, so that a signed grid without zero point covers its values, skewed ones too
(:mod:`~maskaq_brevitas.quant.channel_grids`).
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
from maskaq_brevitas.quant.channel_grids import best_grids
from maskaq_brevitas.quant.channel_ratios import best_ratios
from maskaq_brevitas.quant.observe import collect_rows

__all__ = ["EqualizedPlace", "equalize", "has_channel_scales"]

_ROWS = 1024
# Ranges per channel need more: at 1,024 rows there are five class tokens among them, and ViT-Tiny's activations at four
# bits cost 3.6 nats; at 8,192 rows 1.1 (crops of the photographs shipped with scikit-image).
_CHANNEL_ROWS = 8192


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
    for per_channel, change, count in ((True, _shift_place, _CHANNEL_ROWS), (False, _equalize_place, _ROWS)):
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


def _is_applicable(quant_model: nn.Module, place: ChannelPlace) -> bool:
    if not all(isinstance(quant_model.get_submodule(name), QuantLinear) for name in place.consumers):
        return False  # a layer kind without a quantized twin, which the swap has named
    return place.norm is not None or not isinstance(quant_model.get_submodule(place.slot or ""), nn.Identity)


def _equalize_place(quant_model: nn.Module, place: ChannelPlace, rows: Tensor) -> EqualizedPlace:
    layers = _consumers(quant_model, place)
    activation_bits, weight_bits = int(layers[0].input_quant.bit_width()), int(layers[0].weight_quant.bit_width())
    found = best_ratios(rows, _weight(layers), activation_bits, weight_bits)
    _apply(quant_model, place, layers, found.shift, found.ratio)
    return EqualizedPlace(
        _name(place), found.alpha, found.tails, found.outliers, found.refined, found.error, found.error_before
    )


def _shift_place(quant_model: nn.Module, place: ChannelPlace, rows: Tensor) -> EqualizedPlace:
    layers = _consumers(quant_model, place)
    is_bounded = place.norm is None and place.bounded
    found = best_grids(rows, _weight(layers), int(layers[0].input_quant.bit_width()), is_bounded)
    _apply(quant_model, place, layers, found.shift, torch.ones_like(found.shift))
    return EqualizedPlace(
        _name(place), 0.0, (0.0, 0.0), (), False, found.error, found.error_before,
        per_channel=True, consumers=place.consumers, scales=found.scale,
    )  # fmt: skip


def _consumers(quant_model: nn.Module, place: ChannelPlace) -> list[QuantLinear]:
    return [quant_model.get_submodule(name) for name in place.consumers]


def _weight(layers: list[QuantLinear]) -> Tensor:
    """The weights of all layers that read a place, one below the other."""
    return torch.cat([layer.weight for layer in layers]).float()


def _name(place: ChannelPlace) -> str:
    return place.norm or place.slot or ""


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
