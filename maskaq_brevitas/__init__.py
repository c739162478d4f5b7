"""Data-free quantization of Vision Transformers on Brevitas.

>>> from maskaq_brevitas import DataFreeCalibrator, load_model
>>> calibrator = DataFreeCalibrator(load_model("digits_vit"), scheme="w4a4")
"""

from maskaq_brevitas.calibrator import DataFreeCalibrator
from maskaq_brevitas.config import Scheme, SynthesisConfig, resolve_scheme
from maskaq_brevitas.models.zoo import load_model

__all__ = ["DataFreeCalibrator", "Scheme", "SynthesisConfig", "load_model", "resolve_scheme"]
__version__ = "0.1.0"
