"""Brevitas twins of attention modules: the explicit form with a quantizer on every matmul operand."""

from __future__ import annotations

from brevitas.nn import QuantIdentity
from torch import nn

from maskaq_brevitas.config import Scheme
from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.families import explicit_form
from maskaq_brevitas.quant.schemes import activation_quantizer

__all__ = ["OPERANDS", "quantize_operands"]

#: The operands of the two matmuls of an attention module: q k^T and probabilities @ v.
OPERANDS = ("query", "key", "value", "probabilities")


def quantize_operands(attention: nn.Module, bits: dict[str, int], scheme: Scheme) -> ExplicitAttention:
    """The quantized twin of an attention module: written out, with a quantizer in front of each matmul operand.

    Args:
        attention: a registered foreign attention module, or an explicit one; parameters are shared.
        bits: width of each of :data:`OPERANDS`.
        scheme: range rule, and whether the softmax output is quantized as unsigned.

    Raises:
        ModelError: if the type is not registered.
    """
    twin = explicit_form(attention)
    for operand in OPERANDS:
        is_softmax = operand == "probabilities" and not twin.mixes_probabilities
        kind = scheme.softmax if is_softmax else "signed"
        quantizer = activation_quantizer(kind, bits[operand], scheme)
        setattr(twin, operand, QuantIdentity(act_quant=quantizer, return_quant_tensor=False))
        getattr(twin, operand).train(attention.training)
    return twin
