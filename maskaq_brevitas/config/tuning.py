"""How a quant model is tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from typing import Literal

from maskaq_brevitas.config.checks import check_at_least
from maskaq_brevitas.config.checks import check_choice
from maskaq_brevitas.config.checks import finite_number
from maskaq_brevitas.errors import ConfigurationError

__all__ = ["DistillConfig", "ReconstructConfig", "TuningConfig"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How the quantized model is tuned on the images, with the float model as teacher (METHOD.md, section 3).

    ``DistillConfig()`` holds our defaults; :meth:`published` the paper's and its code's. No label enters the loss. The
    default rates were chosen by the held-back loss at w4a4, one seed: on ``digits_vit`` (64 synthetic images, 15
    epochs, ``learning_rate=1e-4``) 0.47, against 0.70 with a ``scale_learning_rate`` of 1e-3 and 0.71 with fixed
    scales; on ViT-Tiny (56 synthetic images, 12 epochs) 5.15 with ``learning_rate=1e-4``, against 5.25 with 3e-4 (7.49
    untuned).

    Attributes:
        epochs: passes over the pool, or ``steps_per_epoch`` steps each; the held-back images are measured behind each.
        steps_per_epoch: steps of an epoch; ``None`` means one pass over the pool.
        drawn_images: further images that are drawn for the tuning alone (:mod:`maskaq_brevitas.synthesis.scenes`),
            about 90 ms each at 224 pixels; half of each batch is of them.
        redraw_every: epochs after which others are drawn in their place; ``None``: the same to the end. Pays where many
            CPU threads wait for a GPU.
        refresh_every: epochs between refreshes of the images; ``None`` never refreshes.
        refresh_share: of the pool that a refresh replaces, in (0, 1].
        refresh_steps: iterations of a refresh; ``None`` means a quarter of the synthesis' from images, all from noise.
        refresh_start: ``"images"`` continues from the present images, ``"noise"`` begins anew.
        batch_size: images per step.
        optimizer: ``"adamw"`` or ``"sgd"`` (Nesterov if ``momentum`` is above 0).
        learning_rate: of weights, biases and LayerNorms at the first step.
        final_learning_rate: at the last step (cosine schedule; the scales' rate falls by the same ratio).
        weight_learning_rate: of the quantized weights, in units of the mean step of each weight's grid; ``None``: they
            have ``learning_rate`` like all others.
        scale_learning_rate: of the scales of activations and weights, in units of each scale's own value at the start
            (Brevitas does not divide their gradients as LSQ does). 0 leaves them as calibrated.
        momentum: of SGD.
        weight_decay: of the weights.
        max_gradient_norm: the gradient of all parameters together is scaled down to this 2-norm; ``None`` leaves it.
        kept_tokens: share of the patch tokens that both networks see in a training step, drawn anew for each image.
            Half of them take little more than half the time, and the images vary more.
        drop: probability that a token passes an activation quantizer of fewer than 8 bits unrounded, drawn anew for
            each quantizer in each step (QDrop, :func:`~maskaq_brevitas.quant.trainable.quantization_dropped`). It holds
            for half of the steps, then falls, to 0 at three quarters. ViT-Tiny at w3a3, 256 images, 200 steps, KL
            divergence on 120 crops of 20 photographs: 3.24 nats with 0.5, 3.69 without (paired over photographs, the
            difference is 0.44 +- 0.16; one run each); at w4a4 0.66 and 0.63. At w3a3 a run of
            2,100 steps with it gave 29.5 % top-1, one of 2,400 without, which differed in images, ``augment`` and
            ``precision`` too, 34.2 %.
        temperature: T of the divergence of the outputs.
        distance_weight: c, the coefficient of the context distance; 0 leaves it out.
        feature_weight: coefficient of the error of the blocks' outputs
            (:func:`~maskaq_brevitas.tuning.losses.block_error`, mean over blocks); 0 leaves it out. Unlike the
            divergence of outputs it hardly learns images by heart: in a w3a3 run of 3,400 steps it was 0.47 on images
            trained on and 0.48 on others, the divergence 0.9 and 2.8.
        last_feature_weight: coefficient of the error of the features that the classifier reads
            (:func:`~maskaq_brevitas.tuning.losses.centred_error`); 0 leaves it out. 10, with a ``feature_weight`` of 10
            and ``augment="strong"``, brought all these errors down on images never seen, and top-1 not up: ViT-Tiny at
            w4a8 83.0 % (without 83.2), at w3a3 28.4 % (30.9).
        include_prefix: whether prefix tokens (the class token) count in the context distance. On ``digits_vit`` at w4a4
            (64 images, 15 epochs, one seed) it changed top-1 by one test image of 599.
        augment: ``"none"``; ``"light"`` (random resized crop of at least 70 % of the area); ``"mixed"`` (the
            same, half of them mirrored, and in half of them a box of another); ``"strong"`` (crops of at least 30 %,
            turned by up to 20 degrees, half of them mirrored, in other light and colours, some blurred, and in half of
            them blots of another); ``"published"`` (random
            resized crop, flip, colour jitter, grayscale, blur); ``"cutmix"`` (the same, then a box of each image is
            replaced by that of another: the teacher labels what results). Measured on ViT-Tiny at w4a4 (56 synthetic
            images, 160 steps, bfloat16, one seed; agreement with the float model on crops of the photographs shipped
            with scikit-image, 8.9 % untuned): light 27.1 %, published 35.9 %, cutmix 38.5 %. With half of the tokens
            kept, 384 images and 256 drawn ones, 200 steps, light is better: KL divergence on crops of photographs 1.32
            nats, cutmix 1.37. On ``digits_vit`` at w3a3 (two seeds) light and published differ by less than their
            spread.
        precision: arithmetic of the two networks; losses and optimiser stay in float32. ``"auto"``: bfloat16 where the
            hardware multiplies in it.
        compile: whether ``torch.compile`` fuses the blocks of both networks, which more than halves the time of a step
            and costs about half a minute: ``"auto"`` (if the tuning is long enough), ``"always"`` or ``"never"``. Not
            with a context distance, which has to look inside the blocks.
    """

    epochs: int = 20
    steps_per_epoch: int | None = None
    drawn_images: int = 0
    redraw_every: int | None = None
    refresh_every: int | None = 5
    refresh_share: float = 1.0
    refresh_steps: int | None = None
    refresh_start: Literal["images", "noise"] = "images"
    batch_size: int = 16
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-6
    weight_learning_rate: float | None = None
    scale_learning_rate: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_gradient_norm: float | None = 1.0
    kept_tokens: float = 1.0
    drop: float = 0.0
    temperature: float = 5.0
    distance_weight: float = 10.0
    feature_weight: float = 0.0
    last_feature_weight: float = 0.0
    include_prefix: bool = False
    augment: Literal["none", "light", "mixed", "strong", "published", "cutmix"] = "cutmix"
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    compile: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("drawn_images", self.drawn_images, 0)
        for name in ("refresh_every", "refresh_steps", "redraw_every", "steps_per_epoch"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        if not 0 < finite_number(self.refresh_share) <= 1:
            raise ConfigurationError(f"refresh_share: expected a share in (0, 1], got {self.refresh_share!r}.")
        for name in ("learning_rate", "final_learning_rate", "temperature"):
            if not finite_number(getattr(self, name)) > 0:
                raise ConfigurationError(f"{name}: expected a positive number, got {getattr(self, name)!r}.")
        if self.final_learning_rate > self.learning_rate:
            raise ConfigurationError(
                f"final_learning_rate: expected at most learning_rate ({self.learning_rate}), got "
                f"{self.final_learning_rate}."
            )
        for name in (
            "scale_learning_rate", "weight_decay", "distance_weight", "feature_weight", "last_feature_weight"
        ):  # fmt: skip
            if not finite_number(getattr(self, name)) >= 0:
                raise ConfigurationError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}.")
        if self.weight_learning_rate is not None and not finite_number(self.weight_learning_rate) >= 0:
            raise ConfigurationError(
                f"weight_learning_rate: expected a number >= 0 or None, got {self.weight_learning_rate!r}."
            )
        if not 0 < finite_number(self.kept_tokens) <= 1:
            raise ConfigurationError(f"kept_tokens: expected a share in (0, 1], got {self.kept_tokens!r}.")
        if not 0 <= finite_number(self.drop) <= 1:
            raise ConfigurationError(f"drop: expected a probability in [0, 1], got {self.drop!r}.")
        if not 0 <= finite_number(self.momentum) < 1:
            raise ConfigurationError(f"momentum: expected a number in [0, 1), got {self.momentum!r}.")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ConfigurationError(
                f"max_gradient_norm: expected a positive number or None, got {self.max_gradient_norm!r}."
            )
        check_choice("refresh_start", self.refresh_start, ("images", "noise"))
        check_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        check_choice("augment", self.augment, ("none", "light", "mixed", "strong", "published", "cutmix"))
        check_choice("precision", self.precision, ("float32", "bfloat16", "auto"))
        check_choice("compile", self.compile, ("auto", "always", "never"))

    @classmethod
    def published(cls, **changes: Any) -> DistillConfig:
        """METHOD.md's published values: SGD, 100 epochs, all images made again from noise every 30.

        Scales had the rate of the weights there; ours keep their own (see ``scale_learning_rate``). The published code
        does not clip gradients.
        """
        values: dict[str, Any] = dict(
            epochs=100, refresh_every=30, refresh_share=1.0, refresh_steps=None, refresh_start="noise", batch_size=16,
            optimizer="sgd", learning_rate=1e-3, final_learning_rate=1e-5, momentum=0.9, weight_decay=0.0,
            max_gradient_norm=None, temperature=5.0, distance_weight=10.0, feature_weight=0.0, augment="published",
            precision="float32",
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
            check_at_least(name, getattr(self, name), 1)
        check_at_least("cache_mib", self.cache_mib, 0)
        for name in ("learning_rate", "scale_learning_rate", "feature_weight"):
            if not finite_number(getattr(self, name)) >= 0:
                raise ConfigurationError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}.")
        if not finite_number(self.informative_weight) > 0:
            raise ConfigurationError(
                f"informative_weight: expected a positive number, got {self.informative_weight!r}."
            )
        if not 0 <= finite_number(self.drop) < 1:
            raise ConfigurationError(f"drop: expected a share in [0, 1), got {self.drop!r}.")
        check_choice("rounding", self.rounding, ("straight-through", "learned"))


#: One way to tune a quant model; several are carried out one after another.
TuningConfig = DistillConfig | ReconstructConfig
