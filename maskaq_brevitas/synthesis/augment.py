"""Starting images and the augmentations that an image has to survive while it is synthesised."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "cut_out",
    "draw_colours",
    "draw_crops",
    "draw_roll",
    "gaussian_images",
    "low_frequency_images",
    "natural_amplitude",
    "pixel_noise",
]


def gaussian_images(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """White noise, ``(batch, channels, height, width)``, in units of the normalised image (METHOD.md, x ~ N(0, 1))."""
    return torch.randn(shape, generator=generator)


def pixel_noise(
    shape: tuple[int, int, int, int], low: Tensor, high: Tensor, generator: torch.Generator
) -> Tensor:
    """White noise clamped to what a pixel can be: what one calibrates on without any idea.

    Args:
        shape: ``(batch, channels, height, width)``.
        low, high: black and white in normalised units, ``(channels, 1, 1)``.
        generator: random source on the CPU.
    """
    images = gaussian_images(shape, generator)
    return torch.minimum(torch.maximum(images, low), high)


def natural_amplitude(height: int, width: int) -> Tensor:
    """Amplitude 1/f of natural images per real-FFT coefficient, ``(height, width // 2 + 1)``, root mean square 1.

    The constant coefficient gets the amplitude of the lowest frequency.
    """
    rows = torch.fft.fftfreq(height).view(-1, 1)
    columns = torch.fft.rfftfreq(width).view(1, -1)
    amplitude = 1 / (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
    return amplitude / amplitude.square().mean().sqrt()


def low_frequency_images(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Noise with a 1/f amplitude spectrum, as natural images have; zero mean and unit variance per image.

    The channels share most of their signal (natural images are mostly grey): three quarters of the variance is common.

    Args:
        shape: ``(batch, channels, height, width)``.
        generator: random source on the CPU.
    """
    batch, channels, height, width = shape
    amplitude = natural_amplitude(height, width)
    amplitude[0, 0] = 0
    common = torch.randn(batch, 1, height, width, generator=generator)
    own = torch.randn(shape, generator=generator)
    white = 0.75**0.5 * common + 0.25**0.5 * own
    images = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(height, width))
    return images / images.std(dim=(1, 2, 3), keepdim=True)


def draw_roll(reach: int, generator: torch.Generator) -> tuple[int, int]:
    """A random offset of up to ``reach`` pixels down and to the right."""
    if reach == 0:
        return 0, 0
    down, right = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    return down, right


def draw_colours(
    batch: int, channels: int, shift: float, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Factors exp(scale * N(0, 1)) and offsets ``shift`` * U(-1, 1) for each channel of each image.

    Args:
        batch, channels: how many.
        shift, scale: strengths, in units of the normalised image.
        generator: random source on the CPU.

    Returns:
        Factors and offsets, ``(batch, channels, 1, 1)`` each.
    """
    shape = (batch, channels, 1, 1)
    offsets = (torch.rand(shape, generator=generator) * 2 - 1) * shift
    return torch.exp(torch.randn(shape, generator=generator) * scale), offsets


def draw_crops(
    shape: tuple[int, ...], area: float, degrees: float, mirrored: float, generator: torch.Generator
) -> Tensor:
    """Where random parts of images lie, for :func:`cut_out`: ``(batch, 2, 3)`` from coordinates in the part to ones in
    the image, both from -1 to 1.

    Args:
        shape: of the images, ``(batch, channels, height, width)``.
        area: smallest share of the image that is drawn; the largest is all of it. Sides change by up to 4 : 3, and are
            cut to those of the image.
        degrees: largest angle that a part is turned by.
        mirrored: share of the parts that are mirrored.
        generator: random source on the CPU.
    """
    count, height, width = shape[0], shape[-2], shape[-1]
    share, ratio, across, down, angle, mirror = torch.rand(6, count, generator=generator)
    share, ratio = area + (1 - area) * share, (4 / 3) ** (2 * ratio - 1)
    widths, heights = (share * ratio).sqrt().clamp(max=1), (share / ratio).sqrt().clamp(max=1)
    angle = math.radians(degrees) * (2 * angle - 1)
    sides = 1 - 2 * (mirror < mirrored).float()
    # A rotation has to know the shape of the image.
    lines = torch.zeros(count, 2, 3)
    lines[:, 0, 0], lines[:, 0, 1] = sides * widths * angle.cos(), -heights * angle.sin() * height / width
    lines[:, 1, 0], lines[:, 1, 1] = sides * widths * angle.sin() * width / height, heights * angle.cos()
    lines[:, 0, 2], lines[:, 1, 2] = (2 * across - 1) * (1 - widths), (2 * down - 1) * (1 - heights)
    return lines


def cut_out(images: Tensor, lines: Tensor) -> Tensor:
    """The parts of images that :func:`draw_crops` names, at the size of the whole; outside of an image is its
    reflection."""
    grid = F.affine_grid(lines.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
