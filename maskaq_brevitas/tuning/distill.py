"""Tunes a quant model towards the float model on images without labels (METHOD.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from brevitas.core.scaling import ParameterFromRuntimeStatsScaling
from brevitas.core.scaling import ParameterFromStatsFromParameterScaling
from brevitas.core.zero_point import ParameterFromRuntimeZeroPoint
from torch import Tensor, nn
from torchvision.transforms import v2

from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.errors import InputError, TuningError
from maskaq_brevitas.models.attention_tap import AttentionRecord, attention_tap
from maskaq_brevitas.tuning.losses import context_distance, temperature_divergence

__all__ = ["Distiller", "Losses", "augment", "parameter_groups"]

#: Builds any torch optimiser from parameter groups that name their own ``lr`` and ``weight_decay``.
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

# A scale may shrink to this share of its calibrated value: it stays positive, and codes stay in use.
_SMALLEST_SCALE = 0.05


@dataclass(frozen=True)
class Losses:
    """Mean losses of one pass over images.

    Attributes:
        total: divergence + c * distance, the objective.
        divergence: of the outputs, in nats times T^2.
        distance: of the contexts, in [0, 2]; 0 if it is switched off.
        skipped: steps that were left out because loss or gradient was not finite.
    """

    total: float
    divergence: float
    distance: float
    skipped: int = 0


class Distiller:
    """One tuning of a quant model: the optimiser, its schedule and the objective. The epochs are the caller's.

    Activation statistics are not collected again: the quant model works in evaluation mode, in which Brevitas' scales
    are parameters once they are calibrated. Zero points stay as calibrated.

    Args:
        quant_model: calibrated Brevitas model; its parameters are trained in place.
        float_snapshot: teacher, frozen, on the same device.
        config: weights of the losses, rates, arithmetic.
        prefix: tokens before the patch tokens.
        total_steps: of the whole tuning, for the schedule.
        optimizer: builds another optimiser than ``config.optimizer`` from parameter groups, for example
            ``torch.optim.RMSprop``.

    Raises:
        InputError: if ``total_steps`` is below 1.
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
    ):
        if total_steps < 1:
            raise InputError(f"total_steps: expected a whole number >= 1, got {total_steps}.")
        self.quant_model = quant_model
        self.float_snapshot = float_snapshot
        self.config = config
        self.prefix = prefix
        self.total_steps = total_steps
        self.step = 0
        groups = parameter_groups(quant_model, config)
        self.optimizer = _make_optimizer(groups, config) if optimizer is None else optimizer(groups)

    def train_epoch(
        self,
        batches: Iterable[Tensor],
        generator: torch.Generator,
        on_step: Callable[[float], None] | None = None,
    ) -> Losses:
        """One pass over ``batches`` of normalised images, ``(batch, channels, height, width)`` each.

        Args:
            batches: on the device of the models.
            generator: of the augmentation; on the CPU.
            on_step: called after each step with its loss.

        Raises:
            TuningError: if no step of the epoch had a finite loss and gradient.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        sums, done, skipped = [0.0, 0.0, 0.0], 0, 0
        limit = self.config.max_gradient_norm or math.inf
        with self._trainable(parameters), self._taps() as contexts:
            for images in batches:
                images = augment(images, self.config.augment, generator)
                self._set_rates()
                self.optimizer.zero_grad(set_to_none=True)
                losses = self._losses(images, contexts)
                losses[0].backward()
                norm = nn.utils.clip_grad_norm_(parameters, limit)
                self.step += 1
                values = [float(loss.detach()) for loss in losses]
                if math.isfinite(values[0]) and bool(torch.isfinite(norm)):
                    self.optimizer.step()
                    self._keep_scales_positive()
                    sums = [total + value for total, value in zip(sums, values, strict=True)]
                    done += 1
                else:
                    skipped += 1
                if on_step is not None:
                    on_step(values[0])
        self.optimizer.zero_grad(set_to_none=True)
        if done == 0:
            raise TuningError(
                f"None of the {skipped} steps of this epoch had a finite loss and gradient. Lower learning_rate and "
                "scale_learning_rate, set max_gradient_norm, or use precision='float32'."
            )
        return Losses(*(total / done for total in sums), skipped=skipped)

    @torch.no_grad()
    def validation_loss(self, batches: Iterable[Tensor]) -> Losses:
        """The objective on images as they are, mean over images; the quant model is not changed.

        Raises:
            InputError: if there is no image.
        """
        sums, count = [0.0, 0.0, 0.0], 0
        with self._trainable([]), self._taps() as contexts:
            for images in batches:
                losses = self._losses(images, contexts)
                sums = [total + float(loss) * len(images) for total, loss in zip(sums, losses, strict=True)]
                count += len(images)
        if count == 0:
            raise InputError("The validation loss needs at least one image, got none.")
        return Losses(*(total / count for total in sums))

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

    def _losses(self, images: Tensor, contexts: tuple[AttentionRecord, AttentionRecord] | None) -> list[Tensor]:
        """Total, divergence and distance on ``images``."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            with torch.no_grad():
                float_logits = self.float_snapshot(images)
            quant_logits = self.quant_model(images)
        divergence = temperature_divergence(float_logits, quant_logits, self.config.temperature)
        distance = torch.zeros_like(divergence)
        if contexts is not None:
            distance = context_distance(
                contexts[0].context, contexts[1].context, prefix=self.prefix, include_prefix=self.config.include_prefix
            )
        return [divergence + self.config.distance_weight * distance, divergence, distance]

    def _set_rates(self) -> None:
        """Cosine schedule from each group's own rate to the same share of it."""
        lowest = self.config.final_learning_rate / self.config.learning_rate
        progress = min(1.0, self.step / max(1, self.total_steps - 1))
        factor = lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = group["first_lr"] * factor

    @torch.no_grad()
    def _keep_scales_positive(self) -> None:
        for group in self.optimizer.param_groups:
            if group["floor"] is not None:
                for parameter in group["params"]:
                    parameter.clamp_(min=group["floor"])

    @contextmanager
    def _taps(self) -> Iterator[tuple[AttentionRecord, AttentionRecord] | None]:
        with ExitStack() as stack:
            if self.config.distance_weight == 0:
                yield None
            else:
                ours = stack.enter_context(attention_tap(self.float_snapshot, "context"))
                theirs = stack.enter_context(attention_tap(self.quant_model, "context"))
                yield ours, theirs
                ours.clear()
                theirs.clear()

    @contextmanager
    def _trainable(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Evaluation mode, and gradients for ``parameters``; both flags are put back."""
        training = {module: module.training for module in self.quant_model.modules()}
        gradients = {parameter: parameter.requires_grad for parameter in self.quant_model.parameters()}
        chosen = {id(parameter) for parameter in parameters}
        try:
            self.quant_model.eval()
            for parameter in gradients:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            for module, flag in training.items():
                module.training = flag
            for parameter, flag in gradients.items():
                parameter.requires_grad_(flag)


def parameter_groups(quant_model: nn.Module, config: DistillConfig) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: matrices; biases and LayerNorms (no decay); each scale by itself.

    A scale's rate is ``config.scale_learning_rate`` times its mean value, so that one number fits scales of any size.
    Keys beside torch's own: ``first_lr`` (rate at the first step) and ``floor`` (least value of a scale, or None).

    Raises:
        TuningError: if a scale is not positive or not finite: the model was not calibrated.
    """
    scales: dict[int, nn.Parameter] = {}
    fixed: set[int] = set()
    for name, module in quant_model.named_modules():
        if isinstance(module, (ParameterFromRuntimeStatsScaling, ParameterFromStatsFromParameterScaling)):
            if not bool((torch.isfinite(module.value) & (module.value > 0)).all()):
                raise TuningError(f"The scale of {name} is not positive and finite. Calibrate the model before tuning.")
            scales[id(module.value)] = module.value
        elif isinstance(module, ParameterFromRuntimeZeroPoint):
            fixed.add(id(module.value))
    others = [parameter for parameter in quant_model.parameters() if id(parameter) not in {*scales, *fixed}]
    groups: list[dict[str, Any]] = []
    matrices = [parameter for parameter in others if parameter.ndim > 1]
    vectors = [parameter for parameter in others if parameter.ndim < 2]
    for chosen, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
        if chosen:
            groups.append(dict(
                params=chosen, lr=config.learning_rate, first_lr=config.learning_rate, weight_decay=decay, floor=None
            ))  # fmt: skip
    if config.scale_learning_rate > 0:
        for scale in scales.values():
            rate = config.scale_learning_rate * float(scale.detach().mean())
            floor = _SMALLEST_SCALE * float(scale.detach().min())
            groups.append(dict(params=[scale], lr=rate, first_lr=rate, weight_decay=0.0, floor=floor))
    return groups


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """``images``, each changed at random; torch's global generator is left as it was.

    Args:
        images: normalised, ``(batch, channels, height, width)``.
        kind: see :attr:`~maskaq_brevitas.config.DistillConfig.augment`. Colour changes of ``"published"`` act on the
            normalised values.
        generator: on the CPU; gives the seed.
    """
    if kind == "none":
        return images
    size = tuple(images.shape[-2:])
    steps: list[nn.Module] = [v2.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.9, 1.1), antialias=True)]
    if kind in ("published", "cutmix"):
        steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        if images.shape[1] == 3:
            steps += [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4)], p=0.8), v2.RandomGrayscale(p=0.2)]
        steps += [v2.RandomApply([v2.GaussianBlur(max(3, size[0] // 20 * 2 + 1))], p=0.5)]
    change = v2.Compose(steps)
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        images = torch.stack([change(image) for image in images])
        if kind == "cutmix":
            # It mixes labels too, which we do not use.
            images, _ = v2.CutMix(num_classes=1)(images, torch.zeros(len(images), dtype=torch.long))
        return images


def _make_optimizer(groups: list[dict[str, Any]], config: DistillConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(groups)
