"""Textures from small random programs: clouds, strands, cells, formulas, random networks, smooth transitions.

Each program covers what another misses: fur and grass are strands, stones and leaves are cells, skies are smooth. As
data to learn from without photographs, many programs beat one (Baradad et al., Procedural image programs for
representation learning, NeurIPS 2022). No model is asked and no file is read.

Values are 0 at mid-grey, -1 at black and 1 at white; they may lie beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from maskaq_brevitas.synthesis.procedural import normal
from maskaq_brevitas.synthesis.procedural import uniform

__all__ = ["TexturePainter"]

# Photographs vary in colour mostly between warm and cool, less between green and magenta.
_WARM, _GREEN = (1.0, 0.15, -0.9), (-0.5, 1.0, -0.5)
_NETWORK_CHANNELS = 24
_FORMULA_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.sin, torch.cos, torch.tanh, torch.relu, lambda x: 2 * torch.exp(-x * x) - 1,
    lambda x: x.abs().clamp(max=2) - 1,
)  # fmt: skip

_Choice = TypeVar("_Choice")


class TexturePainter:
    """Random textures of one size.

    Args:
        shape: ``(channels, height, width)``.
        generator: random source on the CPU.
    """

    def __init__(self, shape: tuple[int, int, int], generator: torch.Generator):
        self.shape, self.generator = shape, generator
        self.channels, self.height, self.width = shape
        self.side = min(self.height, self.width)
        self.rows, self.columns = torch.meshgrid(
            torch.linspace(-1, 1, self.height), torch.linspace(-1, 1, self.width), indexing="ij"
        )

    def texture(self) -> Tensor:
        """A texture of any kind, ``(channels, height, width)``, as all of them."""
        return self.choose((self.clouds, self.strands, self.cells, self.formula, self.network, self.smooth))()

    def clouds(self) -> Tensor:
        """Noise of some roughness, distorted by other noise up to three times: clouds, marble, camouflage, rust."""
        values = self.noise(self.uniform(0.8, 2.0))
        for _ in range(int(self.uniform(0, 3.5))):
            values = self.distorted(values)
        values = values[0]
        if self.chance(0.3):
            values = torch.sin(values * self.uniform(1, 6) + self.uniform(0, 6))
        if self.chance(0.2):
            values = 2 * values.abs() - 1
        return self.coloured(values) + self.grain(0.15)

    def strands(self) -> Tensor:
        """White noise smeared along a field of directions: fur, grass, water, wood (line integral convolution).

        Cabral, Leedom: Imaging vector fields using line integral convolution, SIGGRAPH 1993.
        """
        white = self.randn(self.channels if self.chance(0.3) else 1, self.height, self.width)
        if self.chance(0.5):
            white = 3 * F.avg_pool2d(white[None], 3, 1, 1)[0]
        angle = self.noise(self.uniform(1.4, 2.4))[0] * self.uniform(0.2, 1.5) + self.uniform(0, 2 * math.pi)
        step = torch.stack([angle.cos(), angle.sin()]) * 2 / self.side
        smeared = torch.zeros_like(white)
        length = max(2, round(self.uniform(4, 28) * self.side / 224))
        for sign in (1, -1):
            across, down = self.columns, self.rows
            for _ in range(length):
                smeared += _sampled(white, across, down)
                move = sign * _sampled(step, across, down)
                across, down = across + move[0], down + move[1]
        smeared = _standardised(smeared)
        ground = self.noise(self.uniform(1.3, 2.2))[0]
        if len(smeared) == 1:
            return self.coloured(smeared[0] * self.uniform(0.3, 1) + ground * self.uniform(0.2, 1))
        return 0.3 * smeared + self.coloured(ground)

    def cells(self) -> Tensor:
        """Cells around random points: stones, leaves, scales, cracks (Worley: A cellular texture basis function, 1996).
        """
        count = int(math.exp(self.uniform(1.8, 6)))
        points = self.random(count, 2) * 2.2 - 1.1
        bend = self.noise(self.uniform(1.3, 2.0), 2) * 0.06 * math.exp(0.7 * self.normal())
        aspect = math.exp(0.4 * self.normal())
        away = ((self.columns + bend[0])[..., None] - points[:, 0]).square() * aspect
        away += ((self.rows + bend[1])[..., None] - points[:, 1]).square() / aspect
        nearest, owner = away.topk(2, dim=-1, largest=False)
        nearest = nearest.sqrt() * math.sqrt(count) / 1.8
        border = nearest[..., 1] - nearest[..., 0]
        colours = self.coloured(self.randn(1, count))[:, 0]
        cells = colours[:, owner[..., 0]]
        kind = int(self.uniform(0, 3))
        if kind == 0:
            line = torch.exp(-border * self.uniform(3, 20))
            cells = torch.lerp(cells, torch.tensor(0.5 * self.normal()), line)
        elif kind == 1:
            cells = cells - nearest[..., 0] * self.uniform(0.3, 1.2)
        else:
            cells = self.coloured(2 * (border if self.chance(0.5) else nearest[..., 0]) - 1)
        return cells + self.grain(0.25)

    def formula(self) -> Tensor:
        """A random formula of the coordinates: a network of few units with mixed functions (CPPN, Stanley 2007)."""
        units = int(self.uniform(8, 24))
        inputs = [self.columns, self.rows, torch.hypot(self.columns, self.rows), torch.ones_like(self.rows)]
        if self.chance(0.5):
            inputs += [0.4 * field for field in self.noise(self.uniform(1.4, 2.2), 2)]
        values = torch.stack(inputs, dim=-1) @ self.randn(len(inputs), units) * math.exp(self.uniform(-0.3, 1.6))
        values = self.choose(_FORMULA_FUNCTIONS)(values)
        for _ in range(int(self.uniform(1, 4.5))):
            values = values @ self.randn(units, units) * (1.6 / math.sqrt(units)) + 0.5 * self.randn(units)
            first = int(units * self.uniform())
            parts = values[..., :first], values[..., first:]
            values = torch.cat([self.choose(_FORMULA_FUNCTIONS)(part) for part in parts], dim=-1)
        image = (values @ self.randn(units, self.channels) / math.sqrt(units)).permute(2, 0, 1)
        return 0.8 * (self.coloured(1.7 * image.mean(dim=0)) if self.chance(0.5) else image)

    def network(self) -> Tensor:
        """What a generator with random weights makes of noise, from 4 x 4 upwards (Baradad et al., NeurIPS 2021)."""
        count, size = _NETWORK_CHANNELS, 4
        features = self.randn(1, count, size, size)
        strength = self.uniform(0.2, 1.0)
        while size < max(self.height, self.width):
            size *= 2
            features = F.interpolate(features, size=(size, size), mode="bilinear")
            weight = self.randn(count, count, 3, 3) / math.sqrt(9 * count)
            if self.chance(0.5):
                weight = weight * 1.8 * (self.random(count, count, 1, 1) < 0.3)
            features = F.conv2d(F.pad(features, (1, 1, 1, 1), mode="reflect"), weight)
            fresh = strength * (0.5 if size < 128 else 0.2 * self.uniform())
            features = features + fresh * self.randn(1, 1, size, size) * self.randn(1, count, 1, 1)
            features = F.leaky_relu(features + 0.3 * self.randn(1, count, 1, 1), 0.2)
            features = features / features.square().mean().sqrt().clamp_min(1e-6)
        top, left = (size - self.height) // 2, (size - self.width) // 2
        features = features[0, :, top : top + self.height, left : left + self.width]
        mixture = 0.3 * self.randn(self.channels, count) + self.randn(1, count)
        image = 0.45 * math.exp(0.3 * self.normal()) * _standardised(torch.einsum("oc,chw->ohw", mixture, features))
        return (self.coloured(2 * image.mean(dim=0)) if self.chance(0.3) else image) + 0.3 * self.normal()

    def smooth(self) -> Tensor:
        """A smooth transition of two colours, straight (mostly upright) or round: skies, walls, bodies out of focus."""
        if self.chance(0.7):
            angle = self.uniform(0, 2 * math.pi)
            if self.chance(0.6):
                angle = (0.5 if self.chance(0.5) else 1.5) * math.pi + 0.2 * self.normal()
            place = (self.columns * math.cos(angle) + self.rows * math.sin(angle) + 1) / 2
        else:
            place = 0.7 * torch.hypot(self.columns - self.uniform(-1, 1), self.rows - self.uniform(-1, 1))
        place = place.clamp(0, 1) ** math.exp(0.6 * self.normal()) if self.chance(0.5) else place.clamp(-0.2, 1.4)
        first, last = self.palette(2)
        return torch.lerp(first.view(-1, 1, 1), last.view(-1, 1, 1), place) + self.grain(0.1)

    def noise(self, exponent: float, count: int = 1) -> Tensor:
        """Fields of amplitude f^-exponent, some longer in one direction, ``(count, height, width)``; unit variance."""
        down = torch.fft.fftfreq(self.height)[:, None]
        across = torch.fft.rfftfreq(self.width)[None]
        if self.chance(0.4):
            angle, aspect = self.uniform(0, math.pi), math.exp(0.7 * self.normal())
            along = (down * math.cos(angle) + across * math.sin(angle)) * aspect
            down, across = along, (across * math.cos(angle) - down * math.sin(angle)) / aspect
        frequency = torch.hypot(down, across).clamp_min(1 / self.side)
        white = torch.fft.rfft2(self.randn(count, self.height, self.width))
        return _standardised(torch.fft.irfft2(white * frequency**-exponent, s=(self.height, self.width)))

    def grain(self, most: float) -> Tensor:
        """Coloured noise of a random strength up to ``most``."""
        return most * self.uniform() * self.noise(self.uniform(0.8, 1.4), self.channels)

    def distorted(self, image: Tensor) -> Tensor:
        """``image`` drawn on a sheet that is pulled about."""
        pull = self.noise(self.uniform(1.3, 2.2), 2) * 0.075 * math.exp(0.8 * self.normal())
        return _sampled(image, self.columns + pull[0], self.rows + pull[1])

    def seen_from_elsewhere(self, image: Tensor) -> Tensor:
        """``image`` turned, enlarged and in perspective."""
        zoom, angle = math.exp(-0.7 * abs(self.normal())), self.uniform(0, 2 * math.pi)
        across = zoom * (self.columns * math.cos(angle) - self.rows * math.sin(angle)) + 0.5 * self.normal() * (
            1 - zoom
        )
        down = zoom * (self.columns * math.sin(angle) + self.rows * math.cos(angle)) + 0.5 * self.normal() * (1 - zoom)
        tilt = 1 + 0.25 * zoom * (self.normal() * self.columns + self.normal() * self.rows)
        tilt = tilt.clamp_min(0.3)
        return _sampled(image, across / tilt, down / tilt)

    def coloured(self, values: Tensor) -> Tensor:
        """``values``, about -1 to 1, in colours of a palette: ``(height, width)`` to ``(channels, height, width)``."""
        palette = self.palette(int(self.uniform(2, 6)))
        place = (values * 0.5 * math.exp(0.3 * self.normal()) + 0.5).clamp(0, 1) * (len(palette) - 1)
        before = place.floor().clamp(max=len(palette) - 2).long()
        share = (place - before).unsqueeze(-1)
        if self.chance(0.3):
            share = share * share * (3 - 2 * share)
        return torch.lerp(palette[before], palette[before + 1], share).movedim(-1, 0)

    def palette(self, count: int) -> Tensor:
        """Colours that go together, ``(count, channels)``: of any brightness, most of one hue and weak."""
        hue, cast = self.hue(), 0.12 * self.randn(self.channels)
        colours = []
        for _ in range(count):
            chroma = hue if self.chance(0.6) else self.hue()
            colours.append(0.5 * self.normal() + 0.14 * math.exp(0.7 * self.normal()) * chroma + cast)
        return torch.stack(colours)

    def hue(self) -> Tensor:
        """A chroma, ``(channels,)``."""
        if self.channels != 3:
            return self.randn(self.channels)
        return self.normal() * torch.tensor(_WARM) + 0.5 * self.normal() * torch.tensor(_GREEN)

    def blurred(self, image: Tensor, pixels: float) -> Tensor:
        """Gaussian blur, ``pixels`` of an image whose shorter side is 224."""
        sigma = pixels * self.side / 224
        size = min(2 * round(2 * sigma) + 1, (self.side - 1) // 2 * 2 + 1)
        return transforms.gaussian_blur(image, [size, size], [sigma, sigma]) if size > 1 else image

    def choose(self, among: Sequence[_Choice]) -> _Choice:
        return among[int(torch.randint(len(among), (), generator=self.generator))]

    def chance(self, share: float) -> bool:
        return uniform(self.generator) < share

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * uniform(self.generator)

    def normal(self) -> float:
        return normal(self.generator)

    def random(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def _sampled(image: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """``image`` at the coordinates ``across`` and ``down``, -1 to 1; mirrored beyond."""
    grid = torch.stack([across, down], dim=-1)[None]
    return F.grid_sample(image[None], grid, mode="bilinear", padding_mode="reflection", align_corners=False)[0]


def _standardised(fields: Tensor) -> Tensor:
    """Zero mean and unit variance per field of ``(count, height, width)``."""
    fields = fields - fields.mean(dim=(-2, -1), keepdim=True)
    return fields / fields.std(dim=(-2, -1), keepdim=True).clamp_min(1e-6)
