"""Brevitas' algorithms, each called as ``ptq_evaluate`` calls it, on a model of theirs or of ours."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import brevitas.config
import numpy as np
import torch
from brevitas.graph.calibrate import quantization_status_manager
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_act_equalization
from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_bias_correction
from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_gpfq
from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_gptq
from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_qronos
from brevitas_examples.imagenet_classification.ptq.ptq_common import calibrate
from brevitas_examples.imagenet_classification.ptq.ptq_common import quantize_model
from brevitas_examples.imagenet_classification.ptq.ptq_imagenet_args import create_args_parser
from torch import Tensor
from torch import nn

from maskaq_brevitas.config import Scheme
from maskaq_brevitas.quant.swap import swap_layers

__all__ = [
    "MODELS", "TUNERS", "Loader", "ModelKind", "borrowed_settings", "calibrated_model", "changed_layers",
    "initialise_weight_scales", "learned_round",
]  # fmt: skip

#: Batches ``(images, labels)``, the same on every pass.
Loader = Iterable[tuple[Tensor, Tensor]]
#: Who swapped the layers: Brevitas (``quantize_model`` with ``layerwise``), or we (``swap_layers``).
ModelKind = Literal["brevitas", "ours"]
MODELS: dict[ModelKind, str] = {"brevitas": "Brevitas' layerwise model", "ours": "our quant_model"}


def quantized(kind: ModelKind, float_model: nn.Module, scheme: Scheme) -> nn.Module:
    """``float_model`` with quantized layers, not calibrated yet; the float model is not changed.

    Brevitas' model has the options of ``ptq_evaluate``, but one weight scale per channel, and biases in float (as the
    QCDQ exporter wants them). First and last layer have 8 bits where it knows them: by 3 input channels, 1,000 classes.
    """
    if kind == "ours":
        return swap_layers(float_model, scheme)[0]
    return quantize_model(
        copy.deepcopy(float_model), "layerwise", weight_bit_width=scheme.bits.weight,
        act_bit_width=scheme.bits.activation, bias_bit_width=None, weight_quant_granularity="per_channel",
        act_quant_percentile=99.999, act_quant_type="sym", scale_factor_type="float_scale", quant_format="int",
    )  # fmt: skip


def calibrated_model(
    kind: ModelKind, float_model: nn.Module, scheme: Scheme, loader: Loader, *, equalize: bool = False
) -> nn.Module:
    """A quant model whose scales are set: activations by Brevitas' ``calibrate``, weights in one forward.

    Args:
        kind: who swaps the layers.
        float_model: is not changed.
        scheme: of Brevitas' model only the nominal widths are taken.
        loader: calibration batches.
        equalize: apply Brevitas' layerwise activation equalization first: to the float model where Brevitas swaps
            the layers behind it; to ours, whose twins know the float layers by name, while its quantizers are off.
    """
    if equalize and kind == "brevitas":
        float_model = copy.deepcopy(float_model)
        apply_act_equalization(float_model, loader, layerwise=True)
    quant_model = quantized(kind, float_model, scheme)
    if equalize and kind == "ours":
        with quantization_status_manager(quant_model, disable_act_quant=True, disable_weight_quant=True):
            apply_act_equalization(quant_model, loader, layerwise=True)
    calibrate(loader, quant_model)
    initialise_weight_scales(quant_model, loader)
    return quant_model


@torch.no_grad()
def initialise_weight_scales(quant_model: nn.Module, loader: Loader) -> None:
    """One quantized forward in evaluation mode: weight scales are set in it, and GPTQ refuses a model without them."""
    images, _ = next(iter(loader))
    quant_model.eval()(images[:1].to(next(quant_model.parameters()).device))


def learned_round(quant_model: nn.Module, loader: Loader, *, iterations: int) -> None:
    """Brevitas' learned rounding, layer by layer, with the options of ``ptq_evaluate --learned-round hard_sigmoid``."""
    arguments = ["--learned-round", "hard_sigmoid", "--learned-round-iters", str(iterations)]
    # Importing it sets a global flag of Brevitas, which loading the rounding parameters needs; see borrowed_settings().
    from brevitas_examples.imagenet_classification.ptq.learned_round_utils import apply_learned_round

    brevitas.config.IGNORE_MISSING_KEYS = True
    apply_learned_round(quant_model, loader, create_args_parser().parse_args(arguments))


def _bias_correction(quant_model: nn.Module, loader: Loader) -> None:
    apply_bias_correction(loader, quant_model)


def _gptq(quant_model: nn.Module, loader: Loader) -> None:
    apply_gptq(loader, quant_model, create_weight_orig=True)


def _gpfq(quant_model: nn.Module, loader: Loader) -> None:
    apply_gpfq(loader, quant_model, act_order=False)


#: What changes a calibrated quant model in place, by the name of its option.
TUNERS: dict[str, Callable[[nn.Module, Loader], None]] = {
    "bias-correction": _bias_correction,
    "gptq": _gptq,
    "gpfq": _gpfq,
    "qronos": partial(apply_qronos, act_order=False),
}


@torch.no_grad()
def changed_layers(before: nn.Module, after: nn.Module) -> tuple[int, int]:
    """Layers of a quant model, and in how many the quantized weight or bias is another than ``before``."""
    count = 0
    for old, new in zip(_layers(before), _layers(after), strict=True):
        weights = [getattr(layer.quant_weight(), "value", layer.quant_weight()) for layer in (old, new)]
        same_bias = old.bias is new.bias or (None not in (old.bias, new.bias) and torch.equal(old.bias, new.bias))
        count += not (torch.equal(*weights) and same_bias)
    return len(_layers(after)), count


def _layers(quant_model: nn.Module) -> list[nn.Module]:
    return [module for module in quant_model.modules() if isinstance(module, QuantWeightBiasInputOutputLayer)]


@contextmanager
def borrowed_settings() -> Iterator[None]:
    """A context behind which warning filters, random states and Brevitas' global flag are as they were.

    Importing ``ptq_evaluate`` silences all warnings of the process, and its run seeds three generators. Layers that
    Brevitas makes draw weights, which are thrown away, and plain loaders draw a seed whenever they are iterated.
    """
    missing_keys = brevitas.config.IGNORE_MISSING_KEYS
    states = random.getstate(), np.random.get_state()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            yield
    finally:
        brevitas.config.IGNORE_MISSING_KEYS = missing_keys
        random.setstate(states[0])
        np.random.set_state(states[1])
