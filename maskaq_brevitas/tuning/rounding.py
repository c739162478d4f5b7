"""Learned rounding of weights (AdaRound) with Brevitas' own modules, for the time that a block is reconstructed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from brevitas.core.function_wrapper.learned_round import LearnedRoundHardSigmoid
from brevitas.core.function_wrapper.learned_round import LearnedRoundSte
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import Tensor
from torch import nn

from maskaq_brevitas.config import ReconstructConfig

__all__ = ["Rounding", "learned_rounding"]

_ZETA, _GAMMA = 1.1, -0.1
_RATE = 1e-2
_WEIGHT = 1e-2
_WARM_UP = 0.2
_SHARPNESS = (20.0, 2.0)


@dataclass
class Rounding:
    """What learned rounding adds to a reconstruction: nothing, if rounding is straight-through.

    Attributes:
        parameters: one value per weight; its hard sigmoid is the share that the weight is rounded up.
        learning_rate: of these.
    """

    parameters: list[nn.Parameter] = field(default_factory=list)
    learning_rate: float = _RATE

    def regularizer(self, progress: float) -> Tensor | float:
        """Pushes every share to 0 or 1: ``1 - |2 h - 1|^b``, mean over weights (AdaRound, Nagel et al. 2020).

        Args:
            progress: of the block's iterations, 0 to 1; nothing in the first fifth, then b falls from 20 to 2.
        """
        if not self.parameters or progress < _WARM_UP:
            return 0.0
        first, last = _SHARPNESS
        sharpness = last + (first - last) * (1 - (progress - _WARM_UP) / (1 - _WARM_UP))
        shares = torch.cat([_share(value).flatten() for value in self.parameters])
        return _WEIGHT * len(self.parameters) * 100 * (1 - (2 * shares - 1).abs().pow(sharpness)).mean()


@contextmanager
def learned_rounding(block: nn.Module, config: ReconstructConfig) -> Iterator[Rounding]:
    """A context in which the weights of a block round as they learn to; on exit the rounding is put into the weights.

    The weights themselves and their scales do not move. With ``config.rounding == "straight-through"`` nothing changes.
    """
    if config.rounding == "straight-through":
        yield Rounding()
        return
    layers = [part for part in block.modules() if isinstance(part, QuantWeightBiasInputOutputLayer)]
    layers = [layer for layer in layers if layer.weight_quant.is_quant_enabled]
    places = [_rounding_place(layer) for layer in layers]
    originals = [place.float_to_int_impl for place in places]
    learned = []
    for layer in layers:
        steps = layer.weight.detach() / layer.quant_weight().scale.detach()
        learned.append(LearnedRoundSte(LearnedRoundHardSigmoid(_ZETA, _GAMMA), _start(steps), nn.Identity()).train())
    try:
        for place, rounding in zip(places, learned, strict=True):
            place.float_to_int_impl = rounding
        yield Rounding([rounding.value for rounding in learned])
    finally:
        with torch.no_grad():
            for layer, place, original in zip(layers, places, originals, strict=True):
                place.float_to_int_impl.eval()  # shares become 0 or 1
                layer.weight.copy_(layer.quant_weight().value)
                place.float_to_int_impl = original


def _rounding_place(layer: QuantWeightBiasInputOutputLayer) -> Any:
    """The part of a weight quantizer that rounds."""
    return next(part for part in layer.weight_quant.modules() if hasattr(part, "float_to_int_impl"))


def _start(steps: Tensor) -> Tensor:
    """Values whose hard sigmoid is the fraction of each weight, in steps of its scale."""
    fraction = (steps - steps.floor()).clamp(1e-3, 1 - 1e-3)
    return -torch.log((_ZETA - _GAMMA) / (fraction - _GAMMA) - 1)


def _share(value: Tensor) -> Tensor:
    return (torch.sigmoid(value) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
