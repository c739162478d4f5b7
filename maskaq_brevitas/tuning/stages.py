"""The stages of a tuning: one configuration or several that follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from typing import TypeVar

import torch
from torch import nn

from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import Effort
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import TuningConfig
from maskaq_brevitas.config import to_mapping
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.models.families import block_names
from maskaq_brevitas.models.families import features_behind
from maskaq_brevitas.models.families import has_classes
from maskaq_brevitas.models.token_choice import why_all_tokens
from maskaq_brevitas.modes import fitting_precision

__all__ = ["STAGE_NAMES", "check_tuning", "described_tuning", "fitting_effort", "tuning_stages", "with_precision"]

AnyConfig = TypeVar("AnyConfig", bound=SynthesisConfig | TuningConfig)

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


def fitting_effort(effort: Effort, *models: nn.Module) -> Effort:
    """An effort with all tokens where a model needs all; and with the terms of attention, and a third of the images,
    where no class shapes images without them.

    Args:
        effort: named by the user, who may not know that.
        models: the float model, and a quant model if it was given.
    """
    count, synthesis, tuning = effort.num_images, effort.synthesis, effort.tuning
    if any(why_all_tokens(model) for model in models):
        synthesis = replace(synthesis, kept_tokens=1.0)
        tuning = None if tuning is None else replace(tuning, kept_tokens=1.0)
    if not has_classes(models[0]) and not synthesis.head_weight:
        count //= 3
        usual = SynthesisConfig()
        synthesis = replace(
            synthesis, head_weight=usual.head_weight, entropy_weight=usual.entropy_weight,
            align_weight=usual.align_weight,
        )  # fmt: skip
    return replace(effort, num_images=count, synthesis=synthesis, tuning=tuning)


def with_precision(config: AnyConfig, device: torch.device) -> AnyConfig:
    """``config`` with the arithmetic that ``precision="auto"`` means on a device."""
    if isinstance(config, ReconstructConfig):
        return config
    return replace(config, precision=fitting_precision(config.precision, device))


def described_tuning(tunings: tuple[TuningConfig, ...]) -> dict[str, Any]:
    """The stages of tuning as plain values; the differing keys of two runs name stage and option."""
    return {f"{index}-{_KINDS[type(config)]}": to_mapping(config) for index, config in enumerate(tunings)}
