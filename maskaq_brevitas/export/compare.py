"""Comparing the nodes of an executed file with the modules of PyTorch that they came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch import nn

from maskaq_brevitas.export.capture import Call
from maskaq_brevitas.export.capture import capture_calls
from maskaq_brevitas.export.capture import is_leaf
from maskaq_brevitas.export.qonnx import QUANT_OPS
from maskaq_brevitas.export.scopes import module_scopes

__all__ = ["Context", "Failure", "InStep", "blame", "compare_quantizer", "next_call", "relative_difference"]

#: Every tensor of a graph by its name.
Context = dict[str, NDArray[Any]]

#: Operators that are part of a quantizer, in QONNX or QCDQ.
_QUANTIZERS = (*QUANT_OPS, "QuantizeLinear", "DequantizeLinear", "Clip")


@dataclass(frozen=True)
class Failure:
    """The first wrong node, if one is known, and a sentence about it."""

    node: str | None
    message: str


@dataclass(frozen=True)
class InStep:
    """Result of a run in step: relative difference of the logits, ties that flipped, quantizers that were matched."""

    difference: float
    flips: int
    quantizers: int
    failure: Failure | None


def next_call(node: Any, calls: dict[str, list[Call]], modules: dict[str, nn.Module]) -> Call | None:
    """PyTorch's call of the quantizer that a node came from; takes it off the list, as a quantizer may be shared."""
    name = next((scope for scope in reversed(module_scopes(node)) if calls.get(scope)), None)
    if name is None:
        return None
    # A weight quantizer gives the same each time, and its node may have been merged: its call stays.
    call = calls[name][0] if len(calls[name]) == 1 else calls[name].pop(0)
    # QuantReLU and the like: the activation function is part of the quantizer in Brevitas, its own node in ONNX.
    activation = getattr(getattr(modules[name], "fused_activation_quant_proxy", None), "activation_impl", None)
    if activation is not None and call.input is not None:
        return Call(activation(call.input), call.output)
    return call


def compare_quantizer(
    call: Call,
    source: NDArray[Any] | None,
    result: NDArray[Any],
    scale: NDArray[Any],
    zero_point: NDArray[Any],
    tolerance: float,
) -> tuple[str | None, NDArray[Any], int]:
    """Compare a quantizer of the file with PyTorch's.

    Args:
        call: of PyTorch's quantizer.
        source: what the file's quantizer took; None if that is a weight of which the file has only the result.
        result: what it gave.
        scale: of the quantizer, in a shape that broadcasts to ``result``; so is ``zero_point``.
        tolerance: largest difference of the inputs, relative to the largest absolute value.

    Returns:
        What is wrong (None if nothing), PyTorch's output in the layout of the file, and the number of rounding flips.
    """
    if call.input is None or sorted(call.input.shape) != sorted(result.shape):
        return f"its shape {result.shape} is not PyTorch's {tuple(call.output.shape)}", result, 0
    best: tuple[str | None, NDArray[Any], int] | None = None
    # The transpose of a Linear's weight is folded into the parameter in front of the quantizer.
    for turned in (False, True):
        taken, given = (tensor.numpy() for tensor in (call.input, call.output))
        if turned:
            taken, given = taken.T, given.T
        if given.shape != result.shape:
            continue
        outcome = _compare_values(
            taken if source is None else source, result, scale, zero_point, taken, given, tolerance
        )
        if outcome[0] is None:
            return outcome
        best = best or outcome
        if given.ndim != 2:
            break
    return best or (f"its shape {result.shape} is not PyTorch's {tuple(call.output.shape)}", result, 0)


def _compare_values(
    source: NDArray[Any],
    result: NDArray[Any],
    scale: NDArray[Any],
    zero_point: NDArray[Any],
    taken: NDArray[Any],
    given: NDArray[Any],
    tolerance: float,
) -> tuple[str | None, NDArray[Any], int]:
    """The comparison itself, all in one layout: ``source`` and ``result`` of the file against ``taken`` and ``given``.
    """
    difference = relative_difference(source, taken)
    if not difference <= tolerance:
        return f"its input differs by {difference:.3g} of the largest value", given, 0
    scale, zero_point = scale.astype(np.float64), zero_point.astype(np.float64)
    steps = np.abs(result.astype(np.float64) - given) / scale
    # Distance from the rounding tie, in steps. The tie may be missed by as much as the inputs differ.
    position = taken.astype(np.float64) / scale + zero_point
    from_tie = np.abs(position - np.floor(position) - 0.5)
    on_tie = from_tie <= 1e-3 + 2 * np.abs(source.astype(np.float64) - taken) / scale
    flipped = on_tie & (np.abs(steps - 1) < 1e-3)
    wrong = ~((steps < 1e-3) | flipped)
    if wrong.any():
        return f"{wrong.mean():.2%} of its values differ, by up to {np.max(steps):.3g} steps", given, 0
    return None, given, int(flipped.sum())


def relative_difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest absolute difference, divided by the largest absolute expected value; inf for unequal shapes."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), np.finfo(np.float32).tiny))


def blame(
    nodes: Sequence[Any], model: nn.Module, images: Tensor, context: Context, last: int, problem: str, tolerance: float
) -> Failure:
    """The first node, up to the one at ``last``, whose layer gives something else than in PyTorch.

    A layer's result is that of the last node that came from it. This match can miss after graph optimisations, so it
    only serves to name a node nearer to the cause; whether the file is right was decided by the quantizers.
    """
    calls = capture_calls(model, images, is_leaf)[1]
    ends: dict[str, int] = {}
    for index, node in enumerate(nodes):
        ends |= {scope: index for scope in module_scopes(node) if len(calls.get(scope, ())) == 1}
    for layer, index in sorted(ends.items(), key=lambda item: item[1]):
        node = nodes[index]
        found, expected = context[node.output[0]], calls[layer][0].output.numpy()
        # Quantizers up to here are in step, so only a layer that lies fully before the failure has been computed.
        if index >= last and nodes[last].op_type in _QUANTIZERS:
            break
        if node.op_type in _QUANTIZERS or found.shape != expected.shape:
            continue
        difference = relative_difference(found, expected)
        if not difference <= tolerance:
            problem = f"its result differs by {difference:.3g} of the largest value"
            return _failure(node, layer, problem)
    node = nodes[last]
    known = set(dict(model.named_modules()))
    return _failure(node, next((scope for scope in reversed(module_scopes(node)) if scope in known), ""), problem)


def _failure(node: Any, module: str, problem: str) -> Failure:
    where = f"from module '{module}'" if module else "from no known module"
    return Failure(node.name, f"The first diverging node is {node.name} ({node.op_type}, {where}): {problem}.")
