"""Quant model -> files that other tools read, and the proof that a file computes what the model computes."""

from maskaq_brevitas.export.execute import QonnxModel
from maskaq_brevitas.export.qonnx import QonnxFile
from maskaq_brevitas.export.qonnx import count_quantizers
from maskaq_brevitas.export.qonnx import export_qonnx
from maskaq_brevitas.export.verify import QonnxCheck
from maskaq_brevitas.export.verify import verify_qonnx

__all__ = ["QonnxCheck", "QonnxFile", "QonnxModel", "count_quantizers", "export_qonnx", "verify_qonnx"]
