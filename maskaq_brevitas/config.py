"""Frozen configuration: quantization schemes, synthesis and run options. Nothing here imports torch.

Every class checks its values on construction and refuses unknown keys, so that a typing error in a YAML file is an
error and not a default.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from maskaq_brevitas.errors import ConfigurationError

__all__ = [
    "AttentionKind",
    "DistillConfig",
    "LayerBits",
    "ReconstructConfig",
    "SCHEME_NAMES",
    "Scheme",
    "SynthesisConfig",
    "TuningConfig",
    "from_mapping",
    "parse_bits",
    "resolve_scheme",
    "to_mapping",
]

AttentionKind = Literal["logits", "raw_logits", "probabilities"]

#: The schemes that the documentation measures. Any ``wXaY`` with 2 <= X, Y <= 8 is accepted as well.
SCHEME_NAMES = ("w8a8", "w6a6", "w5a5", "w4a8", "w4a4", "w3a3")

_BITS = re.compile(r"w([2-8])a([2-8])")
_Config = TypeVar("_Config")


@dataclass(frozen=True)
class LayerBits:
    """Bit widths of one layer: ``weight`` (bits) and ``activation`` (bits)."""

    weight: int
    activation: int

    def __post_init__(self) -> None:
        _check_at_least("LayerBits.weight", self.weight, 1)
        _check_at_least("LayerBits.activation", self.activation, 1)

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


def parse_bits(text: str) -> LayerBits:
    """Bit widths written as ``wXaY``, for example ``"w4a8"``.

    Raises:
        ConfigurationError: if ``text`` is not of that form or a width is not in 2..8.
    """
    match = _BITS.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigurationError(
            f"Expected bit widths of the form wXaY with 2 <= X, Y <= 8 (for example 'w4a8'), got {text!r}."
        )
    return LayerBits(int(match[1]), int(match[2]))


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a model is quantized: bit widths per kind of layer, and the kind of quantizer where there is a choice.

    Use :func:`resolve_scheme` for the named ones; ``dataclasses.replace`` changes a detail.

    Attributes:
        name: what reports call it.
        bits: nominal widths of all linear layers and of the matmul operands query, key and value (activation width).
        patch_embed: widths of the patch embedding (weight, and the image at its input).
        head: widths of the classifier.
        probability_bits: width of the attention probabilities. ``None`` means the nominal activation width.
        weight_range: ``"minmax"`` (largest absolute value of the channel) or ``"mse"`` (grid search per channel).
        activation_range: ``"percentile"`` (99.999 %), ``"minmax"``, ``"mse"`` (Brevitas' grid search per batch,
            averaged), or ``"search"``: min-max, then shrunk to the least error of the layer's output, token by token
            (:mod:`maskaq_brevitas.tuning.ranges`).
        gelu: quantizer behind the MLP's activation function: ``"asymmetric"`` (unsigned with a zero point) or
            ``"signed"`` (zero point 0, as FINN wants).
        softmax: ``"unsigned"`` or ``"signed"`` (half of the codes unused, as FINN wants).
        equalize: range of the channels of LayerNorm outputs and MLP hidden units before they are quantized:
            ``True`` shifts and scales every channel to one common symmetric range and folds the inverse into the
            next weight (and, for a LayerNorm, into its affine part), so that the graph keeps per-tensor quantizers.
    """

    name: str
    bits: LayerBits
    patch_embed: LayerBits
    head: LayerBits
    probability_bits: int | None = None
    weight_range: Literal["minmax", "mse"] = "mse"
    activation_range: Literal["percentile", "minmax", "mse", "search"] = "search"
    gelu: Literal["asymmetric", "signed"] = "asymmetric"
    softmax: Literal["unsigned", "signed"] = "unsigned"
    equalize: bool = True

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("patch_embed", self.patch_embed), ("head", self.head)):
            if not isinstance(bits, LayerBits):
                raise ConfigurationError(f"Scheme.{name}: expected LayerBits(weight, activation), got {bits!r}.")
            if not (2 <= bits.weight <= 8 and 2 <= bits.activation <= 8):
                raise ConfigurationError(f"Scheme.{name}: expected widths from 2 to 8 bits, got {bits}.")
        if self.probability_bits is not None:
            _check_at_least("Scheme.probability_bits", self.probability_bits, 2)
            if self.probability_bits > 8:
                raise ConfigurationError(
                    f"Scheme.probability_bits: expected 2 to 8 bits or None, got {self.probability_bits}."
                )
        _check_choice("weight_range", self.weight_range, ("minmax", "mse"))
        _check_choice("activation_range", self.activation_range, ("percentile", "minmax", "mse", "search"))
        _check_choice("gelu", self.gelu, ("asymmetric", "signed"))
        _check_choice("softmax", self.softmax, ("unsigned", "signed"))
        _check_bool("equalize", self.equalize)

    @property
    def resolved_probability_bits(self) -> int:
        """Width of the attention probabilities, in bits."""
        return self.bits.activation if self.probability_bits is None else self.probability_bits


def resolve_scheme(scheme: str | Scheme) -> Scheme:
    """The scheme of a name.

    ``wXaY`` keeps patch embedding, head and attention probabilities at 8 bits (comparable with FIMA-Q and GLF-Q, which
    keep the first and last layer at 8; the probabilities are ours, and reports name them). ``strict-wXaY`` puts every
    layer and operand at the nominal widths (comparable with MaskAQ's table).

    Args:
        scheme: ``"wXaY"`` or ``"strict-wXaY"`` with 2 <= X, Y <= 8, or a :class:`Scheme`, which is returned as it is.

    Raises:
        ConfigurationError: for any other text.

    >>> resolve_scheme("w4a4").head
    LayerBits(weight=8, activation=8)
    >>> resolve_scheme("strict-w4a4").head
    LayerBits(weight=4, activation=4)
    """
    if isinstance(scheme, Scheme):
        return scheme
    strict = isinstance(scheme, str) and scheme.startswith("strict-")
    try:
        bits = parse_bits(scheme.removeprefix("strict-"))
    except (AttributeError, ConfigurationError):
        raise ConfigurationError(
            f"Unknown scheme {scheme!r}. Expected wXaY or strict-wXaY with 2 <= X, Y <= 8, "
            f"for example {', '.join(SCHEME_NAMES)}."
        ) from None
    outer = bits if strict else LayerBits(8, 8)
    return Scheme(
        name=scheme, bits=bits, patch_embed=outer, head=outer, probability_bits=None if strict else 8
    )


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
        init: ``"gaussian"`` (white, per pixel) or ``"low_frequency"`` (1/f amplitude spectrum, as natural images have).
        parameterization: what the optimiser turns: ``"pixel"`` (METHOD.md) or ``"spectrum"`` (1/f-weighted Fourier
            coefficients on decorrelated colour axes).
        head_weight, class_weight, tv_weight, align_weight, entropy_weight: coefficients of the five terms. The published
            0.1 for alignment belongs to q k^T; our logits are smaller by sqrt(d) (8 for ViT-Tiny), so 1 is its equivalent.
        tv_norm: ``"l2"`` (METHOD.md: 2-norms of the differences, per image) or ``"l1"`` (mean absolute difference,
            which keeps acting on small differences).
        head_attention, entropy_attention, align_attention, mask_attention: which attention each term reads.
            ``"logits"`` are q k^T / sqrt(d); ``"raw_logits"`` are q k^T; ``"probabilities"`` are after softmax. Measured on
            ViT-Tiny (32 images, 100 steps, one seed; KL divergence from the float model in nats at w4a8 / w6a6 / w4a4, on
            crops of the photographs shipped with scikit-image): logits everywhere 0.85 / 0.72 / 3.30; raw logits, with
            alignment at 0.1, 0.82 / 0.66 / 3.38; probabilities for head and entropy 0.80 / 0.80 / 2.97; probabilities for
            the mask 0.85 / 0.72 / 3.06. No choice wins at all widths, so the default stays with the published kind.
        entropy_rows: rows of attention sampled per image and layer for the entropy term; ``None`` takes all.
        mask_per_layer: one informative-region mask per layer instead of one for all. Measured as above: 0.91 / 0.65 / 3.01
            against 0.85 / 0.72 / 3.30 of one mask.
        mask_start, mask_end: share of patches that count as informative at the first and last iteration (linear).
        mask_drop: share of the selected patches dropped at random in each iteration.
        mask_enabled: ``False`` aligns all patches.
        jitter: the image is rolled by up to this many pixels in each direction, first half of the run; pixels of an
            image whose shorter side is 224, scaled to the model's size.
        late_jitter: the same, second half.
        flip: random horizontal flip in each iteration. Off: a mirrored digit or letter is another one.
        colour_shift, colour_scale: strength of the random per-channel shift (decays to 0 over the run) and of the
            scale, in units of the normalised image.
        precision: arithmetic of the two networks; images and losses stay in float32.
        max_redraws: how often an image whose objective is not finite is drawn again before synthesis gives up.
    """

    steps: int = 100
    warmup_steps: int | None = None
    batch_size: int = 16
    learning_rate: float = 0.05
    final_learning_rate: float = 1e-3
    init: Literal["gaussian", "low_frequency"] = "low_frequency"
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
    entropy_rows: int | None = None
    mask_per_layer: bool = False
    mask_start: float = 0.5
    mask_end: float = 0.1
    mask_drop: float = 0.3
    mask_enabled: bool = True
    jitter: int = 8
    late_jitter: int = 16
    flip: bool = False
    colour_shift: float = 0.5
    colour_scale: float = 0.1
    precision: Literal["float32", "bfloat16"] = "float32"
    max_redraws: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("jitter", "late_jitter", "max_redraws"):
            _check_at_least(name, getattr(self, name), 0)
        for name in ("warmup_steps", "entropy_rows"):
            if getattr(self, name) is not None:
                _check_at_least(name, getattr(self, name), 2 if name == "entropy_rows" else 1)
        for name in ("learning_rate", "final_learning_rate"):
            if not _number(getattr(self, name)) > 0:
                raise ConfigurationError(f"{name}: expected a positive number, got {getattr(self, name)!r}.")
        for name in ("mask_start", "mask_end"):
            if not 0 < _number(getattr(self, name)) <= 1:
                raise ConfigurationError(f"{name}: expected a share in (0, 1], got {getattr(self, name)!r}.")
        if not 0 <= _number(self.mask_drop) < 1:
            raise ConfigurationError(f"mask_drop: expected a share in [0, 1), got {self.mask_drop!r}.")
        for name in ("colour_shift", "colour_scale") + tuple(_TERM_WEIGHTS):
            if not _number(getattr(self, name)) >= 0:
                raise ConfigurationError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}.")
        if not any(getattr(self, name) > 0 for name in _TERM_WEIGHTS if name != "align_weight"):
            raise ConfigurationError(
                "Expected at least one of head_weight, class_weight, tv_weight and entropy_weight above 0: without them "
                "nothing shapes the images."
            )
        for name in ("mask_per_layer", "mask_enabled", "flip"):
            _check_bool(name, getattr(self, name))
        for name in ("head_attention", "entropy_attention", "align_attention", "mask_attention"):
            _check_choice(name, getattr(self, name), ("logits", "raw_logits", "probabilities"))
        _check_choice("init", self.init, ("gaussian", "low_frequency"))
        _check_choice("parameterization", self.parameterization, ("pixel", "spectrum"))
        _check_choice("tv_norm", self.tv_norm, ("l2", "l1"))
        _check_choice("precision", self.precision, ("float32", "bfloat16"))

    @classmethod
    def published(cls, **changes: Any) -> SynthesisConfig:
        """METHOD.md's published values: raw logits, 2,000 steps, Gaussian start, l2 total variation.

        The published total variation spans a batch of 16; ours is a mean over images of per-image norms, so the
        coefficient is 2.5e-5 * sqrt(16) (METHOD.md, section 2).
        """
        values: dict[str, Any] = dict(
            steps=2000, batch_size=16, learning_rate=0.1, final_learning_rate=1e-3, init="gaussian",
            parameterization="pixel", head_weight=1.0, class_weight=1.0, tv_weight=2.5e-5 * 4, align_weight=0.1, entropy_weight=1.0,
            tv_norm="l2", head_attention="raw_logits", entropy_attention="raw_logits", align_attention="raw_logits",
            mask_attention="raw_logits", entropy_rows=64, mask_per_layer=False, mask_start=0.5, mask_end=0.1,
            mask_drop=0.3, mask_enabled=True, jitter=8, late_jitter=16, flip=False, precision="float32",
        )  # fmt: skip
        return cls(**{**values, **changes})

    @property
    def resolved_warmup_steps(self) -> int:
        """Iterations of the provisional batch."""
        return max(1, self.steps // 4) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How the quantized model is tuned on the images, with the float model as teacher (METHOD.md, section 3).

    ``DistillConfig()`` holds our defaults; :meth:`published` the paper's and its code's. No label enters the loss. The
    default rates were chosen by the held-back loss at w4a4, one seed: on ``digits_vit`` (64 synthetic images, 15 epochs,
    ``learning_rate=1e-4``) 0.47, against 0.70 with a ``scale_learning_rate`` of 1e-3 and 0.71 with fixed scales; on
    ViT-Tiny (56 synthetic images, 12 epochs) 5.15 with ``learning_rate=1e-4``, against 5.25 with 3e-4 (7.49 untuned).

    Attributes:
        epochs: passes over the pool.
        refresh_every: epochs between refreshes of the images; ``None`` never refreshes.
        refresh_share: of the pool that a refresh replaces, in (0, 1].
        refresh_steps: iterations of a refresh; ``None`` means a quarter of the synthesis' from images, all from noise.
        refresh_start: ``"images"`` continues from the present images, ``"noise"`` begins anew.
        batch_size: images per step.
        optimizer: ``"adamw"`` or ``"sgd"`` (Nesterov if ``momentum`` is above 0).
        learning_rate: of weights, biases and LayerNorms at the first step.
        final_learning_rate: at the last step (cosine schedule; the scales' rate falls by the same ratio).
        scale_learning_rate: of the scales of activations and weights, in units of each scale's own value at the start
            (Brevitas does not divide their gradients as LSQ does). 0 leaves them as calibrated.
        momentum: of SGD.
        weight_decay: of the weights.
        max_gradient_norm: the gradient of all parameters together is scaled down to this 2-norm; ``None`` leaves it.
        temperature: T of the divergence of the outputs.
        distance_weight: c, the coefficient of the context distance; 0 leaves it out.
        include_prefix: whether prefix tokens (the class token) count in the context distance. On ``digits_vit`` at w4a4
            (64 images, 15 epochs, one seed) it changed top-1 by one test image of 599.
        augment: ``"none"``; ``"light"`` (random resized crop of at least 70 % of the area); ``"published"`` (random
            resized crop, flip, colour jitter, grayscale, blur).
        precision: arithmetic of the two networks; losses and optimiser stay in float32.
    """

    epochs: int = 20
    refresh_every: int | None = 5
    refresh_share: float = 1.0
    refresh_steps: int | None = None
    refresh_start: Literal["images", "noise"] = "images"
    batch_size: int = 16
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-6
    scale_learning_rate: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_gradient_norm: float | None = 1.0
    temperature: float = 5.0
    distance_weight: float = 10.0
    include_prefix: bool = False
    augment: Literal["none", "light", "published"] = "light"
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("refresh_every", "refresh_steps"):
            if getattr(self, name) is not None:
                _check_at_least(name, getattr(self, name), 1)
        if not 0 < _number(self.refresh_share) <= 1:
            raise ConfigurationError(f"refresh_share: expected a share in (0, 1], got {self.refresh_share!r}.")
        for name in ("learning_rate", "final_learning_rate", "temperature"):
            if not _number(getattr(self, name)) > 0:
                raise ConfigurationError(f"{name}: expected a positive number, got {getattr(self, name)!r}.")
        if self.final_learning_rate > self.learning_rate:
            raise ConfigurationError(
                f"final_learning_rate: expected at most learning_rate ({self.learning_rate}), got "
                f"{self.final_learning_rate}."
            )
        for name in ("scale_learning_rate", "weight_decay", "distance_weight"):
            if not _number(getattr(self, name)) >= 0:
                raise ConfigurationError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}.")
        if not 0 <= _number(self.momentum) < 1:
            raise ConfigurationError(f"momentum: expected a number in [0, 1), got {self.momentum!r}.")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ConfigurationError(
                f"max_gradient_norm: expected a positive number or None, got {self.max_gradient_norm!r}."
            )
        _check_choice("refresh_start", self.refresh_start, ("images", "noise"))
        _check_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        _check_choice("augment", self.augment, ("none", "light", "published"))
        _check_choice("precision", self.precision, ("float32", "bfloat16"))

    @classmethod
    def published(cls, **changes: Any) -> DistillConfig:
        """METHOD.md's published values: SGD, 100 epochs, all images made again from noise every 30.

        Scales had the rate of the weights there; ours keep their own (see ``scale_learning_rate``). The published code
        does not clip gradients.
        """
        values: dict[str, Any] = dict(
            epochs=100, refresh_every=30, refresh_share=1.0, refresh_steps=None, refresh_start="noise", batch_size=16,
            optimizer="sgd", learning_rate=1e-3, final_learning_rate=1e-5, momentum=0.9, weight_decay=0.0,
            max_gradient_norm=None, temperature=5.0, distance_weight=10.0, augment="published", precision="float32",
        )  # fmt: skip
        return cls(**{**values, **changes})


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """How blocks are reconstructed (:mod:`maskaq_brevitas.tuning.reconstruct`).

    Attributes:
        steps: iterations per block.
        batch_size: images per iteration.
        learning_rate: of Adam for weights and biases, at the first iteration (cosine to 0).
        scale_learning_rate: of scales, as a share of each scale.
        drop: probability that an element of a quantized activation stays float in an iteration (QDrop).
        feature_weight: coefficient of the error of the model's last features, reached through the float blocks behind
            (GLF-Q); the block's own error has 1. Each is divided by its first value. 0 saves the blocks behind.
        rounding: ``"straight-through"`` (weights move, rounding passes the gradient) or ``"learned"`` (AdaRound: each
            weight may round up or down; Brevitas' learned round).
        informative_weight: weight of a token among the informative patches of its image in the block's error; the
            others, prefix tokens included, have 1.
        variants: how many variants of each image are trained on, itself included: crops, mirror images, mixtures.
        cache_mib: block inputs and targets above this size (MiB) lie in a temporary file instead of in memory.
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 2e-4
    scale_learning_rate: float = 1e-2
    drop: float = 0.25
    feature_weight: float = 0.0
    rounding: Literal["straight-through", "learned"] = "straight-through"
    informative_weight: float = 1.0
    variants: int = 1
    cache_mib: int = 4096

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "variants"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("cache_mib", self.cache_mib, 0)
        for name in ("learning_rate", "scale_learning_rate", "feature_weight"):
            if not _number(getattr(self, name)) >= 0:
                raise ConfigurationError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}.")
        if not _number(self.informative_weight) > 0:
            raise ConfigurationError(f"informative_weight: expected a positive number, got {self.informative_weight!r}.")
        if not 0 <= _number(self.drop) < 1:
            raise ConfigurationError(f"drop: expected a share in [0, 1), got {self.drop!r}.")
        _check_choice("rounding", self.rounding, ("straight-through", "learned"))


#: One way to tune a quant model; several are carried out one after another.
TuningConfig = DistillConfig | ReconstructConfig


_TERM_WEIGHTS = ("head_weight", "class_weight", "tv_weight", "align_weight", "entropy_weight")


def to_mapping(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries, numbers and strings, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def from_mapping(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
    """The configuration ``cls`` from a mapping, for example one that was read from YAML.

    Raises:
        ConfigurationError: if a key is unknown (the nearest known key is named) or a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{cls.__name__}: expected a mapping of options, got {type(values).__name__}.")
    known = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    converted = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(known)}."
            raise ConfigurationError(f"{cls.__name__}: unknown key {key!r}.{hint}")
        if str(known[key].type).startswith("LayerBits") and isinstance(value, Mapping):
            value = from_mapping(LayerBits, value)
        converted[key] = value
    try:
        return cls(**converted)
    except TypeError as error:
        raise ConfigurationError(f"{cls.__name__}: {error}") from error


def _check_at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name}: expected a whole number >= {least}, got {value!r}.")


def _number(value: Any) -> float:
    """``value`` if it is a finite number; else NaN, which passes no comparison. (PyYAML reads 1e-4 as text.)"""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else math.nan


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}: expected true or false, got {value!r}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name}: expected one of {', '.join(choices)}, got {value!r}.")
