"""How much work a run is worth: images, iterations and tuning under one name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from typing import Literal

from maskaq_brevitas.config.checks import check_choice
from maskaq_brevitas.config.synthesis import SynthesisConfig
from maskaq_brevitas.config.tuning import DistillConfig

__all__ = ["EFFORTS", "Effort", "EffortName", "resolve_effort"]

EffortName = Literal["fast", "default", "best"]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a named effort stands for; README gives its minutes and accuracy.

    Both parts keep all tokens where a model needs all of them, and compute in bfloat16 where the hardware does. A model
    without classes gets its images by all terms.

    Attributes:
        num_images: synthetic images.
        synthesis: how they are made.
        tuning: of the quant model, or None: calibration only.
    """

    num_images: int
    synthesis: SynthesisConfig
    tuning: DistillConfig | None


def _synthesis(**values: Any) -> SynthesisConfig:
    return SynthesisConfig(precision="auto", **values)


def _cheap_synthesis(**values: Any) -> SynthesisConfig:
    """All five terms in a third of the time of the dense step.

    ViT-Tiny, 16 images of 30 iterations, the objective of the finished images over three seeds: 2.94 +- 0.42 dense,
    3.84 +- 0.13 without suited starts, 2.98 +- 0.07 with them. Other ways of dropping patches were no better:
    ``examples/benchmarks/RESULTS.md``, "Speed".
    """
    return _synthesis(kept_tokens=0.5, align_every=6, start_views=3, learning_rate=0.06, **values)


def _distillation(**values: Any) -> DistillConfig:
    """Distillation of block outputs; weights move in units of their own grid.

    ViT-Tiny at w4a4 with all tokens, 120 steps on 256 images, KL divergence on crops of photographs (1.35 before; one
    run each, differences below 0.1 say nothing): a ``scale_learning_rate`` of 1e-3, 5e-3, 1e-2 and 2e-2 gives 1.11,
    0.89, 1.02 and 1.14. On 48 images, ``augment`` as ``light``, ``mixed`` and ``cutmix``: 1.10, 1.04 and 1.01 (on 768,
    ``mixed`` 1.11).
    """
    return DistillConfig(
        steps_per_epoch=50, refresh_every=None, distance_weight=0.0, feature_weight=1.0, temperature=2.0,
        augment="light", learning_rate=4e-5, final_learning_rate=4e-7, weight_learning_rate=2e-3,
        scale_learning_rate=5e-3, precision="auto", **values,
    )  # fmt: skip


#: ``fast`` only calibrates. The others distil the outputs of all blocks, ``default`` on drawn images too. The images of
#: ``best`` are made without the terms of attention, so that there can be more of them in the same time.
EFFORTS: dict[str, Effort] = {
    "fast": Effort(num_images=64, synthesis=_cheap_synthesis(steps=40, procedural_share=0.5), tuning=None),
    "default": Effort(
        num_images=256, synthesis=_cheap_synthesis(steps=30, procedural_share=0.25),
        tuning=_distillation(epochs=16, kept_tokens=0.5, drawn_images=256),
    ),
    "best": Effort(
        num_images=2304, synthesis=_synthesis(
            steps=30, procedural_share=0.33, kept_tokens=0.5, head_weight=0.0, entropy_weight=0.0, align_weight=0.0
        ),
        tuning=_distillation(epochs=32),
    ),
}  # fmt: skip


def resolve_effort(name: EffortName) -> Effort:
    """The effort of a name.

    Raises:
        ConfigurationError: for any other text.

    >>> resolve_effort("fast").tuning is None
    True
    """
    check_choice("effort", name, tuple(EFFORTS))
    return EFFORTS[name]
