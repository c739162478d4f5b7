import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx import helper
from onnx import numpy_helper

from maskaq_brevitas.export.execute_qcdq import qcdq_session
from maskaq_brevitas.export.integer_weights import store_integer_weights
from maskaq_brevitas.export.qcdq import turn_codes

WEIGHT = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
SCALE = np.float32([0.1, 0.2, 0.3])


def weight_graph(opset=21, low=-7, high=7, zero_point=None, turn=False, weight=WEIGHT):
    """x @ W of a weight as Brevitas writes it: QuantizeLinear, Clip, DequantizeLinear, and a Transpose for a Linear."""
    zero_point = np.zeros(3, np.int8) if zero_point is None else zero_point
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=0),
        helper.make_node("Clip", ["q", "low", "high"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["d"], axis=0),
        *([helper.make_node("Transpose", ["d"], ["t"], perm=[1, 0])] if turn else []),
        helper.make_node("MatMul", ["x", "t" if turn else "d"], ["y"]),
    ]
    values = {"w": weight, "s": SCALE, "z": zero_point}
    values |= {"low": np.array(low, zero_point.dtype), "high": np.array(high, zero_point.dtype)}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5 if turn else 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", None])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run(model):
    x = np.eye(model.graph.input[0].type.tensor_type.shape.dim[1].dim_value, dtype=np.float32)
    return qcdq_session(model).run(None, {"x": x})[0]


def stored(model):
    """The weight's integer initializer."""
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    return next(tensor for tensor in model.graph.initializer if tensor.name == node.input[0])


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize(
    ("opset", "low", "high", "zero_point", "kind"),
    [
        (21, -7, 7, np.int8([0, 0, 0]), TensorProto.INT4),
        (20, -7, 7, np.int8([0, 0, 0]), TensorProto.INT8),
        (21, -127, 127, np.int8([0, 0, 0]), TensorProto.INT8),
        (21, 0, 15, np.uint8([7, 8, 3]), TensorProto.UINT4),
        (21, 0, 255, np.uint8([128, 120, 0]), TensorProto.UINT8),
        (21, 0, 15, np.uint8([7, 8, 16]), TensorProto.UINT8),  # the zero point does not fit 4 bits
    ],
)
def test_integers_are_stored_and_no_value_changes(turn, opset, low, high, zero_point, kind):
    model = weight_graph(opset, low, high, zero_point, turn)
    if kind == TensorProto.INT8 and low == -127:
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(10 * WEIGHT, "w"))
    before = run(model)
    count = store_integer_weights(model)
    onnx.checker.check_model(model)
    assert np.array_equal(run(model), before)
    assert stored(model).data_type == kind
    assert (count.int4, count.int8) == ((1, 0) if kind in (TensorProto.INT4, TensorProto.UINT4) else (0, 1))
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "MatMul"]
    assert {tensor.name for tensor in model.graph.initializer} == set(model.graph.node[0].input)


def test_codes_by_hand():
    weight = np.float32([[0.05, 0.15, -5, 5, 0.1], [0.3, -0.3, 0.5, 0, 0], [0.3, 0.44, 0.46, -0.6, 0]])
    model = weight_graph(weight=weight)
    store_integer_weights(model)
    # Halves go to the even neighbour: 0.5 -> 0, 1.5 -> 2 (0.3 / 0.2 is just above 1.5 in float32, and so 2 too).
    expected = [[0, 2, -7, 7, 1], [2, -2, 2, 0, 0], [1, 1, 2, -2, 0]]
    assert np.array_equal(numpy_helper.to_array(stored(model)).astype(int), expected)
    assert len(stored(model).raw_data) == 8  # 15 codes


def test_a_weight_that_two_nodes_read_is_not_turned():
    model = weight_graph(turn=True)
    model.graph.node.append(helper.make_node("ReduceSum", ["d"], ["sum"], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, []))
    before = run(model)
    store_integer_weights(model)
    assert np.array_equal(run(model), before)
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "Transpose", "MatMul", "ReduceSum"]


def test_activations_stay_as_they_are():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dequantize"),
        helper.make_node("Transpose", ["d"], ["y"], name="turn", perm=[1, 0]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 3])],
        [numpy_helper.from_array(np.float32(0.5), "s"), numpy_helper.from_array(np.int8(0), "z")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    before = run(model)
    assert store_integer_weights(model).int8 == 0
    turn_codes(model.graph)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["QuantizeLinear", "Transpose", "DequantizeLinear"]
    assert np.array_equal(run(model), before)
