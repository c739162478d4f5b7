"""A quant model frozen for speed: weights quantized once, activations fake-quantized in one pass.

While images are synthesised the quant model does not change, but Brevitas recomputes weights and scales on every
forward. The snapshot gives the same outputs bit for bit, and the straight-through gradient to the image.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from brevitas.nn import QuantConv2d
from brevitas.nn import QuantIdentity
from brevitas.nn import QuantLinear
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.families import answer_logits
from maskaq_brevitas.models.families import attention_modules
from maskaq_brevitas.models.families import write_out
from maskaq_brevitas.models.graph_attention import is_graph_module
from maskaq_brevitas.models.graph_attention import put_taps
from maskaq_brevitas.modes import evaluation_mode

__all__ = ["FakeQuantize", "FrozenLayer", "check_layer", "float_snapshot", "frozen_snapshot", "integer_bounds"]


class FakeQuantize(nn.Module):
    """Uniform quantization with fixed scale and zero point; straight-through gradient inside the range, zero outside.

    Computes what Brevitas' ``IntQuant`` computes, operation for operation:
    ``(clamp(round(x / scale + zero_point)) - zero_point) * scale``.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, low: float, high: float):
        super().__init__()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().clone())
        self.low = low
        self.high = high
        self.shifted = bool((zero_point != 0).any())

    def forward(self, x: Tensor) -> Tensor:
        return _FakeQuantizeFunction.apply(
            x, self.scale, self.zero_point if self.shifted else None, self.low, self.high
        )


class _FakeQuantizeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: float, high: float) -> Tensor:
        # Scales stay float32 whatever dtype the networks run in.
        level = x.float() / scale
        if zero_point is not None:
            level.add_(zero_point)
        level.round_()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((level >= low) & (level <= high))
        level.clamp_(low, high)
        if zero_point is not None:
            level.sub_(zero_point)
        return level.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None, None


class FrozenLayer(nn.Module):
    """A quantized Linear or Conv2d with its weight already quantized, and its bias, if that is given."""

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: QuantWeightBiasInputOutputLayer, bias: Tensor | None = None):
        super().__init__()
        self.input_quant = _fake_quantize(layer.input_quant)
        weight = layer.quant_weight() if layer.weight_quant.is_quant_enabled else layer.weight
        self.register_buffer("weight", getattr(weight, "value", weight).detach().clone())
        bias = layer.bias if bias is None else bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.is_linear = isinstance(layer, nn.Linear)
        if not self.is_linear:
            self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quant(x)
        if self.is_linear:
            return F.linear(x, self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, *self.geometry)


def frozen_snapshot(quant_model: nn.Module, input_size: Sequence[int] | None = None) -> nn.Module:
    """A copy of a calibrated quant model with fixed weights and scales, in evaluation mode, without gradients.

    Args:
        quant_model: with Brevitas quantizers; our own, or one that Brevitas made, FX-traced or not.
        input_size: ``(channels, height, width)``; only needed for quantized biases, whose scale is that of what reaches
            the layer: one empty image tells it.

    Raises:
        ModelError: if a layer or quantizer cannot be frozen (not Linear or Conv2d, per group, or dynamic).
    """
    # Only looked at, never changed: to copy Brevitas' many small modules would take longer than all the rest.
    layers = {
        id(module): module for module in quant_model.modules()
        if isinstance(module, (QuantWeightBiasInputOutputLayer, QuantIdentity))
    }  # fmt: skip
    snapshot = copy.deepcopy(quant_model, dict(layers))
    answer_logits(snapshot)
    if is_graph_module(snapshot):
        put_taps(snapshot)  # for good: who opens them later need not compile the graph anew
    with torch.no_grad(), evaluation_mode(snapshot):
        biases = _quantized_biases(snapshot, input_size)
        frozen: dict[nn.Module, nn.Module] = {}
        # Brevitas' graph passes let several names share one quantizer.
        for name, module in list(snapshot.named_modules(remove_duplicate=False)):
            if id(module) not in layers:
                continue
            if module not in frozen and isinstance(module, QuantIdentity):
                frozen[module] = _fake_quantize(module.act_quant)
            elif module not in frozen:
                check_layer(name, module, (QuantLinear, QuantConv2d), quantized_bias=module in biases)
                frozen[module] = FrozenLayer(module, biases.get(module))
            parent, _, child = name.rpartition(".")
            setattr(snapshot.get_submodule(parent), child, frozen[module])
    return snapshot.eval().requires_grad_(False)


def _quantized_biases(quant_model: nn.Module, input_size: Sequence[int] | None) -> dict[nn.Module, Tensor]:
    """The quantized bias of every layer that quantizes it, found by passing an empty image through the model."""
    layers = [
        module for module in quant_model.modules()
        if isinstance(module, QuantWeightBiasInputOutputLayer) and module.bias_quant.is_quant_enabled
        and module.bias is not None
    ]  # fmt: skip
    found: dict[nn.Module, Tensor] = {}
    if not layers or input_size is None:
        return found

    def note(layer: QuantWeightBiasInputOutputLayer, inputs: tuple[Any, ...]) -> None:
        quant_input = layer.input_quant(layer.unpack_input(inputs[0]))
        bias = layer.bias_quant(layer.bias, quant_input, layer.quant_weight(quant_input))
        found[layer] = getattr(bias, "value", bias).detach().clone()

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        quant_model(next(quant_model.parameters()).new_zeros(1, *input_size))
    finally:
        for handle in handles:
            handle.remove()
    return found


def float_snapshot(float_model: nn.Module) -> nn.Module:
    """A frozen copy of a float model whose attention is written out, in evaluation mode, without gradients."""
    snapshot = copy.deepcopy(float_model).eval().requires_grad_(False)
    attention_modules(snapshot)  # refuses a model without
    write_out(snapshot)
    return snapshot.eval()


def _fake_quantize(proxy: ActQuantProxyFromInjectorBase) -> nn.Module:
    """The fixed form of a Brevitas activation quantizer; identity if it is switched off."""
    if not proxy.is_quant_enabled:
        return nn.Identity()
    scale = proxy.scale()
    if scale is None or scale.numel() not in (1, *scale.shape[-1:]):
        raise ModelError(
            f"Cannot freeze {type(proxy).__name__}: expected one static scale, or one per channel of the last axis."
        )
    return FakeQuantize(scale, proxy.zero_point(), *integer_bounds(proxy))


def integer_bounds(proxy: QuantProxyFromInjector) -> tuple[int, int]:
    """Lowest and highest code of a Brevitas quantizer."""
    levels, narrow = 2 ** int(proxy.bit_width()), int(bool(proxy.is_narrow_range))
    if proxy.is_signed:
        return -levels // 2 + narrow, levels // 2 - 1
    return 0, levels - 1 - narrow


def check_layer(
    name: str,
    layer: QuantWeightBiasInputOutputLayer,
    known: tuple[type[QuantWeightBiasInputOutputLayer], ...],
    *,
    quantized_bias: bool = False,
) -> None:
    """Refuse a Brevitas layer that the simple forms here would compute wrongly.

    Args:
        quantized_bias: whether the caller knows what the layer's bias is quantized to.

    Raises:
        ModelError: if it is of another type than ``known``, not padded with zeros, or quantizes its bias or output.
    """
    if not isinstance(layer, known) or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise ModelError(
            f"{name}: {type(layer).__name__} cannot be frozen; expected QuantLinear, or QuantConv2d padded with zeros."
        )
    if layer.output_quant.is_quant_enabled or (layer.bias_quant.is_quant_enabled and not quantized_bias):
        raise ModelError(
            f"{name}: output or bias quantizers cannot be frozen; expected weight and input quantizers only. "
            "frozen_snapshot can freeze biases, if it is told the input_size."
        )
