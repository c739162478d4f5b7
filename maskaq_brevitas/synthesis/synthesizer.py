"""The optimisation loop: two frozen networks and labels in, images out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from math import cos
from math import pi

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import SynthesisError
from maskaq_brevitas.models.attention_tap import attention_tap
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.modes import arithmetic
from maskaq_brevitas.synthesis import masks
from maskaq_brevitas.synthesis import objectives
from maskaq_brevitas.synthesis.iteration import Gradient
from maskaq_brevitas.synthesis.iteration import informative
from maskaq_brevitas.synthesis.iteration import networks
from maskaq_brevitas.synthesis.iteration import objective_gradient
from maskaq_brevitas.synthesis.iteration import received
from maskaq_brevitas.synthesis.iteration import tap_points
from maskaq_brevitas.synthesis.parameterize import ImageParameter
from maskaq_brevitas.synthesis.parameterize import PixelParameter
from maskaq_brevitas.synthesis.parameterize import SpectrumParameter
from maskaq_brevitas.synthesis.starts import draw_start
from maskaq_brevitas.synthesis.starts import suited_starts
from maskaq_brevitas.synthesis.tokens import DrawnTokens
from maskaq_brevitas.synthesis.tokens import KeptTokens

__all__ = ["SynthesizedBatch", "masked_alignment", "seen_by", "synthesize"]

_PARAMETERS: dict[str, type[ImageParameter]] = {"pixel": PixelParameter, "spectrum": SpectrumParameter}


@dataclass
class SynthesizedBatch:
    """One finished batch.

    Attributes:
        images: normalised, ``(batch, channels, height, width)``, float32, inside the valid pixel range.
        informative: the informative patches of each image at ``mask_end``, boolean ``(batch, patches)``.
        trace: mean objective and mean of each term at the first and last iteration.
        redrawn: how many images were drawn again because their objective was not finite.
    """

    images: Tensor
    informative: Tensor
    trace: dict[str, tuple[float, float]] = field(default_factory=dict)
    redrawn: int = 0


@torch.enable_grad()  # calibration loops iterate under no_grad
def synthesize(
    float_snapshot: nn.Module,
    quant_snapshot: nn.Module | None,
    geometry: Geometry,
    labels: Tensor,
    config: SynthesisConfig,
    *,
    generator: torch.Generator,
    start: Tensor | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    on_step: Callable[[int, float], object] | None = None,
) -> SynthesizedBatch:
    """Images that the float model sees as ``labels``, with decoupled informative regions, coupled to the quant model.

    Minimises ``L_S`` of METHOD.md, section 2, over the image alone. Both networks must be frozen snapshots
    (:mod:`maskaq_brevitas.quant.snapshot`) on one device. An image whose objective or gradient is not finite is drawn
    again, gets a full run of its own, and is counted.

    Args:
        float_snapshot: P, with explicit attention.
        quant_snapshot: Q; ``None`` leaves the alignment term out.
        geometry: of the model.
        labels: ``(batch,)``, or anything of that length for a model without classes.
        config: weights, schedules, augmentation.
        generator: random source on the CPU; all randomness of the run.
        start: normalised images to continue from; drawn if None, as ``config.init`` and ``config.start_views`` say.
        steps: overrides ``config.steps`` (a refresh takes fewer).
        learning_rate: overrides ``config.learning_rate``.
        on_step: called with the step number (from 1) and the mean objective.

    Raises:
        InputError: if ``start`` has the wrong shape.
        SynthesisError: if an image stays non-finite after ``config.max_redraws`` draws.
    """
    steps = config.steps if steps is None else steps
    peak_rate = config.learning_rate if learning_rate is None else learning_rate
    device = next(iter([*float_snapshot.parameters(), *float_snapshot.buffers()])).device
    labels = labels.to(device)
    low, high = (bound.to(device) for bound in geometry.bounds(torch.zeros((), device=device)))
    shape = (len(labels), *geometry.input_size)
    if start is not None and tuple(start.shape) != shape:
        raise InputError(f"start: expected images of shape {shape}, got {tuple(start.shape)}.")
    first = draw_start(config.init, shape, low, high, generator) if start is None else start.clone()
    if start is None and config.start_views is not None and geometry.num_classes > 0:
        first = suited_starts(labels, float_snapshot, first, config.start_views, generator, config.precision)
    parameter = _PARAMETERS[config.parameterization](first.to(device), low, high)
    optimizer = torch.optim.AdamW([parameter.value], lr=peak_rate, weight_decay=0.0)
    draws = torch.zeros(len(labels), dtype=torch.long)
    spare = _fork(generator)
    batch = SynthesizedBatch(images=torch.empty(0), informative=torch.empty(0))
    final_rate = min(config.final_learning_rate, peak_rate)

    chosen = DrawnTokens if config.view_area < 1 else KeptTokens
    tokens = chosen(geometry, len(labels), config.kept_tokens)
    found: Gradient | None = None
    alignment: Tensor | None = None
    every = config.align_every if geometry.num_classes > 0 else 1
    with networks(float_snapshot, quant_snapshot, geometry, config, parameter.images()) as both:
        for step in range(steps):
            progress = step / max(1, steps - 1)
            if found is not None and tokens.is_due(progress):
                tokens.cut(found.received, progress)
            optimizer.param_groups[0]["lr"] = final_rate + (peak_rate - final_rate) * (1 + cos(pi * progress)) / 2
            images = parameter.images()
            is_aligned = step % every == 0 or step == steps - 1
            found = objective_gradient(
                images, labels, both, tokens, progress, generator, align=every if is_aligned else 0
            )
            shown = found.objective
            if "align" in found.terms:
                alignment = config.align_weight * found.terms["align"]
            elif alignment is not None:
                shown = shown + alignment  # as it was last seen, so that iterations can be compared
            (gradient,) = torch.autograd.grad(images, parameter.value, found.images)
            broken = ~(torch.isfinite(found.objective) & torch.isfinite(gradient.flatten(1)).all(dim=1))
            if broken.any():
                _redraw(parameter, gradient, broken.cpu(), draws, optimizer, config, spare, shape)
                batch.redrawn += int(broken.sum())
            parameter.value.grad = gradient
            optimizer.step()
            parameter.settle()
            if step in (0, steps - 1) or on_step is not None:
                mean = float(shown[~broken].mean()) if not broken.all() else float("nan")
                if step in (0, steps - 1):
                    _note(batch.trace, mean, {name: term[~broken] for name, term in found.terms.items()})
                if on_step is not None:
                    on_step(step + 1, mean)
    images = parameter.images().detach()
    again = draws > 0
    if again.any():
        # What is left of this run is too short for them, and after its last step nothing would check them.
        left = replace(config, max_redraws=config.max_redraws - int(draws.max()))
        repeated = synthesize(
            float_snapshot, quant_snapshot, geometry, labels[again.to(device)], left, generator=spare, steps=steps,
            learning_rate=learning_rate,
        )  # fmt: skip
        images[again.to(device)] = repeated.images.to(device)
        batch.redrawn += repeated.redrawn
    _, batch.informative = seen_by(float_snapshot, geometry, images, config)
    batch.images = images.cpu()
    if not torch.isfinite(batch.images).all():
        raise SynthesisError("The synthesised images are not finite; try a lower learning rate.")
    return batch


@torch.no_grad()
def seen_by(
    float_snapshot: nn.Module, geometry: Geometry, images: Tensor, config: SynthesisConfig
) -> tuple[Tensor, Tensor]:
    """What the float model makes of finished images: its outputs, and the informative patches at ``config.mask_end``.

    Args:
        images: normalised, ``(batch, channels, height, width)``, on the model's device.

    Returns:
        Outputs ``(batch, outputs)`` and mask ``(batch, patches)``, boolean; both on the CPU.
    """
    with attention_tap(float_snapshot, *tap_points(config)) as seen, arithmetic(config.precision, images.device):
        outputs = float_snapshot(images)
        rows = received(seen, config.mask_attention, geometry, float_snapshot)
    return outputs.float().cpu(), masks.informative_mask(rows.mean(dim=0), config.mask_end).cpu()


@torch.no_grad()
def masked_alignment(
    float_snapshot: nn.Module,
    quant_snapshot: nn.Module,
    geometry: Geometry,
    images: Tensor,
    config: SynthesisConfig,
) -> Tensor:
    """Masked attention distance of two networks on finished images, per image: lower is closer (METHOD.md, L_align).

    No patch is dropped, and the mask is the final one (``config.mask_end``), so the figure is comparable between runs.

    Args:
        images: normalised, ``(batch, channels, height, width)``.

    Returns:
        ``(batch,)``, in units of the attention named by ``config.align_attention``.
    """
    points = tap_points(config)
    with attention_tap(float_snapshot, *points) as ours, attention_tap(quant_snapshot, *points) as theirs:
        float_snapshot(images)
        quant_snapshot(images)
        mask, float_rows = informative(ours, geometry, config, float_snapshot, config.mask_end)
        quant_rows = received(theirs, config.align_attention, geometry, quant_snapshot)
        return objectives.masked_alignment_loss(float_rows, quant_rows, mask)


def _fork(generator: torch.Generator) -> torch.Generator:
    """A second stream, fixed by the state of ``generator``, which stays as it is.

    New draws come from it, so that an image's result does not depend on a neighbour that had to be drawn again.
    """
    probe = torch.Generator()
    probe.set_state(generator.get_state())
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=probe)))


def _redraw(
    parameter: ImageParameter,
    gradient: Tensor,
    broken: Tensor,
    draws: Tensor,
    optimizer: torch.optim.Optimizer,
    config: SynthesisConfig,
    generator: torch.Generator,
    shape: tuple[int, int, int, int],
) -> None:
    """Start the ``broken`` images again from noise, with a clean optimiser state and no gradient in this step."""
    draws += broken.long()
    if int(draws.max()) > config.max_redraws:
        raise SynthesisError(
            f"The objective of {int((draws > config.max_redraws).sum())} image(s) is not finite after "
            "as many new draws as max_redraws allows. The float or the quantized model gives NaN or infinity: check "
            "its weights, or raise max_redraws."
        )
    fresh = draw_start(config.init, (int(broken.sum()), *shape[1:]), parameter.low, parameter.high, generator)
    where = broken.to(gradient.device)
    parameter.put(where, fresh.to(gradient.device))
    gradient[where] = 0
    for value in optimizer.state[parameter.value].values():
        if isinstance(value, Tensor) and value.shape == gradient.shape:
            value[where] = 0


def _note(trace: dict[str, tuple[float, float]], objective: float, terms: dict[str, Tensor]) -> None:
    """Keep first and last mean of the objective and of each term."""
    for name, value in {
        "objective": objective,
        **{key: float(term.detach().mean()) for key, term in terms.items()},
    }.items():
        trace[name] = (trace[name][0] if name in trace else value, value)
