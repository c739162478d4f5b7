"""Sets the scales of activation quantizers on images, through Brevitas' own calibration mode."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager

import torch
from brevitas.core.scaling import ParameterFromRuntimeStatsScaling
from brevitas.core.zero_point import ParameterFromRuntimeZeroPoint
from brevitas.graph.calibrate import calibration_mode
from brevitas.nn import QuantIdentity
from brevitas.nn.mixin.base import QuantLayerMixin
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.modes import evaluation_mode

__all__ = [
    "calibrate",
    "is_calibrated",
    "provisional_calibration",
    "reset_calibration",
    "returned_quant_tensors",
    "silent_quantizers",
]


_SMALLEST_SCALE = 1e-10  # scaling_min_val of Brevitas' quantizers


def is_calibrated(quant_model: nn.Module) -> bool:
    """Whether every activation quantizer of the model has scales from data."""
    impls = [module for module in quant_model.modules() if isinstance(module, ParameterFromRuntimeStatsScaling)]
    return all(impl.counter > 0 for impl in impls)


def reset_calibration(quant_model: nn.Module) -> None:
    """Forget the scales and zero points of activations. Brevitas ignores a second calibration without this."""
    for module in quant_model.modules():
        if isinstance(module, (ParameterFromRuntimeStatsScaling, ParameterFromRuntimeZeroPoint)):
            start = 0.0 if isinstance(module, ParameterFromRuntimeZeroPoint) else 1.0
            module.counter = 0
            module.buffer.fill_(start)
            module.value.data.fill_(start)


@torch.no_grad()
def calibrate(quant_model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set every activation scale and zero point from ``batches``; what was there before is forgotten.

    The statistics are taken per batch and averaged, with float weights and activations (Brevitas'
    ``calibration_mode``). Then one quantized forward sets the weight scales.

    Args:
        quant_model: a model with Brevitas quantizers; its training flags are restored.
        batches: normalised images, ``(batch, channels, height, width)`` each; all of one size, or the last smaller.

    Raises:
        InputError: if there is no batch.
        ModelError: if a quantizer was never reached by the data: its layer is bypassed, and its scale would be wrong.
    """
    reset_calibration(quant_model)
    first: Tensor | None = None
    with evaluation_mode(quant_model):
        with calibration_mode(quant_model):
            for images in batches:
                first = images if first is None else first
                quant_model(images)
            if first is None:
                raise InputError("Calibration needs at least one batch of images, got none.")
            missed = _unreached(quant_model)
        if missed:
            raise ModelError(
                f"No data reached the quantizers of {', '.join(missed)}: the model bypasses these layers (it reads "
                "their weights directly), so they cannot be quantized by swapping modules."
            )
        quant_model(first[:1])


def silent_quantizers(quant_model: nn.Module) -> list[str]:
    """Names of layers whose quantized input was zero, or one value, on all images: their scale is Brevitas' smallest.
    """
    silent = []
    for name, module in quant_model.named_modules():
        for proxy in (getattr(module, "input_quant", None), getattr(module, "act_quant", None)):
            scale = proxy.scale() if proxy is not None and getattr(proxy, "is_quant_enabled", False) else None
            if scale is not None and float(scale.detach().max()) <= 2 * _SMALLEST_SCALE:
                silent.append(name)
    return silent


def returned_quant_tensors(quant_model: nn.Module) -> dict[QuantLayerMixin, bool]:
    """Whether each module that can do so returns a QuantTensor at the moment."""
    return {
        module: bool(module.return_quant_tensor)
        for module in quant_model.modules()
        if hasattr(module, "return_quant_tensor")
    }


@contextmanager
def provisional_calibration(
    quant_model: nn.Module, batches: Iterable[Tensor], returned: Mapping[QuantLayerMixin, bool] | None = None
) -> Iterator[nn.Module]:
    """A context in which ``quant_model`` is calibrated on ``batches``; afterwards its quantizers are as they were.

    Also in the middle of someone else's ``calibration_mode``, which keeps its statistics and goes on. (A deep copy
    would not do: Brevitas' MSE search of the copy calls the original.)

    Args:
        quant_model: a model with Brevitas quantizers.
        batches: as for :func:`calibrate`.
        returned: which modules return a QuantTensor when nobody calibrates, see :func:`returned_quant_tensors`. Only
            needed in the middle of someone else's ``calibration_mode``, which switches that off.

    Raises:
        InputError, ModelError: as :func:`calibrate` does.
    """
    plain = (bool, int, float, type(None))
    flags = {
        module: {name: value for name, value in vars(module).items() if isinstance(value, plain)}
        for module in quant_model.modules()
    }
    tensors = [
        (tensor, tensor.detach().clone())
        for module in quant_model.modules()
        if type(module).__module__.startswith("brevitas.core")
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    try:
        for module in quant_model.modules():
            for switch in ("disable_quant", "observer_only"):
                if switch in vars(module):
                    setattr(module, switch, False)
        for module, value in (returned or {}).items():
            module.return_quant_tensor = value
        quant_model.eval()
        calibrate(quant_model, batches)
        yield quant_model
    finally:
        for module, values in flags.items():
            vars(module).update(values)
        for tensor, before in tensors:
            tensor.data.copy_(before)


def _unreached(quant_model: nn.Module) -> list[str]:
    """Names of layers whose activation quantizer has seen no batch. Only meaningful before calibration mode exits."""
    missed = []
    for name, module in quant_model.named_modules():
        if isinstance(module, QuantWeightBiasInputOutputLayer):
            proxy = module.input_quant
        elif isinstance(module, QuantIdentity):
            proxy = module.act_quant
        else:
            continue
        impls = [part for part in proxy.modules() if isinstance(part, ParameterFromRuntimeStatsScaling)]
        if any(impl.counter == 0 for impl in impls):
            missed.append(name)
    return missed
