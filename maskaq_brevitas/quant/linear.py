"""A linear layer whose input has one scale per channel."""

from __future__ import annotations

from brevitas.nn import QuantLinear
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ChannelScaledLinear"]


class ChannelScaledLinear(QuantLinear):
    """Brevitas' ``QuantLinear`` for inputs quantized per channel; used, calibrated and exported as that is.

    Brevitas looks for the scale of the output, finds none because the inputs' scales differ, and warns in every process.
    Here nobody asks for it.
    """

    def inner_forward_impl(self, x, quant_weight, quant_bias) -> Tensor:
        plain = [getattr(tensor, "value", tensor) for tensor in (x, quant_weight, quant_bias)]
        return F.linear(*plain)
