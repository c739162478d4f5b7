"""What images are optimised from: noise or drawn scenes, and which of them suits which label."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.modes import arithmetic
from maskaq_brevitas.synthesis import augment
from maskaq_brevitas.synthesis.procedural import dead_leaves_images
from maskaq_brevitas.synthesis.scenes import scene_images

__all__ = ["assigned", "draw_start", "draw_suited_start"]

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
def draw_suited_start(
    labels: Tensor,
    model: nn.Module,
    size: tuple[int, int, int],
    low: Tensor,
    high: Tensor,
    config: SynthesisConfig,
    generator: torch.Generator,
) -> Tensor:
    """Starting images as :func:`draw_start` gives them, of which each label gets one that the model takes for it more
    than for others.

    As many images as labels are drawn, and of each some random parts, mirrored or not, at full size: they cost little,
    and the model sees other things in them. Two labels may get parts of the same image.

    Args:
        labels: ``(batch,)``, classes of the model, on its device.
        model: P, frozen; gives logits ``(batch, classes)``.
        size: of an image, ``(channels, height, width)``.
        low, high: see :func:`draw_start`.
        config: with ``init``, ``start_views`` (parts of each image) and ``precision``.

    Returns:
        ``(batch, channels, height, width)``, normalised, on the CPU.
    """
    drawn = draw_start(config.init, (len(labels), *size), low, high, generator)
    candidates = [drawn]
    for _ in range(config.start_views or 0):
        lines = augment.draw_crops(tuple(drawn.shape), _VIEW_AREA, _VIEW_TURN, 0.5, generator)
        candidates.append(augment.cut_out(drawn, lines))
    with arithmetic(config.precision, labels.device):
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
