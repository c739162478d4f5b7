"""Quant model -> files that other tools read, and the proof that a file computes what the model computes."""

from maskaq_brevitas.export.brevitas_onnx import count_quantizers
from maskaq_brevitas.export.execute import QonnxModel
from maskaq_brevitas.export.execute_qcdq import QcdqModel
from maskaq_brevitas.export.qcdq import QcdqFile
from maskaq_brevitas.export.qcdq import export_qcdq
from maskaq_brevitas.export.qonnx import QonnxFile
from maskaq_brevitas.export.qonnx import export_qonnx
from maskaq_brevitas.export.verify import QonnxCheck
from maskaq_brevitas.export.verify import verify_qcdq
from maskaq_brevitas.export.verify import verify_qonnx

__all__ = [
    "QcdqFile",
    "QcdqModel",
    "QonnxCheck",
    "QonnxFile",
    "QonnxModel",
    "count_quantizers",
    "export_qcdq",
    "export_qonnx",
    "verify_qcdq",
    "verify_qonnx",
]
