"""Which computations of a model that Brevitas' FX flows quantized still take float numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from brevitas.backport.fx.interpreter import Interpreter
from brevitas.fx import GraphModule
from brevitas.nn.mixin.base import QuantLayerMixin
from brevitas.quant_tensor import QuantTensor
from torch import Tensor
from torch import nn

__all__ = ["float_computations"]

# Nodes that move numbers without changing them, and arithmetic on shapes.
_MOVES = frozenset((
    "_assert", "cat", "contiguous", "eq", "expand", "flatten", "getattr", "getitem", "permute", "reshape", "split",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
))  # fmt: skip


@torch.no_grad()
def float_computations(quant_model: GraphModule, image: Tensor) -> Counter[str]:
    """Counts the nodes that compute on at least one tensor that is not quantized, by operation.

    Args:
        quant_model: calibrated.
        image: ``(1, channels, height, width)``.
    """
    watcher = _Watcher(quant_model)
    watcher.run(image)
    return watcher.found


class _Watcher(Interpreter):
    """Runs a graph and looks at what reaches its nodes."""

    def __init__(self, quant_model: GraphModule):
        super().__init__(quant_model)
        self.found: Counter[str] = Counter()

    def run_node(self, n: Any) -> Any:
        if n.op in ("call_function", "call_method", "call_module"):
            operation = self.fetch_attr(n.target) if n.op == "call_module" else n.target
            named = type(operation) if isinstance(operation, nn.Module) else operation
            name = getattr(named, "__name__", named)
            moves = name in _MOVES or isinstance(operation, (nn.Identity, nn.Dropout, QuantLayerMixin))
            inputs = [self.env[node] for node in n.all_input_nodes]
            tensors = [value for value in inputs if isinstance(value, (Tensor, QuantTensor))]
            if not moves and any(not isinstance(value, QuantTensor) for value in tensors):
                self.found[name] += 1
        return super().run_node(n)
