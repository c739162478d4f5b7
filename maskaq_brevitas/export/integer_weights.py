"""QuantizeLinear of constant weights -> weights stored as integers, of 4 bits where they fit, in an ONNX QCDQ graph.

torch's dynamo exporter cannot look at the values of a weight, so Brevitas leaves weights in float32 behind a
QuantizeLinear (https://github.com/Xilinx/brevitas/issues/1346). What these nodes would compute is computed here, once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["INT4_OPSET", "IntegerWeights", "along", "channel_axis", "store_integer_weights"]

#: First version of ONNX' operators whose DequantizeLinear takes 4-bit integers.
INT4_OPSET = 21

Constants = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class IntegerWeights:
    """Number of weights stored as 8-bit and as 4-bit integers."""

    int8: int
    int4: int


def store_integer_weights(model_proto: Any) -> IntegerWeights:
    """Compute QuantizeLinear and Clip of constant weights, in place, and leave the DequantizeLinear behind them.

    A Transpose of a weight (torch stores a Linear's as ``(out, in)``, MatMul wants ``(in, out)``) is applied to the
    integers too. Codes that fit 4 bits are stored as INT4 or UINT4, two in a byte, if the graph's opset has them. No
    value changes.

    Args:
        model_proto: an ``onnx.ModelProto`` with QuantizeLinear, Clip and DequantizeLinear as Brevitas writes them.
    """
    from onnx import numpy_helper

    graph = model_proto.graph
    opset = next(entry.version for entry in model_proto.opset_import if not entry.domain)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    folded: list[Any] = []
    counts = {4: 0, 8: 0}
    for node in list(graph.node):
        if not all(name in constants for name in node.input if name):
            continue
        if node.op_type == "QuantizeLinear":
            constants[node.output[0]] = _quantize(constants, node)
        elif node.op_type == "Clip" and constants[node.input[0]].dtype.kind in "iu":
            constants[node.output[0]] = np.clip(*(constants[name] for name in node.input))
        elif node.op_type == "DequantizeLinear" and constants[node.input[0]].ndim > 1:
            folded += _turn(graph, node, constants)
            counts[_store(graph, node, constants, opset)] += 1
            continue
        else:
            continue
        folded.append(node)
    for node in folded:
        graph.node.remove(node)
    _drop_unused(graph)
    return IntegerWeights(int8=counts[8], int4=counts[4])


def _quantize(constants: Constants, node: Any) -> NDArray[Any]:
    """What a QuantizeLinear gives: a division in float32, rounding half to even, as PyTorch does it."""
    value, scale, zero_point = (constants[name] for name in node.input)
    limits = np.iinfo(zero_point.dtype)
    scale, offset = (along(part, channel_axis(node), value.ndim) for part in (scale, zero_point))
    codes = np.rint(value / scale) + offset.astype(np.float32)
    clipped: NDArray[Any] = np.clip(codes, limits.min, limits.max).astype(zero_point.dtype)
    return clipped


def along(values: NDArray[Any], axis: int, dimensions: int) -> NDArray[Any]:
    """A vector, one value per channel, in the shape in which it broadcasts along ``axis``; a scalar stays one."""
    if not values.ndim:
        return values
    return values.reshape([-1 if index == axis % dimensions else 1 for index in range(dimensions)])


def channel_axis(node: Any) -> int:
    """The axis along which a QuantizeLinear or DequantizeLinear has its scales."""
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)


def _turn(graph: Any, node: Any, constants: Constants) -> list[Any]:
    """Apply the Transpose that alone follows a weight's DequantizeLinear to its integers; gives the node to remove."""
    readers = [reader for reader in graph.node if node.output[0] in reader.input]
    if len(readers) != 1 or readers[0].op_type != "Transpose":
        return []
    (turn,) = readers
    order = next((list(entry.ints) for entry in turn.attribute if entry.name == "perm"), None)
    codes = constants[node.input[0]]
    order = order or list(range(codes.ndim))[::-1]
    name = f"{node.input[0]}_turned"
    constants[name] = codes.transpose(order)
    axis = channel_axis(node) % codes.ndim
    _set_axis(node, order.index(axis) if constants[node.input[1]].ndim else None)
    node.input[0], node.output[0] = name, turn.output[0]
    return [turn]


def _set_axis(node: Any, axis: int | None) -> None:
    from onnx import helper

    kept = [attribute for attribute in node.attribute if attribute.name != "axis"]
    del node.attribute[:]
    node.attribute.extend(kept + ([] if axis is None else [helper.make_attribute("axis", axis)]))


def _store(graph: Any, node: Any, constants: Constants, opset: int) -> int:
    """Write the codes and zero point that a DequantizeLinear reads as initializers; gives their width in bits."""
    from onnx import TensorProto
    from onnx import helper

    codes = constants[node.input[0]]
    zero_point = (
        constants[node.input[2]] if len(node.input) > 2 else np.zeros_like(constants[node.input[1]], codes.dtype)
    )
    low, high = (-8, 7) if codes.dtype.kind == "i" else (0, 15)
    small = opset >= INT4_OPSET and all(low <= part.min() and part.max() <= high for part in (codes, zero_point))
    if small:
        kind = TensorProto.INT4 if codes.dtype.kind == "i" else TensorProto.UINT4
    else:
        kind = helper.np_dtype_to_tensor_dtype(codes.dtype)
    base = f"{node.output[0]}_integer"
    names = [base, node.input[1], f"{base}_zero_point"]
    for name, part in ((names[0], codes), (names[2], zero_point)):
        content = (_packed(part) if small else part).tobytes()
        graph.initializer.append(helper.make_tensor(name, kind, part.shape, content, raw=True))
    del node.input[:]
    node.input.extend(names)
    return 4 if small else 8


def _packed(codes: NDArray[Any]) -> NDArray[Any]:
    """4-bit codes two in a byte, the first in the lower half, as ONNX stores them."""
    nibbles = codes.flatten().view(np.uint8) & 0xF
    pairs = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8)).reshape(-1, 2)
    packed: NDArray[Any] = pairs[:, 0] | pairs[:, 1] << 4
    return packed


def _drop_unused(graph: Any) -> None:
    """Remove initializers and shape notes of tensors that no node reads or writes any more."""
    alive = {name for node in graph.node for name in (*node.input, *node.output)} | {
        value.name for value in graph.output
    }
    for entries in (graph.initializer, graph.value_info):
        kept = [entry for entry in entries if entry.name in alive]
        del entries[:]
        entries.extend(kept)
