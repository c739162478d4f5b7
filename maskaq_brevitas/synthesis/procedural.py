"""Images drawn by a program instead of found by an optimiser: dead leaves, the simplest model of a photograph.

Shapes of all sizes cover one another, so edges, flat regions and textures come with the scale invariance of natural
scenes (Lee, Mumford, Huang: Occlusion models for natural images, IJCV 2001). As data to learn from without photographs:
Baradad et al., Learning to see by looking at noise, NeurIPS 2021. No model is asked and no file is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maskaq_brevitas.synthesis.augment import low_frequency_images

__all__ = ["Shape", "dead_leaves_images", "far_and_near", "normal", "procedural_places", "random_shape", "uniform"]

# Radii of the shapes in half image sides, and how many shapes an image gets.
_SMALLEST, _LARGEST = 0.05, 0.9
_SHAPES = (8, 60)
_TEXTURES = 4
_MEAN_EXTENT = 4.0


def procedural_places(count: int, share: float) -> Tensor:
    """Which of ``count`` images are procedural, spread evenly so that each batch gets its part; boolean, ``(count,)``.
    """
    marks = torch.arange(count + 1, dtype=torch.float64).mul(share).floor()
    return marks[1:] > marks[:-1]


def dead_leaves_images(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Images of overlapping textured shapes, as shares between black (0) and white (1).

    Each image has 8 to 59 ellipses, rectangles and triangles with radii r distributed as r^-3, smooth borders, a colour
    of their own, a texture with the 1/f spectrum of natural images, and sometimes a grating.

    Args:
        shape: ``(batch, channels, height, width)``.
        generator: random source on the CPU.
    """
    return torch.stack([_scene(shape[1:], generator) for _ in range(shape[0])])


def _scene(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    channels, height, width = shape
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    textures = low_frequency_images((_TEXTURES + 1, *shape), generator)
    image = _colour(channels, generator) + 0.3 * uniform(generator) * textures[-1]
    for _ in range(int(torch.randint(*_SHAPES, (), generator=generator))):
        radius = far_and_near(generator)
        part = random_shape(rows, columns, radius, 0.4, generator)
        cover = ((1 - part.distance) * radius * min(height, width) / _MEAN_EXTENT).clamp(0, 1)

        texture = textures[int(torch.randint(_TEXTURES, (), generator=generator))]
        if uniform(generator) < 0.5:
            texture = texture.flip(-1)
        fill = _colour(channels, generator) + 0.35 * uniform(generator) * texture
        if uniform(generator) < 0.3:
            fill = fill + 0.3 * uniform(generator) * torch.sin(part.along * (8 + 60 * uniform(generator)))
        image = image * (1 - cover) + fill * cover
    return ((image + 1) / 2).clamp(0, 1)


@dataclass(frozen=True)
class Shape:
    """An ellipse, a rectangle or a triangle somewhere on an image.

    Attributes:
        along, across: coordinates on its two axes, ``(height, width)``, in half image sides.
        unit_along, unit_across: the same, 1 at its border.
        distance: from its centre, 1 at its border.
    """

    along: Tensor
    across: Tensor
    unit_along: Tensor
    unit_across: Tensor
    distance: Tensor


def far_and_near(generator: torch.Generator) -> float:
    """A radius with density r^-3, as of objects at all distances, in half image sides."""
    return (_SMALLEST**-2 + (_LARGEST**-2 - _SMALLEST**-2) * uniform(generator)) ** -0.5


def random_shape(
    rows: Tensor, columns: Tensor, radius: float, spread: float, generator: torch.Generator
) -> Shape:
    """A shape of some kind, at some place and angle.

    Args:
        rows, columns: coordinates of the pixels, -1 to 1, ``(height, width)``.
        radius: in half image sides.
        spread: standard deviation of the logarithm of its aspect ratio.
        generator: random source on the CPU.
    """
    angle, aspect = math.pi * uniform(generator), math.exp(spread * normal(generator))
    down, right = rows - 2.2 * uniform(generator) + 1.1, columns - 2.2 * uniform(generator) + 1.1
    along = right * math.cos(angle) + down * math.sin(angle)
    across = down * math.cos(angle) - right * math.sin(angle)
    unit_along, unit_across = along / (radius * aspect), across / (radius / aspect)
    return Shape(along, across, unit_along, unit_across, _distance(unit_along, unit_across, generator))


def _distance(along: Tensor, across: Tensor, generator: torch.Generator) -> Tensor:
    """Distance from the centre, 1 at the border, of an ellipse, a rectangle or a triangle of unit radius."""
    kind = int(torch.randint(3, (), generator=generator))
    if kind == 0:
        return torch.hypot(along, across)
    if kind == 1:
        return torch.maximum(along.abs(), across.abs())
    return torch.maximum(0.87 * along.abs() + 0.5 * across, -across)


def _colour(channels: int, generator: torch.Generator) -> Tensor:
    """Mostly a brightness, with a smaller part of each channel's own; ``(channels, 1, 1)``, 0 is mid-grey."""
    return 0.45 * normal(generator) + 0.2 * torch.randn(channels, 1, 1, generator=generator)


def uniform(generator: torch.Generator) -> float:
    """A number drawn evenly from [0, 1)."""
    return float(torch.rand((), generator=generator))


def normal(generator: torch.Generator) -> float:
    """A number of the standard normal distribution."""
    return float(torch.randn((), generator=generator))
