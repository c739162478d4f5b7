"""Tunes a quant model towards the float model on images without labels (METHOD.md, section 3)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import ExitStack
from contextlib import contextmanager
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.errors import CompilationWarning
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.errors import TuningError
from maskaq_brevitas.models.attention_tap import AttentionRecord
from maskaq_brevitas.models.attention_tap import attention_tap
from maskaq_brevitas.models.block_tap import block_tap
from maskaq_brevitas.models.families import block_names
from maskaq_brevitas.models.families import features_behind
from maskaq_brevitas.models.families import has_classes
from maskaq_brevitas.models.families import read_logits
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.models.token_choice import TokenChoice
from maskaq_brevitas.models.token_choice import draw_tokens
from maskaq_brevitas.models.token_choice import patch_count
from maskaq_brevitas.models.token_choice import token_choice
from maskaq_brevitas.modes import arithmetic
from maskaq_brevitas.modes import evaluation_mode
from maskaq_brevitas.modes import seeded_by
from maskaq_brevitas.quant.trainable import biases_follow
from maskaq_brevitas.quant.trainable import compile_blocks
from maskaq_brevitas.quant.trainable import quantization_dropped
from maskaq_brevitas.quant.trainable import scales_turn
from maskaq_brevitas.quant.trainable import set_pivots
from maskaq_brevitas.quant.trainable import training_twin
from maskaq_brevitas.tuning.augment import augment
from maskaq_brevitas.tuning.losses import block_error
from maskaq_brevitas.tuning.losses import centred_error
from maskaq_brevitas.tuning.losses import context_distance
from maskaq_brevitas.tuning.losses import output_divergence
from maskaq_brevitas.tuning.optimizer import OptimizerFactory
from maskaq_brevitas.tuning.optimizer import make_optimizer
from maskaq_brevitas.tuning.optimizer import parameter_groups

__all__ = ["Distiller", "Losses"]

_LOSSES = 5  # of a step: the total and what it is the sum of
# No step changes a scale by more than this ratio (natural logarithm).
_LARGEST_SCALE_STEP = 0.2
# Shares of the steps until which tokens stay unrounded with the full probability, and from which none does.
_DROPPED_UNTIL, _ROUNDED_FROM = 0.5, 0.75
# Multiply-accumulates of linear layers in all training steps from which compiling pays for its half minute, roughly.
_WORTH_COMPILING = 2e13


@dataclass(frozen=True)
class Losses:
    """Mean losses of one pass over images.

    Attributes:
        total: the weighted sum, the objective.
        divergence: of the outputs, in nats times T^2.
        distance: of the contexts, in [0, 2]; 0 if it is switched off.
        features: error of the blocks' outputs, mean over blocks; 0 if it is switched off.
        last_features: error of the features that the classifier reads; 0 if it is switched off.
        skipped: steps that were left out because loss or gradient was not finite.
    """

    total: float
    divergence: float
    distance: float
    features: float
    last_features: float = 0.0
    skipped: int = 0


@dataclass
class _Taps:
    """What both networks, the float one first, leave behind in a forward pass; None where no loss asks for it."""

    contexts: tuple[AttentionRecord, ...] | None = None
    blocks: tuple[list[Tensor], ...] | None = None


class Distiller:
    """One tuning of a quant model: the optimiser, its schedule and the objective. The epochs are the caller's.

    Activation statistics are not collected again: the quant model works in evaluation mode, in which Brevitas' scales
    are parameters once they are calibrated. Zero points stay as calibrated. What runs is the model's training twin
    (:mod:`maskaq_brevitas.quant.trainable`), which shares its parameters.

    Scales are trained in their logarithm: a rate is a share of the scale, whatever its size.

    Args:
        quant_model: calibrated Brevitas model; its parameters are trained in place.
        float_snapshot: teacher, frozen, on the same device.
        config: weights of the losses, rates, arithmetic.
        prefix: tokens before the patch tokens.
        total_steps: of the whole tuning, for the schedule.
        optimizer: builds another optimiser than ``config.optimizer`` from parameter groups, for example
            ``torch.optim.RMSprop``.
        geometry: of the model, for the augmentation of normalised images; ``None``: images are shares of white.

    Raises:
        InputError: if ``total_steps`` is below 1.
        ModelError: if the model's family names no features behind its blocks, and ``last_feature_weight`` asks for
            them.
    """

    def __init__(
        self,
        quant_model: nn.Module,
        float_snapshot: nn.Module,
        config: DistillConfig,
        *,
        prefix: int,
        total_steps: int,
        optimizer: OptimizerFactory | None = None,
        geometry: Geometry | None = None,
    ):
        if total_steps < 1:
            raise InputError(f"total_steps: expected a whole number >= 1, got {total_steps}.")
        self.quant_model = quant_model
        self.float_snapshot = float_snapshot
        self.config = config
        self.prefix = prefix
        self.geometry = geometry
        self.total_steps = total_steps
        self.step = 0
        groups, self.scales = parameter_groups(quant_model, config)
        self.optimizer = make_optimizer(groups, config) if optimizer is None else optimizer(groups)
        self.network, self.teacher = self._networks()
        self._last_features: tuple[Callable[[Tensor], Tensor], ...] | None = None
        if config.last_feature_weight > 0:
            self._last_features = tuple(
                features_behind(model, block_names(model)[-1]) for model in (self.teacher, self.network)
            )

    def train_epoch(
        self,
        batches: Iterable[Tensor],
        generator: torch.Generator,
        on_step: Callable[[float], object] | None = None,
    ) -> Losses:
        """One pass over ``batches`` of normalised images, ``(batch, channels, height, width)`` each.

        Args:
            batches: on the device of the models.
            generator: of the augmentation; on the CPU.
            on_step: called after each step with its loss.

        Raises:
            TuningError: if no step of the epoch had a finite loss and gradient.
        """
        stepped = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        logarithms = {id(logarithm) for _, logarithm in self.scales}
        layers = [parameter for parameter in stepped if id(parameter) not in logarithms]
        sums, done, skipped = [0.0] * _LOSSES, 0, 0
        limit = self.config.max_gradient_norm or math.inf
        trained = [*layers, *(scale for scale, _ in self.scales)]
        with (
            self._trainable(trained), self._taps() as taps, self._token_choice() as choice, self._dropping() as share
        ):  # fmt: skip
            for images in batches:
                images = augment(images, self.config.augment, generator, self.geometry)
                self._draw_tokens(choice, images, generator)
                self._set_rates()
                self.quant_model.zero_grad(set_to_none=True)
                with self._drop(share, images.device, generator):
                    losses = self._losses(images, taps)
                losses[0].backward()
                self._logarithmic_gradients()
                norm = nn.utils.clip_grad_norm_(stepped, limit)
                self.step += 1
                values = [float(loss.detach()) for loss in losses]
                if math.isfinite(values[0]) and bool(torch.isfinite(norm)):
                    with scales_turn(self.network), biases_follow(self.network):
                        self.optimizer.step()
                        self._move_scales()
                    sums = [total + value for total, value in zip(sums, values, strict=True)]
                    done += 1
                else:
                    skipped += 1
                if on_step is not None:
                    on_step(values[0])
        self.quant_model.zero_grad(set_to_none=True)
        if done == 0:
            raise TuningError(
                f"None of the {skipped} steps of this epoch had a finite loss and gradient. Lower learning_rate and "
                "scale_learning_rate, set max_gradient_norm, or use precision='float32'."
            )
        return _mean_losses(sums, done, skipped)

    @torch.no_grad()
    def validation_loss(self, batches: Iterable[Tensor]) -> Losses:
        """The objective on images that are not augmented, mean over images; the quant model is not changed.

        Tokens are left out as in training (on whole images alone the loss says little about a model that trains on
        parts of them), always the same ones.

        Raises:
            InputError: if there is no image.
        """
        sums, count = [0.0] * _LOSSES, 0
        generator = torch.Generator().manual_seed(0)
        # Not compiled: another batch size, without gradients, would be compiled anew for a few images.
        eager = torch.compiler.set_stance("force_eager")
        with self._trainable([]), self._taps() as taps, self._token_choice() as choice, eager:
            for images in batches:
                self._draw_tokens(choice, images, generator)
                losses = self._losses(images, taps)
                sums = [total + float(loss) * len(images) for total, loss in zip(sums, losses, strict=True)]
                count += len(images)
        if count == 0:
            raise InputError("The validation loss needs at least one image, got none.")
        return _mean_losses(sums, count)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Step number and state of the optimiser: tensors by name, and plain values ready for JSON."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, dict[str, Any]] = {}
        found = self.optimizer.state_dict()
        for index, entries in found["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.{key}"] = value
                else:
                    plain.setdefault(str(index), {})[key] = value
        return tensors, {"step": self.step, "groups": found["param_groups"], "state": plain}

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave. The quant model's own state is the caller's."""
        state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in plain["state"].items()}
        for name, value in tensors.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
        self.step = plain["step"]

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        """What computes the quant and the float model's outputs, compiled if that pays."""
        try:
            network = training_twin(self.quant_model)
        except ModelError as error:  # a user's own quantizers, say
            warnings.warn(
                "Brevitas' own code is tuned, slowly, without moving the shifts of channels and without drop, because "
                f"{error}",
                CompilationWarning, stacklevel=2,
            )  # fmt: skip
            return self.quant_model, self.float_snapshot
        if self.config.scale_learning_rate > 0:
            set_pivots(network, self.quant_model)
        teacher = self.float_snapshot
        # A compiled block hides what is tapped inside it, so the context distance rules it out.
        if self.config.distance_weight == 0 and self._is_worth_compiling():
            teacher = copy.deepcopy(teacher)
            compile_blocks(network)
            compile_blocks(teacher)
        return network, teacher

    def _dropping(self) -> AbstractContextManager[Tensor | None]:
        return quantization_dropped(self.network) if self.config.drop > 0 else nullcontext()

    def _drop(
        self, share: Tensor | None, device: torch.device, generator: torch.Generator
    ) -> AbstractContextManager[None]:
        """Set the share of tokens that stay unrounded in this step; in the context they are drawn."""
        if share is None:
            return nullcontext()
        left = (_ROUNDED_FROM - self.step / self.total_steps) / (_ROUNDED_FROM - _DROPPED_UNTIL)
        share.fill_(self.config.drop * min(1.0, max(0.0, left)))
        return seeded_by(generator, device)

    def _token_choice(self) -> AbstractContextManager[TokenChoice | None]:
        return token_choice((self.teacher, self.network)) if self.config.kept_tokens < 1 else nullcontext()

    def _draw_tokens(self, choice: TokenChoice | None, images: Tensor, generator: torch.Generator) -> None:
        """Draw the tokens that both networks see of each image, unless they see all."""
        if choice is None:
            return
        patches = patch_count(self.float_snapshot)
        kept = max(1, round(self.config.kept_tokens * patches))
        choice.indices = draw_tokens(len(images), patches, kept, self.prefix, generator).to(images.device)

    def _is_worth_compiling(self) -> bool:
        if self.config.compile != "auto":
            return self.config.compile == "always"
        parameters = sum(parameter.numel() for parameter in self.quant_model.parameters() if parameter.ndim > 1)
        tokens = getattr(getattr(self.quant_model, "patch_embed", None), "num_patches", 0)
        return self.total_steps * self.config.batch_size * tokens * parameters > _WORTH_COMPILING

    def _losses(self, images: Tensor, taps: _Taps) -> list[Tensor]:
        """Total, divergence, distance, and errors of the blocks' outputs and of the last features, on ``images``."""
        with arithmetic(self.config.precision, images.device):
            with torch.no_grad():
                float_logits = self.teacher(images)
            quant_logits = read_logits(self.quant_model, self.network(images))
        divergence = output_divergence(
            float_logits, quant_logits, has_classes(self.quant_model), self.config.temperature
        )
        distance = features = last_features = torch.zeros_like(divergence)
        if taps.contexts is not None:
            distance = context_distance(
                taps.contexts[0].context, taps.contexts[1].context, prefix=self.prefix,
                include_prefix=self.config.include_prefix,
            )  # fmt: skip
        if taps.blocks is not None:
            float_blocks, quant_blocks = taps.blocks
            if self.config.feature_weight > 0:
                errors = [
                    block_error(found.float(), wanted.float())
                    for wanted, found in zip(float_blocks, quant_blocks, strict=True)
                ]
                features = torch.stack(errors).mean()
            if self._last_features is not None:
                float_head, quant_head = self._last_features
                with torch.no_grad():
                    wanted = float_head(float_blocks[-1].float())
                last_features = centred_error(quant_head(quant_blocks[-1].float()), wanted)
        total = divergence + self.config.distance_weight * distance + self.config.feature_weight * features
        total = total + self.config.last_feature_weight * last_features
        return [total, divergence, distance, features, last_features]

    def _set_rates(self) -> None:
        """Cosine schedule from each group's own rate to the same share of it."""
        lowest = self.config.final_learning_rate / self.config.learning_rate
        progress = min(1.0, self.step / max(1, self.total_steps - 1))
        factor = lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = group["first_lr"] * factor

    # All scales at once below: on a GPU it is the number of calls that costs.

    @torch.no_grad()
    def _logarithmic_gradients(self) -> None:
        """What the scales' gradients are to their logarithms."""
        learning = [(scale, scale.grad, logarithm) for scale, logarithm in self.scales]
        for _, _, logarithm in learning:
            logarithm.grad = None
        found = [(scale.data, gradient, logarithm) for scale, gradient, logarithm in learning if gradient is not None]
        if found:
            products = torch._foreach_mul([gradient for _, gradient, _ in found], [scale for scale, _, _ in found])
            for (_, _, logarithm), product in zip(found, products, strict=True):
                logarithm.grad = product

    @torch.no_grad()
    def _move_scales(self) -> None:
        if not self.scales:
            return
        logarithms = [logarithm.data for _, logarithm in self.scales]
        torch._foreach_clamp_min_(logarithms, -_LARGEST_SCALE_STEP)
        torch._foreach_clamp_max_(logarithms, _LARGEST_SCALE_STEP)
        torch._foreach_mul_([scale.data for scale, _ in self.scales], torch._foreach_exp(logarithms))
        torch._foreach_zero_(logarithms)

    @contextmanager
    def _taps(self) -> Iterator[_Taps]:
        with ExitStack() as stack:
            taps = _Taps()
            if self.config.distance_weight > 0:
                taps.contexts = tuple(
                    stack.enter_context(attention_tap(model, "context")) for model in (self.teacher, self.network)
                )
            if self.config.feature_weight > 0 or self.config.last_feature_weight > 0:
                taps.blocks = tuple(
                    stack.enter_context(block_tap(model)) for model in (self.teacher, self.network)
                )
            yield taps

    @contextmanager
    def _trainable(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Evaluation mode, and gradients for ``parameters``; both flags are put back."""
        gradients = {parameter: parameter.requires_grad for parameter in self.quant_model.parameters()}
        chosen = {id(parameter) for parameter in parameters}
        try:
            for parameter in gradients:
                parameter.requires_grad_(id(parameter) in chosen)
            with evaluation_mode(self.quant_model):
                yield
        finally:
            for parameter, flag in gradients.items():
                parameter.requires_grad_(flag)


def _mean_losses(sums: list[float], count: int, skipped: int = 0) -> Losses:
    total, divergence, distance, features, last_features = (part / count for part in sums)
    return Losses(total, divergence, distance, features, last_features, skipped)
