"""What a quantized model costs and how exact each of its quantizers is: bits, scales, SQNR, bytes, MACs, BOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch
from brevitas.nn import QuantIdentity
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from brevitas.quant_tensor import QuantTensor
from torch import Tensor
from torch import nn

from maskaq_brevitas.quant.attention import OPERANDS

__all__ = ["Cost", "PlaceFigures", "QuantizerFigures", "measure_cost", "measure_places", "sqnr"]

_FLOAT_BITS = 32
#: Buffers of quantized layers that only calibration and tuning read: no deployed file has them.
_TUNING_BUFFERS = ("input_mean", "bias_correction")


@dataclass(frozen=True, kw_only=True)
class QuantizerFigures:
    """One quantizer.

    Attributes:
        bits: width.
        scale: smallest and largest scale (equal with one scale per tensor).
        zero_point: integer that stands for 0.0; 0 for symmetric quantizers.
        sqnr: signal-to-quantization-noise ratio in dB, see :func:`sqnr`; ``None`` if nothing was measured.
    """

    bits: int
    scale: tuple[float, float]
    zero_point: int
    sqnr: float | None


@dataclass(frozen=True, kw_only=True)
class PlaceFigures:
    """One quantized layer, or one operand of an attention matmul.

    Attributes:
        name: of the module.
        kind: type of the layer (``Linear``, ``Conv2d``), or ``operand``.
        weight: its weight quantizer; ``None`` for operands.
        activation: the quantizer at its input; ``None`` if that is switched off.
        macs: multiply-accumulates for one image. The first operand of each matmul (query, probabilities) carries those
            of the matmul, the second (key, value) 0.
        bops: bit operations for one image: MACs x width of one factor x width of the other.
        arriving_bits: width of the layer's input where an earlier quantizer of the model quantized it, as in models
            that Brevitas' FX flows quantize; ``None`` where the layer has its own quantizer, or nothing quantized it.
    """

    name: str
    kind: str
    weight: QuantizerFigures | None
    activation: QuantizerFigures | None
    macs: int
    bops: int
    arriving_bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Size and work of the quant model next to its float model.

    Attributes:
        parameters: of the float model.
        bytes_float32: these parameters in float32.
        bytes_quantized: quantized weights at their bits (packed layer by layer), scales and zero points of all
            quantizers, and what stays float (biases, norms, embeddings, skipped layers) in float32.
        macs: multiply-accumulates for one image, attention matmuls included.
        macs_quantized: those of them with both factors quantized.
        bops, bops_float32: bit operations for one image; what is not quantized counts 32 x 32.
    """

    parameters: int
    bytes_float32: int
    bytes_quantized: int
    macs: int
    macs_quantized: int
    bops: int
    bops_float32: int


def sqnr(signal_power: float, error_power: float) -> float:
    """Signal-to-quantization-noise ratio ``10 log10(sum x^2 / sum (Q(x) - x)^2)`` in dB; infinite without error.

    >>> sqnr(100.0, 1.0)
    20.0
    """
    if error_power == 0:
        return math.inf
    return 10 * math.log10(signal_power / error_power) if signal_power > 0 else -math.inf


@torch.no_grad()
def measure_places(quant_model: nn.Module, batches: Iterable[Tensor], macs: dict[str, int]) -> list[PlaceFigures]:
    """Figures of every quantized place, in the model's order.

    The SQNR of a weight is that of the weight tensor. The SQNR of an activation is that of the tensor that reaches the
    quantizer inside the quantized model, over all of ``batches``.

    Args:
        quant_model: calibrated, with Brevitas quantizers, in evaluation mode.
        batches: normalised images, ``(batch, channels, height, width)`` each; none leaves activations unmeasured.
        macs: from :func:`~maskaq_brevitas.quant.cost.multiply_accumulates`.
    """
    proxies = {}
    for name, module in quant_model.named_modules():
        if isinstance(module, QuantWeightBiasInputOutputLayer):
            proxies[name] = module.input_quant
        elif isinstance(module, QuantIdentity):
            proxies[name] = module.act_quant
    powers, arriving = _activation_powers(quant_model, proxies, batches)
    found: dict[str, PlaceFigures] = {}
    for name, proxy in proxies.items():
        module = quant_model.get_submodule(name)
        weight = _weight_figures(module) if isinstance(module, QuantWeightBiasInputOutputLayer) else None
        activation = _activation_figures(proxy, powers.get(name)) if proxy.is_quant_enabled else None
        kind = "operand" if weight is None and isinstance(module, QuantIdentity) else _plain_type(module)
        found[name] = PlaceFigures(
            name=name, kind=kind, weight=weight, activation=activation, macs=macs.get(name, 0), bops=0,
            arriving_bits=arriving.get(name),
        )  # fmt: skip
    return [replace(place, bops=place.macs * math.prod(_factor_bits(place, found))) for place in found.values()]


def measure_cost(
    float_model: nn.Module, quant_model: nn.Module, places: list[PlaceFigures], macs: dict[str, int]
) -> Cost:
    """Totals, see :class:`Cost`."""
    by_name = {place.name: place for place in places}
    quantized = sum(place.macs for place in places if _FLOAT_BITS not in _factor_bits(place, by_name))
    placed = sum(place.macs for place in places)
    bops = sum(place.bops for place in places) + (macs[""] - placed) * _FLOAT_BITS**2
    parameters = sum(parameter.numel() for parameter in float_model.parameters())
    return Cost(
        parameters=parameters,
        bytes_float32=4 * parameters,
        bytes_quantized=_quantized_bytes(quant_model, by_name),
        macs=macs[""],
        macs_quantized=quantized,
        bops=bops,
        bops_float32=macs[""] * _FLOAT_BITS**2,
    )


def _activation_powers(
    quant_model: nn.Module, proxies: dict[str, QuantProxyFromInjector], batches: Iterable[Tensor]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Sums of ``x^2`` and ``(Q(x) - x)^2`` at every proxy; the width of what reaches the others quantized already."""
    powers: dict[str, list[float]] = {}
    arriving: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            x = _plain(inputs[0]).double()
            sums = powers.setdefault(name, [0.0, 0.0])
            sums[0] += float(x.square().sum())
            sums[1] += float((_plain(output).double() - x).square().sum())

        return hook

    def note_width(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(inputs[0], QuantTensor):
                arriving[name] = int(inputs[0].bit_width)

        return hook

    handles = []
    try:
        for name, proxy in proxies.items():
            if proxy.is_quant_enabled:
                handles.append(proxy.register_forward_hook(note(name)))
            else:
                handles.append(quant_model.get_submodule(name).register_forward_pre_hook(note_width(name)))
        for images in batches:
            quant_model(images)
    finally:
        for handle in handles:
            handle.remove()
    return powers, arriving


def _plain(value: Any) -> Tensor:
    """The tensor in what a Brevitas proxy takes or gives: a tensor, a QuantTensor, or a tuple that starts with one."""
    while not isinstance(value, Tensor) or hasattr(value, "_fields"):
        value = value.value if hasattr(value, "value") else value[0]
    return value


def _activation_figures(proxy: QuantProxyFromInjector, power: list[float] | None) -> QuantizerFigures:
    scale, zero_point = proxy.scale(), proxy.zero_point()
    return QuantizerFigures(
        bits=int(proxy.bit_width()),
        scale=(float(scale.min()), float(scale.max())),
        zero_point=round(float(zero_point.flatten()[0])),
        sqnr=None if power is None else sqnr(*power),
    )


def _weight_figures(layer: QuantWeightBiasInputOutputLayer) -> QuantizerFigures | None:
    if not layer.weight_quant.is_quant_enabled:
        return None
    quantized = layer.quant_weight()
    weight = layer.weight.double()
    error = _plain(quantized).double() - weight
    zero_point = quantized.zero_point.flatten()
    return QuantizerFigures(
        bits=int(quantized.bit_width),
        scale=(float(quantized.scale.min()), float(quantized.scale.max())),
        zero_point=round(float(zero_point[0])),
        sqnr=sqnr(float(weight.square().sum()), float(error.square().sum())),
    )


def _plain_type(layer: nn.Module) -> str:
    return "Linear" if isinstance(layer, nn.Linear) else type(layer).__name__.removeprefix("Quant")


def _factor_bits(place: PlaceFigures, by_name: dict[str, PlaceFigures]) -> tuple[int, int]:
    """Widths of the two factors of a place's MACs; 32 for one that is not quantized."""
    attention, _, operand = place.name.rpartition(".")
    if place.kind == "operand" and operand in OPERANDS:
        partner = {"query": "key", "key": "query", "probabilities": "value", "value": "probabilities"}[operand]
        other = by_name.get(f"{attention}.{partner}")
        return _bits(place.activation), _bits(other.activation if other is not None else None)
    return _bits(place.weight), place.arriving_bits or _bits(place.activation)


def _bits(figures: QuantizerFigures | None) -> int:
    return _FLOAT_BITS if figures is None else figures.bits


def _quantized_bytes(quant_model: nn.Module, by_name: dict[str, PlaceFigures]) -> int:
    """Packed weights, scales and zero points, and everything else in float32; see :class:`Cost`."""
    inside = [f"{name}." for name, module in quant_model.named_modules() if isinstance(module, QuantProxyFromInjector)]
    total, packed = 0, set()
    for name, place in by_name.items():
        module: Any = quant_model.get_submodule(name)  # a layer of Brevitas, or a QuantIdentity
        if place.weight is not None:
            packed.add(id(module.weight))
            total += -(-module.weight.numel() * place.weight.bits // 8) + 4 * module.quant_weight().scale.numel()
        if place.activation is not None:
            proxy = module.input_quant if place.weight is not None else module.act_quant
            total += 4 * proxy.scale().numel() + (1 if place.activation.zero_point else 0)
    tensors = dict(quant_model.named_parameters()) | dict(quant_model.named_buffers())
    rest = [
        tensor
        for name, tensor in tensors.items()
        if not name.startswith(tuple(inside)) and name.rpartition(".")[2] not in _TUNING_BUFFERS
    ]
    return total + 4 * sum(tensor.numel() for tensor in rest if id(tensor) not in packed)
