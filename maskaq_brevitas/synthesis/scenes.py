"""Scenes from random programs: textures seen at all distances, shapes that cover one another, light, blur.

What optimised images lack and photographs are full of: skies, fur, round bodies, highlights, blur behind the subject. A
hidden unit of a ViT that stands for such a thing never fires on optimised images alone. On ViT-Tiny such units fired on
up to 9 % of the tokens of photographs, ten times beyond their range as set on synthetic images (fc2 of blocks 3 to 6;
crops of the photographs shipped with scikit-image and others).
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from maskaq_brevitas.synthesis.procedural import far_and_near
from maskaq_brevitas.synthesis.procedural import random_shape
from maskaq_brevitas.synthesis.textures import TexturePainter

__all__ = ["scene_images"]

_MOST_PARTS = 14
_MOST_TEXTURES = 3  # of the parts of one scene: bodies of one kind come together
_TYPICAL_CONTRAST = 0.42


def scene_images(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Scenes as shares between black (0) and white (1), drawn on all of torch's threads, one image on each.

    A thread of the caller's that uses torch for the first time meanwhile gets one thread of torch's, as these have.

    Each is a texture (:mod:`maskaq_brevitas.synthesis.textures`), often with up to 14 parts on it: blobs, spots or
    plain shapes with a texture, a shade and a highlight of their own. Falling light, blur, noise or lack of colour may
    lie over all.

    Args:
        shape: ``(batch, channels, height, width)``.
        generator: random source on the CPU; gives the seed of each image. The number of threads changes nothing.
    """
    seeds = [int(seed) for seed in torch.randint(2**62, shape[:1], generator=generator)]

    def draw(seed: int) -> Tensor:
        return _Scene(shape[1:], torch.Generator().manual_seed(seed)).draw()

    threads = torch.get_num_threads()
    if threads == 1:
        return torch.stack([draw(seed) for seed in seeds])
    try:
        # An operation of a scene is too small to be shared out.
        with ThreadPoolExecutor(min(threads, len(seeds)), initializer=lambda: torch.set_num_threads(1)) as workers:
            return torch.stack(list(workers.map(draw, seeds)))
    finally:
        torch.set_num_threads(threads)  # which is not only that of a worker, in all of torch's libraries


@dataclass(frozen=True)
class _Part:
    """Where a part lies.

    Attributes:
        cover: its share of each pixel, ``(height, width)``.
        depth: 1 where it is nearest to the eye, 0 at its border.
        across, down: coordinates on it, 1 at its border.
    """

    cover: Tensor
    depth: Tensor
    across: Tensor
    down: Tensor


class _Scene(TexturePainter):
    """One image in the making."""

    def draw(self) -> Tensor:
        image = self.view(self.texture())
        if self.chance(0.3):
            image = self.blurred(image, self.uniform(1, 8))
        count = int(min(_MOST_PARTS, math.exp(self.uniform(-0.5, 2.6)))) if self.chance(0.8) else 0
        textures = [self.texture() for _ in range(min(count, _MOST_TEXTURES))]
        for _ in range(count):
            image = self.with_part(image, self.choose(textures))
        if self.chance(0.3):
            image = image + 0.35 * self.normal() * self.columns + 0.35 * self.normal() * self.rows
        if self.chance(0.2):
            image = self.blurred(image, self.uniform(0.5, 2.5))
        if self.chance(0.2):
            image = image + 0.06 * self.uniform() * self.randn(*self.shape)
        if self.chance(0.1):
            image = image.mean(dim=0, keepdim=True).expand(self.shape)
        return (self.exposed(image).clamp(-1, 1) + 1) / 2

    def exposed(self, image: Tensor) -> Tensor:
        """``image`` with its mean nearer to mid-grey, and with a usual contrast if it has too much of it."""
        image = image - image.mean() * self.uniform()
        contrast = _TYPICAL_CONTRAST * math.exp(0.35 * self.normal())
        deviation, mean = image.std(correction=0), image.mean()
        if float(deviation) > 1.6 * contrast or self.chance(0.3):
            image = (image - mean) * contrast / deviation.clamp_min(0.05) + mean.clamp(-0.6, 0.6)
        return image

    def view(self, texture: Tensor) -> Tensor:
        return self.seen_from_elsewhere(texture) if self.chance(0.5) else texture

    def with_part(self, image: Tensor, texture: Tensor) -> Tensor:
        part = self.choose((self.blob, self.blob, self.spots, self.plain, self.plain))()
        fill = self.view(texture) * math.exp(0.3 * self.normal()) + 0.3 * self.normal()
        if self.chance(0.5):  # of little texture
            fill = fill * self.uniform(0.4, 1) + 0.6 * self.normal()
        if self.chance(0.6):  # shaded like a body
            light = 0.5 * self.normal(), 0.5 * self.normal()
            side = (part.across * light[0] + part.down * light[1]).clamp(-2, 2)
            fill = fill + self.uniform(0, 0.6) * (part.depth - 0.6) - 0.3 * self.uniform() * side
            if self.chance(0.25):
                away = (part.across - light[0]).square() + (part.down - light[1]).square()
                fill = fill + 1.3 * torch.exp(-away / 0.03)  # a highlight
        if self.chance(0.3):  # a shadow around it
            image = image - 0.4 * self.uniform() * self.blurred(part.cover[None], self.uniform(2, 8))
        return torch.lerp(image, fill, part.cover)

    def blob(self) -> _Part:
        """A closed smooth outline: a circle with waves on it, stretched."""
        centre = self.uniform(-0.8, 0.8), self.uniform(-0.8, 0.8)
        radius = 0.08 * math.exp(2.4 * self.uniform())
        right, down = self.columns - centre[0], self.rows - centre[1]
        around = torch.atan2(down, right)
        outline = torch.ones_like(around)
        for wave in range(1, 7):
            phase = self.uniform(0, 2 * math.pi)
            outline = outline + 0.5 * wave**-1.2 * self.uniform() * torch.sin(wave * around + phase)
        stretch, angle = math.exp(0.4 * self.normal()), self.uniform(0, math.pi)
        along = right * math.cos(angle) + down * math.sin(angle)
        across = down * math.cos(angle) - right * math.sin(angle)
        distance = torch.hypot(along * stretch, across / stretch) / (radius * outline.clamp_min(0.2))
        return self.part(distance, radius, along / radius, across / radius)

    def spots(self) -> _Part:
        """Where noise is high: islands, clouds, foliage."""
        field = self.noise(self.uniform(1.3, 2.4))
        if self.chance(0.5):
            field = self.distorted(field)
        height = field[0] - 0.8 * self.normal()
        return _Part((height * math.exp(self.uniform(1, 4))).clamp(0, 1), height.clamp(0, 1), height, height)

    def plain(self) -> _Part:
        """An ellipse, a rectangle or a triangle."""
        radius = far_and_near(self.generator) if self.chance(0.5) else 0.06 * 15 ** self.uniform()
        shape = random_shape(self.rows, self.columns, radius, 0.5, self.generator)
        return self.part(shape.distance, radius, shape.unit_along, shape.unit_across)

    def part(self, distance: Tensor, radius: float, across: Tensor, down: Tensor) -> _Part:
        """The part inside of ``distance`` 1, with a border that is sharp or soft."""
        softness = math.exp(self.uniform(0.2, 3))
        cover = ((1 - distance) * radius * self.side / softness).clamp(0, 1)
        return _Part(cover, (1 - distance.square()).clamp_min(0).sqrt(), across, down)
