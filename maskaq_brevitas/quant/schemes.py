"""Bit widths and ranges -> Brevitas quantizer classes.

Quantizer classes are falsy (``bool(Int8ActPerTensorFloat) is False``): compare them with ``is None``, never with
``or``.
"""

from __future__ import annotations

from typing import Any
from typing import Literal

from brevitas.quant import Int8ActPerTensorFloat
from brevitas.quant import Int8WeightPerChannelFloat
from brevitas.quant import ShiftedUint8ActPerTensorFloat
from brevitas.quant import Uint8ActPerTensorFloat
from brevitas.quant.scaled_int import Int8ActPerTensorFloatMSE
from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE
from brevitas.quant.scaled_int import Uint8ActPerTensorFloatMSE
from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloatMSE

from maskaq_brevitas.config import Scheme

__all__ = ["ValueKind", "activation_quantizer", "weight_quantizer"]

#: What is known of the values at a place: any sign; from zero up; a long positive tail over a short negative one.
ValueKind = Literal["signed", "unsigned", "asymmetric"]

_ACTIVATIONS: dict[tuple[ValueKind, bool], Any] = {
    ("signed", False): Int8ActPerTensorFloat,
    ("signed", True): Int8ActPerTensorFloatMSE,
    ("unsigned", False): Uint8ActPerTensorFloat,
    ("unsigned", True): Uint8ActPerTensorFloatMSE,
    ("asymmetric", False): ShiftedUint8ActPerTensorFloat,
    ("asymmetric", True): ShiftedUint8ActPerTensorFloatMSE,
}


def weight_quantizer(bits: int, scheme: Scheme) -> Any:
    """Brevitas quantizer class for a weight: per output channel, symmetric, integer, learnable float scale.

    ``parameter_from_stats`` makes the scale a parameter. With Brevitas' default (a statistic of the weight, recomputed
    on each forward) GPTQ has no effect, because it quantizes column by column. Brevitas' narrow range is taken where
    the scheme says so, at 8 bits, where a level counts for nothing, and where the range is that of the largest weight,
    of either sign; never at 2 bits, where it would leave three levels.
    """
    searched = scheme.weight_range == "mse"
    base = Int8WeightPerChannelFloatMSE if searched else Int8WeightPerChannelFloat
    narrow = bits > 2 and (scheme.weight_levels == "symmetric" or not searched or bits >= 8)
    return base.let(bit_width=bits, narrow_range=narrow, scaling_impl_type="parameter_from_stats")


def activation_quantizer(kind: ValueKind, bits: int, scheme: Scheme, channels: int | None = None) -> Any:
    """Brevitas quantizer class for an activation: integer, float scale set by calibration, then learnable.

    Args:
        kind: what is known of the values.
        bits: width.
        scheme: gives the range rule (``activation_range``).
        channels: of an activation ``(batch, tokens, channels)`` that gets one scale for each; ``None``: one per tensor.
    """
    if channels is not None:
        return _ACTIVATIONS[kind, False].let(
            bit_width=bits, scaling_stats_op="max", scaling_per_output_channel=True,
            per_channel_broadcastable_shape=(1, 1, channels), scaling_stats_permute_dims=(2, 0, 1),
        )  # fmt: skip
    base = _ACTIVATIONS[kind, scheme.activation_range == "mse"]
    if scheme.activation_range not in ("minmax", "search"):
        return base.let(bit_width=bits)
    return base.let(bit_width=bits, scaling_stats_op="min_max" if kind == "asymmetric" else "max")
