"""Makes and calibrates our own quant models of a float model: swap, bit widths, equalisation, ranges."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.config import Scheme
from maskaq_brevitas.errors import SkippedLayerWarning
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.progress import BarFactory
from maskaq_brevitas.progress import random_stream
from maskaq_brevitas.quant.equalize import EqualizedPlace
from maskaq_brevitas.quant.equalize import equalize
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.allocate import allocate_widths
from maskaq_brevitas.tuning.allocate import candidate_widths
from maskaq_brevitas.tuning.augment import augment
from maskaq_brevitas.tuning.calibrate import calibrate
from maskaq_brevitas.tuning.ranges import search_ranges
from maskaq_brevitas.tuning.ranges import set_channel_scales
from maskaq_brevitas.tuning.ranges import undo_bias_correction

__all__ = ["QuantModelMaker"]

# Random streams of the choice of calibration images, and of their variants.
_CHOSEN, _VARIANTS = 5_000_000, 4_000_000
# Images of a pool to calibrate on at most: 768 of ViT-Tiny's took five minutes of a CPU thread.
_CALIBRATED_ON = 256


class QuantModelMaker:
    """Makes quant models of one float model by one scheme, and calibrates them.

    Args:
        float_model: not changed.
        geometry: of the model.
        scheme: bit widths and kinds of quantizers.
        overrides: shell pattern of layer names -> ``wXaY``.
        seed: of what calibration leaves to chance.
        device: where the models are put.

    Attributes:
        allocated: widths of single layers that mixed precision has chosen, layer name -> ``wXaY``.
    """

    def __init__(
        self,
        float_model: nn.Module,
        geometry: Geometry,
        scheme: Scheme,
        overrides: Mapping[str, str],
        *,
        seed: int,
        device: torch.device,
    ):
        self.float_model = float_model
        self.geometry = geometry
        self.scheme = scheme
        self.overrides = overrides
        self.seed = seed
        self.device = device
        self.allocated: dict[str, str] = {}

    def make(self) -> nn.Module:
        """A fresh quant model; layers that stay in float are not named again."""
        return self._swapped(self.scheme, {**self.allocated, **self.overrides})

    def provisional(self, batches: list[Tensor]) -> nn.Module:
        """A quant model at nominal widths, calibrated on ``batches``."""
        return self._calibrated(self.scheme, batches)

    def count(self, available: int) -> int:
        """How many of that many images to calibrate on."""
        return min(available, _CALIBRATED_ON)

    def chosen(self, pixels: Tensor) -> Tensor:
        """Those of a pool's images to calibrate on: all, or some drawn by the seed, in their order."""
        count = self.count(len(pixels))
        if count == len(pixels):
            return pixels
        order = torch.randperm(len(pixels), generator=random_stream(self.seed, _CHOSEN))
        return pixels[order[:count].sort().values]

    def calibrate(
        self, quant_model: nn.Module, batches: list[Tensor]
    ) -> tuple[list[EqualizedPlace], dict[str, float]]:
        """Calibrate a quant model in place, anew if it was calibrated.

        Args:
            quant_model: made here.
            batches: normalised images on the device.

        Returns:
            What was equalised, and the factors by which the range search shrank ranges.
        """
        scheme = self.scheme
        places: list[EqualizedPlace] = []
        undo_bias_correction(quant_model)
        if scheme.equalize:
            # Ranges have to hold for images unlike these: crops, mixtures, other colours and contrasts of them help.
            varied = random_stream(self.seed, _VARIANTS)
            batches = [
                *batches,
                *(augment(images.cpu(), "cutmix", varied, self.geometry).to(self.device) for images in batches),
            ]
            places = equalize(quant_model, batches)
        calibrate(quant_model, batches)
        set_channel_scales(quant_model, {
            name: place.scales for place in places if place.scales is not None for name in place.consumers
        })  # fmt: skip
        # Equalisation widens columns of weights, in which a row's own least error is not that of the layer's output.
        wanted = dict(activations=scheme.activation_range == "search", weights=scheme.weight_range == "mse")
        wanted["biases"] = scheme.bias_correction
        return places, search_ranges(quant_model, batches, **wanted) if any(wanted.values()) else {}

    def allocation(
        self, average: float, float_snapshot: nn.Module, batches: list[Tensor], bar: BarFactory
    ) -> dict[str, str]:
        """Mixed precision: widths of layers, chosen by what each costs on ``batches``, for :attr:`allocated`.

        Args:
            average: the scheme's ``average_bits``.
            float_snapshot: on the device.
            batches: normalised images on the device.
            bar: makes progress bars.

        Raises:
            ConfigurationError: if no widths cost as little as that.
        """
        with bar(len(candidate_widths(average)), "Measuring bit widths") as measured:
            return allocate_widths(
                self.float_model, float_snapshot, self.scheme, self.overrides, batches,
                lambda scheme: self._calibrated(scheme, batches), on_width=lambda _: measured.update(),
            )  # fmt: skip

    def _calibrated(self, scheme: Scheme, batches: list[Tensor]) -> nn.Module:
        quant_model = self._swapped(scheme, self.overrides)
        self.calibrate(quant_model, batches)
        return quant_model

    def _swapped(self, scheme: Scheme, overrides: Mapping[str, str]) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SkippedLayerWarning)
            return swap_layers(self.float_model, scheme, overrides)[0].to(self.device)
