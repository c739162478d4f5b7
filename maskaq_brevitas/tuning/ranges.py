"""Refines scales after calibration: those whose *layer output* is closest, token by token.

Brevitas' MSE quantizers minimise the plain squared error of the activation itself. A ViT defeats that: a few tokens
carry values a hundred times as large as the rest, win the error, and leave the others a handful of codes
(``blocks.7.mlp.fc2`` of ViT-Tiny: range 33 for values of deviation 0.3). Here the error of each token counts relative
to the token's own power, and for a linear layer it is the error of the layer's output. The scale of each row of a
weight is chosen in the same way, with the layer's inputs as they are after quantization.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import torch
from brevitas.core.scaling import ParameterFromRuntimeStatsScaling
from brevitas.core.scaling import ParameterFromStatsFromParameterScaling
from brevitas.nn import QuantIdentity
from brevitas.nn import QuantLinear
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import Tensor
from torch import nn

from maskaq_brevitas.quant.equalize import has_channel_scales
from maskaq_brevitas.quant.grid import row_importance
from maskaq_brevitas.quant.observe import collect_rows
from maskaq_brevitas.quant.snapshot import integer_bounds

__all__ = ["mean_weight_error", "search_ranges", "set_channel_scales", "undo_bias_correction"]

_CANDIDATES = 40
_LOWEST = 0.01
_WEIGHT_LOWEST = 0.2


@torch.no_grad()
def search_ranges(
    quant_model: nn.Module,
    batches: Iterable[Tensor],
    *,
    rows: int = 4096,
    activations: bool = True,
    weights: bool = True,
    biases: bool = False,
) -> dict[str, float]:
    """Set activation scales, then weight scales, to the best of a grid, in place. Run it on a calibrated model.

    Covers inputs of linear layers and the operands of attention matmuls. Quantizers with a zero point, or with a
    scale per channel, keep theirs.

    Args:
        quant_model: calibrated model with Brevitas quantizers.
        batches: normalised images, ``(batch, channels, height, width)`` each.
        rows: tokens per place on which the error is measured.
        activations, weights: which scales are searched.
        biases: whether the mean error that rounding a weight leaves in the layer's output is taken off its bias, for
            layers behind a LayerNorm or an activation function.

    Returns:
        Factor on the calibrated scale, in (0, 1], per module name.
    """
    places: dict[str, ActQuantProxyFromInjectorBase] = {}
    for name, module in quant_model.named_modules():
        if isinstance(module, QuantLinear):
            places[name] = module.input_quant
        elif isinstance(module, QuantIdentity):
            places[name] = module.act_quant
    places = {name: proxy for name, proxy in places.items() if _is_searchable(proxy)}
    samples = collect_rows(quant_model, places, batches, rows)
    factors: dict[str, float] = {}
    for name, values in samples.items():
        layer: Any = quant_model.get_submodule(name)
        weight = layer.weight.float() if isinstance(layer, QuantLinear) else None
        if activations and not has_channel_scales(places[name]):
            factors[name] = _best_factor(values, weight, places[name])
            _scalings(places[name])[0].value.data.mul_(factors[name])
        if weights and weight is not None:
            _search_weight_scale(layer, values)
        if biases and hasattr(layer, "bias_correction"):
            _correct_bias(layer, values)
    return factors


def _correct_bias(layer: QuantLinear, values: Tensor) -> None:
    """Take the mean error of the output off the bias (bias correction, Nagel et al., ICCV 2019).

    It matters most where channels are shifted: there an input's mean is far from zero.
    """
    importance = row_importance(values @ layer.weight.detach().float().T)
    mean = (_quantized(layer, values) * importance).sum(dim=0) / importance.sum()
    layer.input_mean.copy_(mean)
    layer.bias_correction.copy_(mean_weight_error(layer))
    layer.bias.data += layer.bias_correction


@torch.no_grad()
def mean_weight_error(layer: QuantLinear) -> Tensor:
    """What rounding the weight takes off the layer's output for its mean input, ``(out_features,)``: its bias holds it.

    The mean is the buffer ``input_mean``, zero without bias correction. Tuning keeps it up to date, and the bias with
    it.
    """
    if not layer.input_mean.any():
        return layer.input_mean.new_zeros(layer.out_features)
    rounded = layer.quant_weight()
    return (layer.weight.detach().float() - getattr(rounded, "value", rounded)) @ layer.input_mean


@torch.no_grad()
def undo_bias_correction(quant_model: nn.Module) -> None:
    """Take what :func:`search_ranges` put into the biases out of them again, before a model is calibrated anew."""
    for module in quant_model.modules():
        if isinstance(module, QuantLinear) and hasattr(module, "bias_correction"):
            module.bias.data -= mean_weight_error(module)
            module.bias_correction.zero_()
            module.input_mean.zero_()


def _quantized(layer: QuantLinear, values: Tensor) -> Tensor:
    found = layer.input_quant(values)
    return getattr(found, "value", found).reshape(values.shape)  # scales per channel add an axis


def _search_weight_scale(layer: QuantLinear, values: Tensor) -> None:
    """Scale the rows of a weight so that the error of the output is least, its inputs being quantized already."""
    impls = [part for part in layer.weight_quant.modules() if isinstance(part, ParameterFromStatsFromParameterScaling)]
    if len(impls) != 1 or not layer.weight_quant.is_quant_enabled or impls[0].value.numel() != len(layer.weight):
        return
    weight = layer.weight.detach().float()
    importance = row_importance(values @ weight.T)
    inputs = _quantized(layer, values)
    moments = inputs.T @ (inputs * importance)  # (channels, channels)
    low, high = integer_bounds(layer.weight_quant)
    largest = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / high
    best = layer.weight_quant.scale().detach().reshape(-1, 1)
    best_error = None
    for candidate in (best, *(largest * _WEIGHT_LOWEST ** (index / 24) for index in range(25))):
        error = (weight / candidate).round_().clamp_(low, high).mul_(candidate).sub_(weight)
        total = ((error @ moments) * error).sum(dim=1, keepdim=True)
        if best_error is None:
            best_error = total
        else:
            best = torch.where(total < best_error, candidate, best)
            best_error = torch.minimum(total, best_error)
    impls[0].value.data.mul_((best / layer.weight_quant.scale().detach().reshape(-1, 1)).reshape(impls[0].value.shape))


def _best_factor(values: Tensor, weight: Tensor | None, proxy: ActQuantProxyFromInjectorBase) -> float:
    target = values if weight is None else values @ weight.T
    importance = row_importance(target)
    low, high = integer_bounds(proxy)
    calibrated = proxy.scale()
    best, best_error = 1.0, float("inf")
    for index in range(_CANDIDATES):
        factor = _LOWEST ** (index / (_CANDIDATES - 1))
        scale = calibrated * factor
        error = (values / scale).round_().clamp_(low, high).mul_(scale).sub_(values)
        if weight is not None:
            error = error @ weight.T
        total = float(error.square_().mul_(importance).sum())
        if total < best_error:
            best, best_error = factor, total
    return best


@torch.no_grad()
def set_channel_scales(quant_model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Give the input quantizers of linear layers these scales, one per channel. Run it on a calibrated model.

    Args:
        quant_model: calibrated model whose layers have scales per channel at their input.
        scales: ``(channels,)`` per layer name.
    """
    for name, wanted in scales.items():
        layer: QuantLinear = quant_model.get_submodule(name)
        present = layer.input_quant.scale()
        _scalings(layer.input_quant)[0].value.data.mul_(wanted.reshape(present.shape) / present)


def _scalings(proxy: ActQuantProxyFromInjectorBase) -> list[ParameterFromRuntimeStatsScaling]:
    return [part for part in proxy.modules() if isinstance(part, ParameterFromRuntimeStatsScaling)]


def _is_searchable(proxy: ActQuantProxyFromInjectorBase) -> bool:
    if not proxy.is_quant_enabled or not _scalings(proxy):
        return False
    zero_point = proxy.zero_point()
    return zero_point is not None and not bool((zero_point != 0).any())
