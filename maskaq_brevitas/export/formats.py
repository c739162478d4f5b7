"""The kinds of file that a quant model can be written as: what each needs, how it is written and how it is checked."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from maskaq_brevitas.export.finn import export_finn
from maskaq_brevitas.export.finn import verify_finn
from maskaq_brevitas.export.qcdq import export_qcdq
from maskaq_brevitas.export.qonnx import export_qonnx
from maskaq_brevitas.export.torch_formats import export_torch_program
from maskaq_brevitas.export.torch_formats import export_torch_qcdq
from maskaq_brevitas.export.verify import QonnxCheck
from maskaq_brevitas.export.verify import verify_qcdq
from maskaq_brevitas.export.verify import verify_qonnx
from maskaq_brevitas.export.verify import verify_torch_file

__all__ = ["FORMATS", "Format"]


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        title: what users call it.
        file_name: of such a file in a run's folder.
        packages: of the ``export`` extra that it needs.
        export: ``(quant_model, path, *, input_shape, dynamic_batch)``, writes the file.
        verify: ``(path, quant_model, images)``, executes it and compares it with PyTorch.
    """

    title: str
    file_name: str
    packages: tuple[str, ...]
    export: Callable[..., Any]
    verify: Callable[..., QonnxCheck]


_ONNX = ("onnx", "onnxoptimizer", "onnxruntime", "qonnx")

#: By the name that ``--format`` takes.
FORMATS = {
    "qonnx": Format("QONNX", "model.onnx", _ONNX, export_qonnx, verify_qonnx),
    "qcdq": Format("QCDQ", "model.qcdq.onnx", _ONNX, export_qcdq, verify_qcdq),
    "finn": Format("QONNX for FINN", "model.finn.onnx", _ONNX, export_finn, verify_finn),
    "torch-qcdq": Format(
        "torch QCDQ", "model.qcdq.pt", (), export_torch_qcdq, partial(verify_torch_file, kind="torch-qcdq")
    ),
    "torch-export": Format(
        "torch.export", "model.pt2", (), export_torch_program, partial(verify_torch_file, kind="torch-export")
    ),
}
