"""The stages of a tuning: one configuration or several that follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import TuningConfig
from maskaq_brevitas.config import to_mapping
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.models.families import block_names
from maskaq_brevitas.models.families import features_behind
from maskaq_brevitas.models.token_choice import why_all_tokens

__all__ = ["STAGE_NAMES", "check_tuning", "described_tuning", "fitting_tuning", "tuning_stages"]

_KINDS: dict[type, str] = {DistillConfig: "distill", ReconstructConfig: "reconstruct"}
#: What reports call a stage, by its configuration.
STAGE_NAMES: dict[type, str] = {
    DistillConfig: "distillation, its refreshes included", ReconstructConfig: "reconstruction"
}  # fmt: skip


def tuning_stages(tuning: TuningConfig | Sequence[TuningConfig] | None) -> tuple[TuningConfig, ...]:
    """The stages of tuning, in order.

    Raises:
        ConfigurationError: if one of them is no tuning configuration.
    """
    if tuning is None:
        return ()
    found = (tuning,) if isinstance(tuning, (DistillConfig, ReconstructConfig)) else tuple(tuning)
    for config in found:
        if type(config) not in _KINDS:
            raise ConfigurationError(f"tuning: expected DistillConfig or ReconstructConfig, got {config!r}.")
    return found


def check_tuning(tunings: tuple[TuningConfig, ...], float_model: nn.Module, quant_model: nn.Module) -> None:
    """Refuse what a model cannot be tuned by.

    Raises:
        ModelError: if blocks or last features are asked for and the model does not name them.
    """
    blocks = last = False
    for config in tunings:
        if isinstance(config, ReconstructConfig):
            blocks, last = True, last or config.feature_weight > 0
        else:
            last = last or config.last_feature_weight > 0
            blocks = blocks or last or config.feature_weight > 0
    if blocks:
        block_names(quant_model)
    if last:
        features_behind(float_model, block_names(float_model)[-1])


def fitting_tuning(tuning: DistillConfig | None, model: nn.Module) -> DistillConfig | None:
    """The tuning of an effort, with all tokens where the model needs all."""
    return replace(tuning, kept_tokens=1.0) if tuning is not None and why_all_tokens(model) else tuning


def described_tuning(tunings: tuple[TuningConfig, ...]) -> dict[str, Any]:
    """The stages of tuning as plain values; the differing keys of two runs name stage and option."""
    return {f"{index}-{_KINDS[type(config)]}": to_mapping(config) for index, config in enumerate(tunings)}
