"""What works for each architecture family: measured on small models with random weights, and kept as a table.

``maskaq models`` prints the table that is kept; ``python -m maskaq_brevitas.support`` measures it anew and keeps it.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from brevitas.graph.calibrate import quantization_status_manager
from torch import Tensor
from torch import nn

from maskaq_brevitas.calibrator import DataFreeCalibrator
from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import SkippedLayerWarning
from maskaq_brevitas.export.formats import FORMATS
from maskaq_brevitas.export.process import quiet
from maskaq_brevitas.models.families import REFUSED
from maskaq_brevitas.models.families import known_families
from maskaq_brevitas.models.families import read_logits
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.fx import OneArgument
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.modes import seeded
from maskaq_brevitas.quant.cost import multiply_accumulates
from maskaq_brevitas.quant.swap import SwapRecord
from maskaq_brevitas.quant.swap import swap_layers

__all__ = ["Support", "SupportCheck", "check_support", "recorded_support", "refusals", "small_model"]

_RECORD = "support.json"
#: At 8 bits a rounding tie that falls to the other side changes little.
_SCHEME = "w8a8"


@dataclass(frozen=True, kw_only=True)
class Support:
    """One row of the table.

    Attributes:
        family, example: name of the family, and of the model whose small form was checked: timm's, or behind
            ``torchvision:`` or ``transformers:``.
        swapped: quantized layers and matmul operands.
        macs: share of the multiply-accumulates that runs quantized, and what does not.
        taps: attention modules that are tapped, by what their queries see.
        fx: whether Brevitas' symbolic tracer takes the float model.
        qonnx: whether a QONNX file was written, and executed by qonnx computes what PyTorch computes.
        onnxruntime: the same for a QCDQ file in ONNX Runtime.
    """

    family: str
    example: str
    swapped: str
    macs: str
    taps: str
    fx: str
    qonnx: str
    onnxruntime: str


@dataclass(frozen=True, kw_only=True)
class SupportCheck:
    """A row, and the figures behind it.

    Attributes:
        row: of the table.
        off_difference: largest difference of an output between the float model and the swapped one with all quantizers
            off.
        quantized_share: of the multiply-accumulates, 0-1.
    """

    row: Support
    off_difference: float
    quantized_share: float


def recorded_support() -> list[Support]:
    """The rows as they were measured last."""
    text = resources.files("maskaq_brevitas.models").joinpath(_RECORD).read_text(encoding="utf-8")
    return [Support(**row) for row in json.loads(text)]


def refusals() -> list[str]:
    """The families that are known and refused, and why."""
    return list(REFUSED.values())


def small_model(family: Family, example: str) -> nn.Module:
    """A small model with random weights: all parameters are drawn, also those that start at zero or one."""
    with seeded(0), quiet():
        model = family.create(example, **family.examples[example])
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def check_support(family: Family, example: str) -> SupportCheck:
    """Swap, synthesise two steps, calibrate, export and compare a small model of a family.

    Raises:
        MaskAQError: if a step before the exports fails; failed exports are told in the row.
    """
    model = small_model(family, example)
    calibrator = DataFreeCalibrator(
        model, scheme=_SCHEME, num_images=4, batch_size=4, held_back=2, steps=2, progress=False
    )  # fmt: skip
    quant_model = calibrator.calibrate()
    assert calibrator.held_back is not None
    images = calibrator.held_back.images()
    macs = multiply_accumulates(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedLayerWarning)
        swapped, record = swap_layers(model, _SCHEME)
    places = {place.name for place in record.places}
    quantized = sum(macs.get(name, 0) for name in places)
    row = Support(
        family=family.name, example=example, swapped=_swapped_text(record),
        macs=_macs_text(quantized / macs[""], record),
        taps=_taps_text(calibrator.geometry, len([name for name in places if name.endswith(".query")])),
        fx=_fx_text(model), qonnx=_file_text("qonnx", quant_model, calibrator.geometry, images),
        onnxruntime=_file_text("qcdq", quant_model, calibrator.geometry, images),
    )  # fmt: skip
    return SupportCheck(
        row=row, off_difference=_off_difference(model, swapped, images), quantized_share=quantized / macs[""]
    )


def _off_difference(model: nn.Module, swapped: nn.Module, images: Tensor) -> float:
    off = quantization_status_manager(swapped, disable_act_quant=True, disable_weight_quant=True, is_training=False)
    with torch.no_grad(), off:
        return float((read_logits(model, model(images)) - swapped(images)).abs().max())


def _swapped_text(record: SwapRecord) -> str:
    counts = Counter(place.kind for place in record.places)
    return ", ".join(f"{counts[kind]} {kind}" for kind in ("convolution", "linear", "operand") if counts[kind])


def _macs_text(share: float, record: SwapRecord) -> str:
    missing = ", ".join(layer.name for layer in record.skipped)
    return f"{share:.1%}" + (f", without {missing}" if missing else "")


def _taps_text(geometry: Geometry, attentions: int) -> str:
    kinds = Counter(layout.describe() for layout in geometry.layouts) or Counter({"whole image": attentions})
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _fx_text(model: nn.Module) -> str:
    from brevitas.fx import symbolic_trace

    try:
        with quiet():
            symbolic_trace(OneArgument(model))
    except Exception as error:  # each model stops the tracer in its own way
        return f"no ({type(error).__name__})"
    return "yes"


def _file_text(kind: str, quant_model: nn.Module, geometry: Geometry, images: Tensor) -> str:
    with tempfile.TemporaryDirectory(prefix="maskaq-") as folder:
        path = Path(folder) / FORMATS[kind].file_name
        try:
            FORMATS[kind].export(quant_model, path, input_shape=geometry.input_size)
            check = FORMATS[kind].verify(path, quant_model, images, raise_on_mismatch=False)
        except ExportError as error:
            return f"no ({str(error)[:120]})"
    return "passed" if check.passed else "FAILED"


def _measure_all() -> None:
    """Check every example of every family, print the rows, and keep them in the package."""
    rows = []
    for family in known_families(optional=True):
        for example in family.examples:
            check = check_support(family, example)
            rows.append(dataclasses.asdict(check.row))
            print(f"{rows[-1]}  off: {check.off_difference:.2g}", flush=True)
    path = Path(str(resources.files("maskaq_brevitas.models").joinpath(_RECORD)))
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _measure_all()
