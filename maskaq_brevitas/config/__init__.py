"""Frozen configuration: quantization schemes, synthesis and tuning. Nothing here imports torch.

Every class checks its values on construction and refuses unknown keys, so that a typing error in a YAML file is an
error and not a default.
"""

from maskaq_brevitas.config.efforts import EFFORTS
from maskaq_brevitas.config.efforts import Effort
from maskaq_brevitas.config.efforts import EffortName
from maskaq_brevitas.config.efforts import resolve_effort
from maskaq_brevitas.config.mapping import from_mapping
from maskaq_brevitas.config.mapping import scheme_of_run
from maskaq_brevitas.config.mapping import to_mapping
from maskaq_brevitas.config.scheme import SCHEME_NAMES
from maskaq_brevitas.config.scheme import LayerBits
from maskaq_brevitas.config.scheme import Scheme
from maskaq_brevitas.config.scheme import parse_bits
from maskaq_brevitas.config.scheme import resolve_scheme
from maskaq_brevitas.config.synthesis import AttentionKind
from maskaq_brevitas.config.synthesis import SynthesisConfig
from maskaq_brevitas.config.tuning import DistillConfig
from maskaq_brevitas.config.tuning import ReconstructConfig
from maskaq_brevitas.config.tuning import TuningConfig

__all__ = [
    "AttentionKind",
    "DistillConfig",
    "EFFORTS",
    "Effort",
    "EffortName",
    "LayerBits",
    "ReconstructConfig",
    "SCHEME_NAMES",
    "Scheme",
    "SynthesisConfig",
    "TuningConfig",
    "from_mapping",
    "parse_bits",
    "resolve_effort",
    "resolve_scheme",
    "scheme_of_run",
    "to_mapping",
]
