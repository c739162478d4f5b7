"""Running a QCDQ file in ONNX Runtime, on its own and in step with PyTorch (see verify.py for why)."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.export.capture import Call
from maskaq_brevitas.export.capture import capture_calls
from maskaq_brevitas.export.compare import InStep
from maskaq_brevitas.export.compare import blame
from maskaq_brevitas.export.compare import compare_quantizer
from maskaq_brevitas.export.compare import next_call
from maskaq_brevitas.export.compare import relative_difference
from maskaq_brevitas.export.execute import DYNAMIC_BATCH
from maskaq_brevitas.export.execute import read_onnx
from maskaq_brevitas.export.execute import whole_batches
from maskaq_brevitas.export.integer_weights import along
from maskaq_brevitas.export.integer_weights import channel_axis
from maskaq_brevitas.export.outputs import joined

__all__ = ["QcdqModel", "load_qcdq", "qcdq_in_step", "qcdq_session"]

class QcdqModel(nn.Module):
    """A QCDQ file as a module: images ``(batch, channels, height, width)`` to logits, by ONNX Runtime, on the CPU.

    The session has ``session.disable_quant_qdq`` set to ``"1"``: ONNX Runtime then computes what the nodes say, in
    float32 between the quantizers. By default it also merges a weight's DequantizeLinear into the matrix product, which
    rounds differently by about 1e-6 (measured with 1.32), and a rounding tie now and then decides differently. Files as
    Brevitas alone writes them, with one scale per channel at an activation, it may get wrong by far more.

    Args:
        path: a file written by :func:`maskaq_brevitas.export.export_qcdq`.
        shape: ``(channels, height, width)`` of the images.

    Raises:
        ExportError: the file is not there, is no ONNX file, or ONNX Runtime refuses it.
        InputError: the file takes images of another shape.
    """

    def __init__(self, path: str | os.PathLike[str], shape: tuple[int, ...]):
        super().__init__()
        proto, self.batch = load_qcdq(path, shape)
        self.session = qcdq_session(proto)

    def forward(self, images: Tensor) -> Tensor:
        name = self.session.get_inputs()[0].name
        found = [_outputs(self.session.run(None, {name: chunk.numpy()})) for chunk in whole_batches(images, self.batch)]
        return torch.cat(found)[: len(images)]


def _outputs(values: list[NDArray[Any]]) -> Tensor:
    return joined([torch.from_numpy(value) for value in values])


def load_qcdq(path: str | os.PathLike[str], shape: tuple[int, ...]) -> tuple[Any, int]:
    """Read a QCDQ file. Gives the ``onnx.ModelProto`` and the number of images to run it on.

    Raises:
        ExportError: the file is not there or is no ONNX file.
        InputError: the file takes images of another shape.
    """
    proto, batch = read_onnx(path, shape, "QCDQ")
    return proto, batch.dim_value or DYNAMIC_BATCH


def qcdq_session(proto: Any) -> Any:
    """An ``onnxruntime.InferenceSession`` that computes what the nodes of a QCDQ graph say, with torch's thread count.

    Raises:
        ExportError: ONNX Runtime refuses the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} refuses the file: {str(error)[-600:]}. It is damaged, or this "
            "version of ONNX Runtime does not know its operators."
        ) from error


@dataclass(frozen=True)
class _Place:
    """A quantizer of the graph: its DequantizeLinear, and what leads to it from its input (None for a stored weight).
    """

    index: int
    node: Any
    source: str | None
    order: list[int] | None
    scale: NDArray[Any]
    zero_point: NDArray[Any]
    axis: int

    @property
    def result(self) -> str:
        return str(self.node.output[0])

    def turned(self, value: NDArray[Any]) -> NDArray[Any]:
        """A value of PyTorch's in the layout of this place."""
        return value if self.order is None else value.transpose(self.order)

    def parameters(self, dimensions: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Scale and zero point in a shape that broadcasts."""
        return along(self.scale, self.axis, dimensions), along(self.zero_point, self.axis, dimensions)


def _places(graph: Any) -> Iterator[_Place]:
    """Every quantizer of the graph, in order."""
    from onnx import numpy_helper

    parameters = {tensor.name: tensor for tensor in graph.initializer}
    writers = {name: node for node in graph.node for name in node.output}
    for index, node in enumerate(graph.node):
        if node.op_type != "DequantizeLinear":
            continue
        scale = numpy_helper.to_array(parameters[node.input[1]])
        zero_point = numpy_helper.to_array(parameters[node.input[2]]).astype(np.int32)
        name, order = node.input[0], None
        while name not in parameters and writers[name].op_type in ("Clip", "Transpose"):
            if writers[name].op_type == "Transpose":
                order = next(list(entry.ints) for entry in writers[name].attribute if entry.name == "perm")
            name = writers[name].input[0]
        source = writers[name].input[0] if name in writers else None
        yield _Place(index, node, source, order, scale, zero_point, channel_axis(node))


def qcdq_in_step(proto: Any, model: nn.Module, images: Tensor, tolerance: float) -> InStep:
    """Execute one batch such that what follows each quantizer starts from PyTorch's values; compare all of them.

    The graph is cut behind each activation quantizer; one run of ONNX Runtime then computes all pieces.

    Args:
        proto: ``onnx.ModelProto`` of a QCDQ file.
        model: the Brevitas model in eval mode on the CPU.
        images: ``(batch, channels, height, width)``.
        tolerance: largest difference, relative to the largest absolute value of the compared tensor.

    Raises:
        ExportError: ONNX Runtime refuses the graph.
    """
    from brevitas.proxy.quant_proxy import QuantProxyFromInjector

    expected, calls = capture_calls(model, images, lambda module: isinstance(module, QuantProxyFromInjector))
    modules = dict(model.named_modules())
    matched: list[tuple[_Place, Tensor, Tensor]] = []
    for place in _places(proto.graph):
        call = next_call(place.node, calls, modules)
        if call is not None and call.input is not None:
            matched.append((place, call.input, call.output))

    pieces, feed = _cut(proto, [(place, place.turned(given.numpy())) for place, _, given in matched if place.source])
    feed[proto.graph.input[0].name] = images.numpy()
    outputs = [value.name for value in proto.graph.output]
    wanted = {name for place, *_ in matched for name in (place.source, place.result) if name} | set(outputs)
    context = _run(pieces, feed, wanted)

    def failed(index: int, problem: str) -> InStep:
        every = _run(pieces, feed, {name for node in pieces.graph.node for name in node.output if name})
        nodes = list(proto.graph.node)
        return InStep(float("nan"), flips, len(matched), blame(nodes, model, images, every, index, problem, tolerance))

    flips = 0
    for place, taken, given in matched:
        result = context[place.result]
        source = None if place.source is None else place.turned(context[place.source])
        seen = Call(*(torch.from_numpy(place.turned(tensor.numpy())) for tensor in (taken, given)))
        problem, _, flipped = compare_quantizer(seen, source, result, *place.parameters(result.ndim), tolerance)
        if problem:
            return failed(place.index, problem)
        flips += flipped
    difference = relative_difference(_outputs([context[name] for name in outputs]).numpy(), expected.numpy())
    if not difference <= tolerance:
        problem = f"its result differs by {difference:.3g} of the largest logit"
        if not matched:
            problem += " (no quantizer of the file could be matched with the model's)"
        return failed(len(proto.graph.node) - 1, problem)
    return InStep(difference, flips, len(matched), None)


def _cut(proto: Any, places: list[tuple[_Place, NDArray[Any]]]) -> tuple[Any, dict[str, NDArray[Any]]]:
    """A copy of the graph in which readers of a quantizer read an input instead, and the values for these inputs."""
    import onnx

    pieces = onnx.ModelProto.FromString(proto.SerializeToString())
    feed = {f"{place.result}.given": np.ascontiguousarray(value) for place, value in places}
    renamed = {place.result: f"{place.result}.given" for place, _ in places}
    for node in pieces.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    pieces.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape) for name, value in feed.items()
    )
    return pieces, feed


def _run(pieces: Any, feed: dict[str, NDArray[Any]], wanted: set[str]) -> dict[str, NDArray[Any]]:
    """The tensors of these names."""
    import onnx

    present = {value.name for value in pieces.graph.output}
    whole = onnx.ModelProto.FromString(pieces.SerializeToString())
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted - present - set(feed)))
    names = [value.name for value in whole.graph.output]
    return dict(zip(names, qcdq_session(whole).run(names, feed), strict=True)) | feed
