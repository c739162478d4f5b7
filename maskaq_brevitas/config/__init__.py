"""Frozen configuration: quantization schemes, synthesis and tuning. Nothing here imports torch.

Every class checks its values on construction and refuses unknown keys, so that a typing error in a YAML file is an
error and not a default.
"""

from maskaq_brevitas.config.efforts import EFFORTS, Effort, EffortName, resolve_effort
from maskaq_brevitas.config.mapping import from_mapping, to_mapping
from maskaq_brevitas.config.scheme import SCHEME_NAMES, LayerBits, Scheme, parse_bits, resolve_scheme
from maskaq_brevitas.config.synthesis import AttentionKind, SynthesisConfig
from maskaq_brevitas.config.tuning import DistillConfig, ReconstructConfig, TuningConfig

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
    "to_mapping",
]
