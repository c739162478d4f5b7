"""How images are synthesised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from typing import Literal

from maskaq_brevitas.config.checks import check_at_least
from maskaq_brevitas.config.checks import check_bool
from maskaq_brevitas.config.checks import check_choice
from maskaq_brevitas.config.checks import finite_number
from maskaq_brevitas.errors import ConfigurationError

__all__ = ["AttentionKind", "SynthesisConfig"]

AttentionKind = Literal["logits", "raw_logits", "probabilities"]

_TERM_WEIGHTS = ("head_weight", "class_weight", "tv_weight", "align_weight", "entropy_weight")


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """How images are synthesised (METHOD.md, section 2).

    ``SynthesisConfig()`` holds our defaults; :meth:`published` the paper's and its code's.

    Attributes:
        steps: iterations per batch of images.
        warmup_steps: iterations of the one provisional batch on which an uncalibrated quantized model gets the first
            scales that the alignment term needs. ``None`` means a quarter of ``steps``. Final scales are set on
            finished images.
        batch_size: images optimised together.
        learning_rate: of AdamW at the first iteration, in units of the normalised image.
        final_learning_rate: at the last iteration (cosine schedule).
        procedural_share: share of the images that are not optimised but drawn
            (:mod:`maskaq_brevitas.synthesis.scenes`), whose statistics are nearer to photographs. They cost no
            iterations. ViT-Tiny, w4a4, calibrated on 288 images that were optimised from low frequencies and 96 drawn
            ones, KL divergence from the float model in nats on 416 crops of photographs from Python packages: scenes
            1.40, dead leaves and shaded shapes 1.49. Drawn images alone teach less: after 200 steps of distillation
            1.48 against 1.29.
        init: ``"gaussian"`` (white, per pixel), ``"low_frequency"`` (1/f amplitude spectrum, as natural images have),
            ``"dead_leaves"`` (edges and flat regions too) or ``"scenes"``. Measured as above after 200 steps of
            distillation, scenes among the drawn images: started from low frequencies 1.10 (384 images, 50 iterations,
            all terms), from scenes 1.05 (160 images, 25 iterations, class and total variation alone).
        start_views: each label of a batch starts from what the float model takes for it most, among the starting images
            of the batch and this many random parts of each; ``None``: from any of them. Not for a model without
            classes. ViT-Tiny, half of the patches, 30 iterations, the objective of the finished images over four sets
            of 16 labels: 3.08 +- 0.40 with 3, 3.72 +- 0.67 without, for a twelfth more time.
        parameterization: what the optimiser turns: ``"pixel"`` (METHOD.md) or ``"spectrum"`` (1/f-weighted Fourier
            coefficients on decorrelated colour axes).
        head_weight, class_weight, tv_weight, align_weight, entropy_weight: coefficients of the five terms. Of a model
            without classes, class_weight is that of the distance of both networks' features. The published 0.1 for
            alignment belongs to q k^T; our logits are smaller by sqrt(d) (8 for ViT-Tiny), so 1 is its equivalent.
        tv_norm: ``"l2"`` (METHOD.md: 2-norms of the differences, per image) or ``"l1"`` (mean absolute difference,
            which keeps acting on small differences).
        head_attention, entropy_attention, align_attention, mask_attention: which attention each term reads.
            ``"logits"`` are q k^T / sqrt(d); ``"raw_logits"`` are q k^T; ``"probabilities"`` are after softmax.
            Measured on ViT-Tiny (32 images, 100 steps, one seed; KL divergence from the float model in nats at w4a8 /
            w6a6 / w4a4, on crops of the photographs shipped with scikit-image): logits everywhere 0.85 / 0.72 / 3.30;
            raw logits, with alignment at 0.1, 0.82 / 0.66 / 3.38; probabilities for head and entropy 0.80 / 0.80 /
            2.97; probabilities for the mask 0.85 / 0.72 / 3.06. No choice wins at all widths, so the default stays with
            the published kind.
        align_every: iterations from one pass through the quantized model to the next. The gradient of the alignment is
            taken that many times then, so that it weighs the same over a run; the float model's terms are taken in
            every iteration. The first and the last iteration have it in any case, and so has every iteration for a
            model without classes, whose features the quantized model has to meet. ViT-Tiny, 16 images of 30
            iterations, the objective of the finished images over three seeds: 2.94 +- 0.42 with 1, 2.99 +- 0.43 with 6,
            which is 1.8 times as fast (``examples/benchmarks/levers.py`` and ``speed.py``).
        entropy_rows: rows of attention sampled in each iteration for the entropy term; ``None`` takes all.
        head_rows: the same for the head coherence term.
        mask_per_layer: one informative-region mask per layer instead of one for all. Measured as above: 0.91 / 0.65 /
            3.01 against 0.85 / 0.72 / 3.30 of one mask.
        mask_start, mask_end: share of patches that count as informative at the first and last iteration (linear).
        mask_drop: share of the selected patches dropped at random in each iteration.
        mask_enabled: ``False`` aligns all patches.
        kept_tokens: share of the patches that both networks still see at the end: those that receive least attention
            are dropped in four cuts before 40 % of the iterations (sparse inversion), and an iteration costs less and
            less. What they show is then shaped by total variation alone. 1 drops none.
        view_area: below 1, each iteration shows the networks a part of the image, turned a little, at full size: this
            share of its area or more, drawn for each image (sides that would leave the image are cut, so above 0.75 a
            part may be smaller). What is recognised then has the size of an object, not of a texture (the
            transformations of Olah, Mordvintsev, Schubert: Feature Visualization, 2017). Nothing is rolled then
            (``jitter`` and ``late_jitter`` do not count), and ``kept_tokens`` drops patches at random, others in each
            iteration. Such images look better and taught less: ViT-Tiny at w3a3, 384 images of 30 iterations by class
            and total variation, 300 steps of distillation, divergence on crops of foolbox's photographs in nats 3.58
            (0.25, at a ``learning_rate`` of 0.1), without views 2.88 (at 0.05); one run each.
        view_turn: largest angle of such a part, in degrees.
        jitter: the image is rolled by up to this many pixels in each direction, first half of the run; pixels of an
            image whose shorter side is 224, scaled to the model's size.
        late_jitter: the same, second half.
        flip: random horizontal flip in each iteration (of all images; with ``view_area``, of each by itself). Off: a
            mirrored digit or letter is another one.
        colour_shift, colour_scale: strength of the random per-channel shift (decays to 0 over the run) and of the
            scale, in units of the normalised image.
        precision: arithmetic of the two networks; images and losses stay in float32. ``"auto"``: bfloat16 where the
            hardware multiplies in it.
        memory_mib: what autograd may keep of the two networks at once, in MiB: a batch passes through them in parts
            that fit, for the same gradient. ``None``: 640 on a CPU (larger parts are not faster there), half of the
            free memory on a GPU.
        max_redraws: how often an image whose objective is not finite is drawn again before synthesis gives up.
    """

    steps: int = 100
    warmup_steps: int | None = None
    batch_size: int = 16
    procedural_share: float = 0.5
    learning_rate: float = 0.05
    final_learning_rate: float = 1e-3
    init: Literal["gaussian", "low_frequency", "dead_leaves", "scenes"] = "scenes"
    start_views: int | None = None
    parameterization: Literal["pixel", "spectrum"] = "spectrum"
    head_weight: float = 1.0
    class_weight: float = 1.0
    tv_weight: float = 8.0
    align_weight: float = 1.0
    entropy_weight: float = 1.0
    tv_norm: Literal["l2", "l1"] = "l1"
    head_attention: AttentionKind = "logits"
    entropy_attention: AttentionKind = "logits"
    align_attention: AttentionKind = "logits"
    mask_attention: AttentionKind = "logits"
    align_every: int = 1
    entropy_rows: int | None = 64
    head_rows: int | None = 64
    mask_per_layer: bool = False
    mask_start: float = 0.5
    mask_end: float = 0.1
    mask_drop: float = 0.3
    mask_enabled: bool = True
    kept_tokens: float = 1.0
    view_area: float = 1.0
    view_turn: float = 10.0
    jitter: int = 8
    late_jitter: int = 16
    flip: bool = False
    colour_shift: float = 0.5
    colour_scale: float = 0.1
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    memory_mib: int | None = None
    max_redraws: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "align_every"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("jitter", "late_jitter", "max_redraws"):
            check_at_least(name, getattr(self, name), 0)
        for name, least in (
            ("warmup_steps", 1), ("entropy_rows", 2), ("head_rows", 1), ("memory_mib", 1), ("start_views", 0)
        ):  # fmt: skip
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), least)
        for name in ("learning_rate", "final_learning_rate"):
            if not finite_number(getattr(self, name)) > 0:
                raise ConfigurationError(f"{name}: expected a positive number, got {getattr(self, name)!r}.")
        for name in ("mask_start", "mask_end", "kept_tokens", "view_area"):
            if not 0 < finite_number(getattr(self, name)) <= 1:
                raise ConfigurationError(f"{name}: expected a share in (0, 1], got {getattr(self, name)!r}.")
        for name in ("mask_drop", "procedural_share"):
            if not 0 <= finite_number(getattr(self, name)) < 1:
                raise ConfigurationError(f"{name}: expected a share in [0, 1), got {getattr(self, name)!r}.")
        for name in ("colour_shift", "colour_scale", "view_turn") + tuple(_TERM_WEIGHTS):
            if not finite_number(getattr(self, name)) >= 0:
                raise ConfigurationError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}.")
        if not any(getattr(self, name) > 0 for name in _TERM_WEIGHTS if name != "align_weight"):
            raise ConfigurationError(
                "Expected at least one of head_weight, class_weight, tv_weight and entropy_weight above 0: without "
                "them nothing shapes the images."
            )
        for name in ("mask_per_layer", "mask_enabled", "flip"):
            check_bool(name, getattr(self, name))
        for name in ("head_attention", "entropy_attention", "align_attention", "mask_attention"):
            check_choice(name, getattr(self, name), ("logits", "raw_logits", "probabilities"))
        check_choice("init", self.init, ("gaussian", "low_frequency", "dead_leaves", "scenes"))
        check_choice("parameterization", self.parameterization, ("pixel", "spectrum"))
        check_choice("tv_norm", self.tv_norm, ("l2", "l1"))
        check_choice("precision", self.precision, ("float32", "bfloat16", "auto"))

    @classmethod
    def published(cls, **changes: Any) -> SynthesisConfig:
        """METHOD.md's published values: raw logits, 2,000 steps, Gaussian start, l2 total variation.

        The published total variation spans a batch of 16; ours is a mean over images of per-image norms, so the
        coefficient is 2.5e-5 * sqrt(16) (METHOD.md, section 2).
        """
        values: dict[str, Any] = dict(
            steps=2000, batch_size=16, procedural_share=0.0, learning_rate=0.1, final_learning_rate=1e-3,
            init="gaussian",
            parameterization="pixel", head_weight=1.0, class_weight=1.0, tv_weight=2.5e-5 * 4, align_weight=0.1,
            entropy_weight=1.0,
            tv_norm="l2", head_attention="raw_logits", entropy_attention="raw_logits", align_attention="raw_logits",
            mask_attention="raw_logits", entropy_rows=64, head_rows=None, mask_per_layer=False, mask_start=0.5,
            mask_end=0.1,
            mask_drop=0.3, mask_enabled=True, jitter=8, late_jitter=16, flip=False, precision="float32",
        )  # fmt: skip
        return cls(**{**values, **changes})

    @property
    def resolved_warmup_steps(self) -> int:
        """Iterations of the provisional batch."""
        return max(1, self.steps // 4) if self.warmup_steps is None else self.warmup_steps
