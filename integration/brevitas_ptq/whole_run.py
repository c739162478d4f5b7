"""``quantize_ptq_imagenet`` from start to end, on a timm model, with the loaders that it is given."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from brevitas_examples.common.parse_utils import parse_args
from brevitas_examples.imagenet_classification.ptq.ptq_imagenet_args import create_args_parser
from torch import nn
from torch.utils.data import DataLoader

from integration.brevitas_ptq.algorithms import Loader
from integration.brevitas_ptq.algorithms import ModelKind
from integration.brevitas_ptq.algorithms import initialise_weight_scales
from maskaq_brevitas.config import Scheme
from maskaq_brevitas.quant.swap import swap_layers

__all__ = ["quantize_ptq_imagenet"]


class _Timed:
    """Validation batches that note when they were asked for: quantization was over then."""

    def __init__(self, batches: DataLoader):
        self.batches = batches
        self.asked_at = 0.0

    def __iter__(self) -> Iterator:
        self.asked_at = time.perf_counter()
        return iter(self.batches)


@contextmanager
def _attributes(module: ModuleType, **changes: Any) -> Iterator[None]:
    """A context in which attributes of ``module`` are others."""
    before = {name: getattr(module, name) for name in changes}
    vars(module).update(changes)
    try:
        yield
    finally:
        vars(module).update(before)


def quantize_ptq_imagenet(
    kind: ModelKind, float_model: nn.Module, scheme: Scheme, loader: Loader, validation: DataLoader
) -> tuple[float, float, nn.Module]:
    """Brevitas' script with its defaults: graph equalization, calibration, bias correction, validation.

    It knows torchvision's models and ImageFolder loaders only. Three attributes of its module say where these come
    from; they are put back. For our quant model a fourth one gives the swap instead of ``quantize_model``; graph
    equalization, which works on the float model, is left out then.

    Args:
        kind: who swaps the layers.
        float_model: a timm model that Brevitas can trace (the script traces it for ``layerwise`` too); not changed.
        scheme: of Brevitas' model only the nominal widths are taken.
        loader: calibration batches.
        validation: labelled batches that measure.

    Returns:
        Top-1 in percent, seconds until validation began, and the quant model.
    """
    # Importing it silences all warnings of the process, and its run seeds three generators; see borrowed_settings().
    import brevitas_examples.imagenet_classification.ptq.ptq_evaluate as script

    def swapped(_model: nn.Module, **_options: Any) -> nn.Module:
        quant_model = swap_layers(float_model, scheme)[0]
        initialise_weight_scales(quant_model, loader)
        return quant_model

    timed = _Timed(validation)
    size = next(iter(validation))[0].shape[-1]
    changes: dict[str, Any] = dict(
        generate_dataloader=lambda folder, *_, **__: {"calibration": loader, "validation": timed}[folder],
        get_torchvision_model=lambda _: copy.deepcopy(float_model),
        get_model_config=lambda _: dict(resize_shape=size, center_crop_shape=size, inception_preprocessing=False),
    )
    if kind == "ours":
        changes["quantize_model"] = swapped
    args, extra = parse_args(create_args_parser(), [
        "--calibration-dir", "calibration", "--validation-dir", "validation",
        # Any name that its parser takes: get_torchvision_model does not read it.
        "--model-name", "vit_b_32", "--target-backend", "layerwise",
        "--weight-bit-width", str(scheme.bits.weight), "--act-bit-width", str(scheme.bits.activation),
        "--bias-bit-width", "None", "--weight-quant-granularity", "per_channel",
        *(["--graph-eq-iterations", "0"] if kind == "ours" else []),
    ])  # fmt: skip
    start = time.perf_counter()
    with _attributes(script, **changes):
        found, quant_model = script.quantize_ptq_imagenet(args, extra)
    return found["quant_top1"], timed.asked_at - start, quant_model
