"""Starting images and the augmentations that an image has to survive while it is synthesised."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_colours", "draw_roll", "gaussian_images", "low_frequency_images", "natural_amplitude", "pixel_noise"]


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
