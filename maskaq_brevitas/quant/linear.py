"""Linear layers as Brevitas' algorithms want to see them: whatever the model, inputs have three axes at most."""

from __future__ import annotations

from typing import Any

from brevitas.nn import QuantLinear
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ChannelScaledLinear", "TokenLinear"]


class TokenLinear(QuantLinear):  # type: ignore[misc]  # Brevitas has no types
    """Brevitas' ``QuantLinear``; of an input ``(batch, height, width, channels)`` the places become one axis of tokens.

    Brevitas 0.13.4 takes the channels of a linear layer from the wrong axis when its input has four: GPTQ, GPFQ and
    Qronos reshape it to ``sum(shape[2:])`` columns (``graph/gpxq.py``, ``GPxQ.process_input``), bias correction reads
    axis 1 (``graph/calibrate.py``, ``_BiasCorrection.channel_dim``). Both look at the layer through hooks, so the axes
    are joined and split again outside of these, in the call itself; ``(batch, channels)`` and ``(batch, tokens,
    channels)`` pass as they are.
    """

    def __call__(self, x: Tensor, *inputs: Any, **options: Any) -> Any:
        if len(x.shape) <= 3:
            return super().__call__(x, *inputs, **options)
        # (batch, ..., channels) -> (batch, tokens, channels) -> (batch, ..., outputs)
        return super().__call__(x.flatten(1, -2), *inputs, **options).unflatten(1, x.shape[1:-1])


class ChannelScaledLinear(TokenLinear):
    """A linear layer for inputs quantized per channel; used, calibrated and exported as ``QuantLinear`` is.

    Brevitas looks for the scale of the output, finds none because the inputs' scales differ, and warns in every
    process. Here nobody asks for it.
    """

    def inner_forward_impl(self, x: Any, quant_weight: Any, quant_bias: Any) -> Tensor:
        plain = [getattr(tensor, "value", tensor) for tensor in (x, quant_weight, quant_bias)]
        return F.linear(*plain)
