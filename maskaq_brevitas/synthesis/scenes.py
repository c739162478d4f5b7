"""Shaded scenes: what dead leaves lack and photographs are full of: skies, round bodies, blur behind the subject.

A hidden unit of a ViT that stands for a smooth sky, or for a highlight on a round body, never fires on dead leaves or on
optimised images. On ViT-Tiny such units fired on up to 9 % of the tokens of photographs, ten times beyond their range
as set on synthetic images (fc2 of blocks 3 to 6; crops of the photographs shipped with scikit-image and others).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from maskaq_brevitas.synthesis.augment import low_frequency_images
from maskaq_brevitas.synthesis.procedural import dead_leaves_images, far_and_near, normal, random_shape, uniform

__all__ = ["scene_images", "shaded_images"]

# Photographs vary in colour mostly between warm and cool, less between green and magenta.
_WARM, _GREEN = (1.0, 0.15, -0.9), (-0.5, 1.0, -0.5)
_TEXTURES = 4


def scene_images(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Dead leaves or shaded scenes, each with one half chance; shares between black (0) and white (1).

    Args:
        shape: ``(batch, channels, height, width)``.
        generator: random source on the CPU.
    """
    makers = [shaded_images if _chance(0.5, generator) else dead_leaves_images for _ in range(shape[0])]
    return torch.cat([make((1, *shape[1:]), generator) for make in makers])


def shaded_images(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Scenes of a smooth ground, often a horizon, and shapes that are shaded like bodies, as shares of white.

    Each scene has its own roughness, so some are all smooth and some all texture; in some the ground and the shapes
    behind are out of focus. Illumination falls off to one side, or noise, blur, or lack of colour lies over all.

    Args:
        shape: ``(batch, channels, height, width)``.
        generator: random source on the CPU.
    """
    return torch.stack([_Scene(shape[1:], generator).draw() for _ in range(shape[0])])


class _Scene:
    """One image in the making; values are 0 at mid-grey and 1 at white."""

    def __init__(self, shape: tuple[int, int, int], generator: torch.Generator):
        self.shape, self.generator = shape, generator
        self.channels, height, width = shape
        self.side = min(height, width)
        self.rows, self.columns = torch.meshgrid(
            torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
        )
        self.textures = low_frequency_images((_TEXTURES, *shape), generator)
        self.roughness = math.exp(0.8 * self.normal() - 1.2)

    def draw(self) -> Tensor:
        image = self.gradient() + 0.5 * min(1.0, self.roughness) * self.uniform() * self.textures[0]
        if self.chance(0.3):
            height = self.uniform(-0.3, 0.8) + 0.1 * self.normal() * self.columns
            ground = self.gradient() + 0.6 * min(1.0, self.roughness) * self.uniform() * self.textures[1]
            image = torch.lerp(image, ground, ((self.rows - height) * self.shape[1] / 4 + 0.5).clamp(0, 1))
        count = int(min(60, math.exp(1 + 1.1 * abs(self.normal()) + (1 if self.chance(0.5) else 0))))
        in_focus = int(count * self.uniform()) if self.chance(0.4) else 0
        for index in range(count):
            if index == in_focus > 0:
                image = self.blurred(image, self.uniform(1, 8))
            image = self.with_shape(image)
        if self.chance(0.3):
            image = image + 0.35 * self.normal() * self.columns + 0.35 * self.normal() * self.rows
        if self.chance(0.25):
            image = image + 0.04 * self.uniform() * torch.randn(self.shape, generator=self.generator)
        if self.chance(0.15):
            image = self.blurred(image, self.uniform(0.5, 2.5))
        if self.chance(0.1):
            image = image.mean(dim=0, keepdim=True).expand(self.shape)
        return ((image * math.exp(0.2 * self.normal()) + 1) / 2).clamp(0, 1)

    def with_shape(self, image: Tensor) -> Tensor:
        """``image`` with one more ellipse, rectangle or triangle on it."""
        radius = 0.06 * 15 ** self.uniform()
        if self.chance(0.6):
            radius = far_and_near(self.generator)
        part = random_shape(self.rows, self.columns, radius, 0.5, self.generator)
        softness = 4.0 if self.chance(0.7) else self.uniform(4, 40)
        cover = ((1 - part.distance) * radius * self.side / softness).clamp(0, 1)

        fill = self.colour().expand(self.shape)
        if self.chance(0.6):
            away = (part.unit_along - 0.6 * self.normal()).square()
            away = away + (part.unit_across - 0.6 * self.normal()).square()
            fill = fill - away.clamp(max=4) * self.uniform(0, 0.35)
            if self.chance(0.3):
                fill = fill + 1.2 * torch.exp(-away / 0.02)  # a highlight
        elif self.chance(0.5):
            fill = self.gradient(0.7)
        texture = self.textures[int(torch.randint(_TEXTURES, (), generator=self.generator))]
        strength = 0.4 * min(1.2, self.roughness * math.exp(0.7 * self.normal()))
        fill = fill + strength * (texture.flip(-1) if self.chance(0.5) else texture)
        if self.chance(0.2):
            fill = fill + 0.4 * self.uniform() * torch.sin(part.along * self.uniform(8, 68))
        if self.chance(0.1):
            checks = torch.sin(part.along * self.uniform(8, 48)) * torch.sin(part.across * self.uniform(8, 48))
            fill = fill + 0.4 * self.uniform() * checks.sign()
        return torch.lerp(image, fill, cover)

    def gradient(self, strength: float = 1.0) -> Tensor:
        """A smooth transition between two colours, straight (mostly upright) or round, ``(channels, height, width)``."""
        if self.chance(0.7):
            angle = self.uniform(0, 2 * math.pi)
            if self.chance(0.6):
                angle = (0.5 if self.chance(0.5) else 1.5) * math.pi + 0.2 * self.normal()
            place = (self.columns * math.cos(angle) + self.rows * math.sin(angle) + 1) / 2
        else:
            place = 0.7 * torch.hypot(self.columns - self.uniform(-1, 1), self.rows - self.uniform(-1, 1))
        place = place.clamp(0, 1) ** math.exp(0.6 * self.normal()) if self.chance(0.5) else place.clamp(-0.2, 1.4)
        first = self.colour()
        return first + strength * (self.colour() - first) * place

    def colour(self) -> Tensor:
        """A brightness, and a chroma that is mostly small and sometimes strong; ``(channels, 1, 1)``."""
        brightness = torch.full((self.channels, 1, 1), 0.5 * self.normal())
        if self.channels != 3:
            return brightness + 0.2 * torch.randn(self.channels, 1, 1, generator=self.generator)
        strength = 0.12 * math.exp(0.8 * self.normal())
        chroma = self.normal() * torch.tensor(_WARM) + 0.5 * self.normal() * torch.tensor(_GREEN)
        return brightness + strength * chroma.view(3, 1, 1)

    def blurred(self, image: Tensor, pixels: float) -> Tensor:
        """Gaussian blur, ``pixels`` of an image whose shorter side is 224."""
        sigma = pixels * self.side / 224
        size = min(2 * round(2 * sigma) + 1, (self.side - 1) // 2 * 2 + 1)
        return transforms.gaussian_blur(image, [size, size], [sigma, sigma]) if size > 1 else image

    def chance(self, share: float) -> bool:
        return _chance(share, self.generator)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * uniform(self.generator)

    def normal(self) -> float:
        return normal(self.generator)


def _chance(share: float, generator: torch.Generator) -> bool:
    return uniform(generator) < share
