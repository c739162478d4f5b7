"""Data-free quantization of Vision Transformers on Brevitas.

>>> from maskaq_brevitas import DataFreeCalibrator, load_model
>>> calibrator = DataFreeCalibrator(load_model("digits_vit"), scheme="w4a4")
"""

from importlib import import_module
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from maskaq_brevitas.calibrator import DataFreeCalibrator
    from maskaq_brevitas.config import DistillConfig
    from maskaq_brevitas.config import ReconstructConfig
    from maskaq_brevitas.config import Scheme
    from maskaq_brevitas.config import SynthesisConfig
    from maskaq_brevitas.config import resolve_scheme
    from maskaq_brevitas.models.fx import prepare_for_fx
    from maskaq_brevitas.models.zoo import load_model

__all__ = [
    "DataFreeCalibrator",
    "DistillConfig",
    "ReconstructConfig",
    "Scheme",
    "SynthesisConfig",
    "load_model",
    "prepare_for_fx",
    "resolve_scheme",
]
__version__ = "0.1.0"

# Imported at first use: Brevitas and timm take seconds, and ``maskaq --help`` needs neither.
_HOMES = {
    "DataFreeCalibrator": "calibrator",
    "DistillConfig": "config",
    "ReconstructConfig": "config",
    "Scheme": "config",
    "SynthesisConfig": "config",
    "load_model": "models.zoo",
    "prepare_for_fx": "models.fx",
    "resolve_scheme": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
