"""Finds attention in an FX graph, and puts taps there: matmul -> softmax -> matmul, or a fused call written out.

Works on the graphs of ``torch.fx`` and on those of Brevitas' own copy of it, which share no type.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from brevitas.function import identity
from brevitas.nn import QuantIdentity
from brevitas.nn.quant_sdpa import QuantScaledDotProductAttention
from brevitas.nn.quant_sdpa import ScaledDotProductAttention
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.attention import Tap

__all__ = ["graph_taps", "is_graph_module", "put_taps"]

_TAPS = "attention_taps"
_MATMULS = (operator.matmul, torch.matmul, "matmul", "__matmul__")
_SOFTMAXES = (F.softmax, torch.softmax, "softmax")
_ARITHMETIC = (operator.add, operator.mul, operator.truediv, torch.add, torch.mul, torch.div, "add", "mul", "div")
_FUSED_MODULES = (ScaledDotProductAttention, QuantScaledDotProductAttention)
# What may stand between the nodes of the pattern and changes no shape.
_PASSED = (nn.Identity, nn.Dropout, QuantIdentity, Tap)


class FusedAttention(nn.Module):
    """``F.scaled_dot_product_attention`` written out, with taps; also Brevitas' quantized module for it.

    Shapes: ``(batch, heads, tokens, head_dim)`` in and out.

    Args:
        source: the module that is replaced, whose quantizers are shared; ``None`` for the plain function.
    """

    def __init__(self, source: nn.Module | None = None):
        super().__init__()
        quantizers = isinstance(source, QuantScaledDotProductAttention)
        for name in ("pre_process_q", "pre_process_k", "pre_process_v") if source is not None else ():
            if getattr(source, name) is not identity:
                raise ModelError(
                    f"{type(source).__name__} with {name} cannot be tapped; expected Brevitas' default, identity."
                )

        def shared(name: str) -> nn.Module:
            return getattr(source, name) if quantizers else nn.Identity()

        self.query = shared("q_scaled_quant")
        self.key_transposed = shared("k_transposed_quant")
        self.softmax_input = shared("softmax_input_quant")
        self.probabilities = shared("attn_output_weights_quant")
        self.value = shared("v_quant")
        self.output = shared("sdpa_output_quant")
        self.logits = Tap()
        self.attention = Tap()
        self.context = Tap()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or is_causal or enable_gqa or dropout_p:
            raise ModelError(
                "scaled_dot_product_attention with a mask, dropout or grouped queries is not known here; expected the "
                "plain attention of a Vision Transformer in evaluation mode."
            )
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        logits = self.logits(self.query(query * factor) @ self.key_transposed(torch.transpose(key, -2, -1)))
        attention = self.attention(torch.softmax(self.softmax_input(logits), dim=-1))
        return self.output(self.context(self.probabilities(attention) @ self.value(value)))


def is_graph_module(model: nn.Module) -> bool:
    """Whether ``model`` is FX-traced, by ``torch.fx`` or by Brevitas."""
    return hasattr(getattr(model, "graph", None), "nodes") and callable(getattr(model, "recompile", None))


def put_taps(model: nn.Module) -> Callable[[], None]:
    """Put taps at the attention of an FX-traced model, in place; it computes what it did.

    They lie in ``model.attention_taps``, one entry with ``logits``, ``attention`` and ``context`` per layer, input side
    first. Logits are what the softmax reads, attention is what it gives, both without quantizers that stand there.

    Returns:
        A function that takes the taps out again.

    Raises:
        ModelError: if the graph has no attention that is known.
    """
    original: Any = model.graph
    graph = copy.deepcopy(original)
    modules = dict(model.named_modules(remove_duplicate=False))
    taps = nn.ModuleList()
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            taps.append(FusedAttention())
        elif node.op == "call_module" and isinstance(modules.get(node.target), _FUSED_MODULES):
            taps.append(FusedAttention(modules[node.target]))
        else:
            pattern = _pattern(node, modules)
            if pattern is not None:
                taps.append(nn.ModuleDict({name: Tap() for name in pattern}))
                for name, place in pattern.items():
                    with graph.inserting_after(place):
                        tapped = graph.call_module(f"{_TAPS}.{len(taps) - 1}.{name}", (place,))
                    # ``tapped`` is fixed by its default: the loop goes on before the function is forgotten.
                    place.replace_all_uses_with(tapped, lambda user, tapped=tapped: user is not tapped)
            continue
        node.op, node.target = "call_module", f"{_TAPS}.{len(taps) - 1}"
    if not len(taps):
        raise ModelError(
            f"No attention found in the graph of {type(model).__name__}: expected matmul -> softmax -> matmul, "
            "scaled_dot_product_attention, or Brevitas' modules for it. Trace the model with prepare_for_fx, or "
            "quantize it by swapping modules: DataFreeCalibrator(model, scheme=...)."
        )
    model.add_module(_TAPS, taps.eval())
    model.graph = graph

    def take_out() -> None:
        del model._modules[_TAPS]
        model.graph = original

    return take_out


@contextmanager
def graph_taps(model: nn.Module) -> Iterator[list[nn.Module]]:
    """A context in which an FX-traced model has taps; yields what holds those of each layer, input side first.

    Raises:
        ModelError: as :func:`put_taps` does.
    """
    take_out: Callable[[], None] = (lambda: None) if hasattr(model, _TAPS) else put_taps(model)
    try:
        yield list(getattr(model, _TAPS))
    finally:
        take_out()


def _pattern(softmax: Any, modules: dict[str, nn.Module]) -> dict[str, Any] | None:
    """The nodes of logits, attention and context around a softmax between two matmuls; None for anything else."""
    if not _calls(softmax, _SOFTMAXES) and not (
        softmax.op == "call_module" and isinstance(modules.get(softmax.target), nn.Softmax)
    ):
        return None
    logits = softmax.all_input_nodes[0]
    while _is_passed(logits, modules):
        logits = logits.all_input_nodes[0]
    product = logits
    while _calls(product, _ARITHMETIC) or _is_passed(product, modules):  # a scale, a bias of positions
        product = product.all_input_nodes[0]
    if not _calls(product, _MATMULS):
        return None
    following = list(softmax.users)
    for user in following:
        if _is_passed(user, modules):
            following.extend(user.users)
        elif _calls(user, _MATMULS):
            return {"logits": logits, "attention": softmax, "context": user}
    return None


def _calls(node: Any, targets: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _is_passed(node: Any, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(node.target), _PASSED)
