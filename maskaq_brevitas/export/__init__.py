"""Quant model -> files that other tools read, and the proof that a file computes what the model computes."""

from maskaq_brevitas.export.brevitas_onnx import count_quantizers
from maskaq_brevitas.export.card import ModelCard
from maskaq_brevitas.export.card import model_card
from maskaq_brevitas.export.card import write_card
from maskaq_brevitas.export.execute import QonnxModel
from maskaq_brevitas.export.execute_qcdq import QcdqModel
from maskaq_brevitas.export.finn import FinnFile
from maskaq_brevitas.export.finn import export_finn
from maskaq_brevitas.export.finn import verify_finn
from maskaq_brevitas.export.finn_lint import FinnLint
from maskaq_brevitas.export.finn_lint import lint_finn
from maskaq_brevitas.export.formats import FORMATS
from maskaq_brevitas.export.qcdq import QcdqFile
from maskaq_brevitas.export.qcdq import export_qcdq
from maskaq_brevitas.export.qonnx import QonnxFile
from maskaq_brevitas.export.qonnx import export_qonnx
from maskaq_brevitas.export.torch_formats import TorchFile
from maskaq_brevitas.export.torch_formats import export_torch_program
from maskaq_brevitas.export.torch_formats import export_torch_qcdq
from maskaq_brevitas.export.verify import QonnxCheck
from maskaq_brevitas.export.verify import verify_qcdq
from maskaq_brevitas.export.verify import verify_qonnx
from maskaq_brevitas.export.verify import verify_torch_file

__all__ = [
    "FORMATS",
    "FinnFile",
    "FinnLint",
    "ModelCard",
    "QcdqFile",
    "QcdqModel",
    "QonnxCheck",
    "QonnxFile",
    "QonnxModel",
    "TorchFile",
    "count_quantizers",
    "export_finn",
    "export_qcdq",
    "export_qonnx",
    "export_torch_program",
    "export_torch_qcdq",
    "lint_finn",
    "model_card",
    "verify_finn",
    "verify_qcdq",
    "verify_qonnx",
    "verify_torch_file",
    "write_card",
]
