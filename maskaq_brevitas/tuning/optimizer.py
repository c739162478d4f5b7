"""What an optimiser turns in a tuning: a quant model's parameters in groups, each with its own rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from brevitas.core.scaling import ParameterFromRuntimeStatsScaling
from brevitas.core.scaling import ParameterFromStatsFromParameterScaling
from brevitas.core.zero_point import ParameterFromRuntimeZeroPoint
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import nn

from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.errors import TuningError

__all__ = ["OptimizerFactory", "make_optimizer", "parameter_groups"]

#: Builds any torch optimiser from parameter groups that name their own ``lr`` and ``weight_decay``.
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def parameter_groups(
    quant_model: nn.Module, config: DistillConfig
) -> tuple[list[dict[str, Any]], list[tuple[nn.Parameter, nn.Parameter]]]:
    """Parameter groups for an optimiser: quantized weights, if they have a rate of their own; other matrices; biases
    and LayerNorms (no decay); logarithms of scales.

    Beside torch's own keys each has ``first_lr``, the rate at the first step.

    Returns:
        The groups, and pairs of a scale and the parameter that stands for its logarithm: zero, because what an
        optimiser adds to it moves into the scale (``scale *= exp(logarithm)``) after each step.

    Raises:
        TuningError: if a scale is not positive or not finite: the model was not calibrated.
    """
    scales: dict[int, nn.Parameter] = {}
    fixed: set[int] = set()
    for name, module in quant_model.named_modules():
        if isinstance(module, (ParameterFromRuntimeStatsScaling, ParameterFromStatsFromParameterScaling)):
            if not bool((torch.isfinite(module.value) & (module.value > 0)).all()):
                raise TuningError(f"The scale of {name} is not positive and finite. Calibrate the model before tuning.")
            scales[id(module.value)] = module.value
        elif isinstance(module, ParameterFromRuntimeZeroPoint):
            fixed.add(id(module.value))
    rates: dict[nn.Parameter, float] = {}
    if config.weight_learning_rate is not None:
        rates = {weight: config.weight_learning_rate * step for weight, step in _weight_steps(quant_model).items()}
    others = [
        parameter for parameter in quant_model.parameters() if id(parameter) not in {*scales, *fixed, *map(id, rates)}
    ]
    pairs = [(scale, nn.Parameter(torch.zeros_like(scale))) for scale in scales.values()]
    groups: list[dict[str, Any]] = []
    for chosen, rate, decay in (
        *(([weight], rate, config.weight_decay) for weight, rate in rates.items()),
        ([parameter for parameter in others if parameter.ndim > 1], config.learning_rate, config.weight_decay),
        ([parameter for parameter in others if parameter.ndim < 2], config.learning_rate, 0.0),
        ([logarithm for _, logarithm in pairs], config.scale_learning_rate, 0.0),
    ):
        if chosen and rate > 0:
            groups.append(dict(params=chosen, lr=rate, first_lr=rate, weight_decay=decay))
    return groups, pairs if config.scale_learning_rate > 0 else []


def _weight_steps(quant_model: nn.Module) -> dict[nn.Parameter, float]:
    """The quantized weights, and the mean step of each one's grid."""
    found: dict[nn.Parameter, float] = {}
    for module in quant_model.modules():
        if isinstance(module, QuantWeightBiasInputOutputLayer) and module.weight_quant.is_quant_enabled:
            found[module.weight] = float(module.weight_quant.scale().detach().mean())
    return found


def make_optimizer(groups: list[dict[str, Any]], config: DistillConfig) -> torch.optim.Optimizer:
    """The optimiser that the configuration names, for these groups."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0)
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, fused=on_gpu or None)
