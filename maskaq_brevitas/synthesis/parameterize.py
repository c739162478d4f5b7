"""What the optimiser turns: the pixels themselves, or their spectrum with natural images' weights."""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod

import torch
from torch import Tensor

from maskaq_brevitas.synthesis.augment import natural_amplitude

__all__ = ["ImageParameter", "PixelParameter", "SpectrumParameter"]

# Square root of the covariance of RGB in natural photographs up to scale: nearly grey, some blue-yellow, little
# red-green (the axes of Ruderman et al. 1998).
_COLOUR_AXES = torch.tensor([[1.0, 0.35, 0.15], [1.0, 0.0, -0.3], [1.0, -0.35, 0.15]])


class ImageParameter(ABC):
    """Images as a function of one free tensor ``value``; rows of it belong to single images.

    Args:
        images: normalised images to start from, ``(batch, channels, height, width)``.
        low, high: bounds of valid normalised values, each ``(channels, 1, 1)``.
    """

    value: Tensor

    def __init__(self, images: Tensor, low: Tensor, high: Tensor):
        self.low, self.high = low, high
        self.size = (images.shape[-2], images.shape[-1])
        self.value = self.invert(images).requires_grad_(True)

    @abstractmethod
    def images(self) -> Tensor:
        """The images, inside the bounds, differentiable in ``value``."""

    @abstractmethod
    def invert(self, images: Tensor) -> Tensor:
        """The value whose images are (nearly) ``images``."""

    def settle(self) -> None:  # noqa: B027 - nothing to do in most
        """Called after each step of the optimiser."""

    def put(self, where: Tensor, images: Tensor) -> None:
        """Start the images at ``where`` (boolean, ``(batch,)``) again from ``images``."""
        with torch.no_grad():
            self.value[where] = self.invert(images)


class PixelParameter(ImageParameter):
    """The pixels, clamped to the valid range after each step (METHOD.md, section 2)."""

    def images(self) -> Tensor:
        return self.value

    def invert(self, images: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(images, self.low), self.high).detach().clone()

    def settle(self) -> None:
        with torch.no_grad():
            self.value.copy_(torch.minimum(torch.maximum(self.value, self.low), self.high))


class SpectrumParameter(ImageParameter):
    """Fourier coefficients divided by a 1/f amplitude, on decorrelated colour axes; a sigmoid keeps the range.

    An optimiser that takes equal steps in every coefficient then changes images with the statistics of photographs,
    instead of adding pixel noise (Olah, Mordvintsev, Schubert: Feature Visualization, 2017).
    """

    def images(self) -> Tensor:
        spectrum = torch.view_as_complex(self.value) * self._amplitude(self.value)
        planes = torch.fft.irfft2(spectrum, s=self.size, norm="ortho")
        return self.low + (self.high - self.low) * torch.sigmoid(_mix(planes, _axes(planes)))

    def invert(self, images: Tensor) -> Tensor:
        share = ((images - self.low) / (self.high - self.low)).clamp(0.01, 0.99).float()
        planes = _mix(torch.logit(share), torch.linalg.inv(_axes(share)))
        spectrum = torch.fft.rfft2(planes, norm="ortho") / self._amplitude(images)
        return torch.view_as_real(spectrum).contiguous().detach()

    def _amplitude(self, like: Tensor) -> Tensor:
        return natural_amplitude(*self.size).to(like.device)


def _axes(planes: Tensor) -> Tensor:
    """Colour axes as columns, scaled so that unit planes give a logit of unit variance; identity unless RGB."""
    if planes.shape[1] != 3:
        return torch.eye(planes.shape[1], device=planes.device)
    return (_COLOUR_AXES / _COLOUR_AXES.square().sum(dim=1).mean().sqrt()).to(planes.device)


def _mix(planes: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("oc,bchw->bohw", matrix, planes)
