"""What images are optimised from: noise or drawn scenes, and which of them suits which label."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.modes import Precision
from maskaq_brevitas.modes import arithmetic
from maskaq_brevitas.synthesis import augment
from maskaq_brevitas.synthesis.procedural import dead_leaves_images
from maskaq_brevitas.synthesis.scenes import scene_images

__all__ = ["assigned", "draw_start", "suited_starts"]

_DRAWN = {"dead_leaves": dead_leaves_images, "scenes": scene_images}
# Of the views that labels choose among: smallest share of the image, and largest angle in degrees.
_VIEW_AREA, _VIEW_TURN = 0.2, 10.0


def draw_start(
    init: str, shape: tuple[int, int, int, int], low: Tensor, high: Tensor, generator: torch.Generator
) -> Tensor:
    """Starting images of the kind ``init`` (see :class:`~maskaq_brevitas.config.SynthesisConfig`), on the CPU.

    Args:
        low, high: black and white in normalised units, ``(channels, 1, 1)``. Low-frequency images get a deviation of a
            fifth of what lies between, a typical contrast of photographs; Gaussian ones get 1 as published.
    """
    low, high = low.cpu(), high.cpu()
    if init in _DRAWN:
        return low + (high - low) * _DRAWN[init](shape, generator)
    if init == "gaussian":
        return augment.gaussian_images(shape, generator)
    return augment.low_frequency_images(shape, generator) * 0.2 * (high - low)


@torch.no_grad()
def suited_starts(
    labels: Tensor,
    model: nn.Module,
    drawn: Tensor,
    views: int,
    generator: torch.Generator,
    precision: Precision,
) -> Tensor:
    """For each label one of the ``drawn`` images, or a part of one, that the model takes for it more than for others.

    Random parts, mirrored or not, at full size: they cost little, and the model sees other things in them. Two labels
    may get parts of the same image.

    Args:
        labels: ``(batch,)``, classes of the model, on its device.
        model: P, frozen; gives logits ``(batch, classes)``.
        drawn: normalised, ``(batch, channels, height, width)``, on the CPU.
        views: parts of each image, 0 or more.
        generator: random source on the CPU.
        precision: arithmetic of the model.

    Returns:
        As ``drawn``.
    """
    candidates = [drawn]
    for _ in range(views):
        lines = augment.draw_crops(tuple(drawn.shape), _VIEW_AREA, _VIEW_TURN, 0.5, generator)
        candidates.append(augment.cut_out(drawn, lines))
    with arithmetic(precision, labels.device):
        logits = torch.cat([model(images.to(labels.device)).float() for images in candidates])
    return torch.cat(candidates)[assigned(logits.log_softmax(dim=-1)[:, labels].cpu())]


def assigned(scores: Tensor) -> Tensor:
    """Which candidate each label gets, every one at most once, the best pair first; ``(labels,)``.

    Args:
        scores: ``(candidates, labels)``, with as many candidates as labels or more; NaN is worst.

    Example:
        >>> assigned(torch.tensor([[5.0, 4.0], [3.0, 0.0], [0.0, 1.0]])).tolist()
        [0, 2]
    """
    lowest = torch.finfo(scores.dtype).min
    left = scores.nan_to_num(nan=lowest, neginf=lowest)
    chosen = torch.empty(scores.shape[1], dtype=torch.long)
    for _ in range(scores.shape[1]):
        candidate, label = divmod(int(left.argmax()), scores.shape[1])
        chosen[label] = candidate
        left[candidate], left[:, label] = -torch.inf, -torch.inf
    return chosen
