"""Running a QONNX graph node by node, on its own and in step with PyTorch (see verify.py for why)."""

import os
from typing import Any
from typing import Literal

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.export.capture import capture_calls
from maskaq_brevitas.export.compare import Context
from maskaq_brevitas.export.compare import InStep
from maskaq_brevitas.export.compare import blame
from maskaq_brevitas.export.compare import compare_quantizer
from maskaq_brevitas.export.compare import next_call
from maskaq_brevitas.export.compare import relative_difference
from maskaq_brevitas.export.outputs import joined
from maskaq_brevitas.export.process import quiet
from maskaq_brevitas.export.qonnx import QUANT_OPS

__all__ = ["DYNAMIC_BATCH", "QonnxExecutor", "QonnxModel", "load_for_batch", "read_onnx", "whole_batches"]

#: Images per run of a dynamic file. More at a time is faster; captured activations are the limit.
DYNAMIC_BATCH = 4


def read_onnx(
    path: str | os.PathLike[str], shape: tuple[int, ...] | None, kind: Literal["QONNX", "QCDQ"]
) -> tuple[Any, Any]:
    """An exported file as ``onnx.ModelProto``, and the first dimension of its input.

    Args:
        shape: (channels, height, width) of the images that will come; None accepts the file's.

    Raises:
        ExportError: the file is not there or is no ONNX file.
        InputError: the file takes images of another shape.
    """
    import onnx

    try:
        proto = onnx.load(os.fspath(path))
        batch, *rest = proto.graph.input[0].type.tensor_type.shape.dim
    except Exception as error:
        raise ExportError(
            f"Expected a {kind} file at {os.fspath(path)}, got {type(error).__name__}: {error}. "
            f"Write it with export_{kind.lower()}."
        ) from error
    wanted = tuple(dimension.dim_value for dimension in rest)
    if shape is not None and wanted != shape:
        raise InputError(f"images: expected (channels, height, width) {wanted} as in {path}, got {shape}.")
    return proto, batch


def load_for_batch(path: str | os.PathLike[str], shape: tuple[int, ...] | None, dynamic: int) -> tuple[Any, int]:
    """Read a QONNX file for execution.

    The executor needs all shapes as numbers, so a symbolic batch is replaced in memory; the file stays as it is.

    Args:
        shape: (channels, height, width) of the images that will come; None accepts the file's.
        dynamic: batch to give a file with a symbolic batch.

    Returns:
        A qonnx ``ModelWrapper`` and its batch size.

    Raises:
        ExportError: the file is not there or is no ONNX file.
        InputError: the file takes images of another shape.
    """
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.fold_constants import FoldConstants
    from qonnx.transformation.infer_shapes import InferShapes

    proto, batch = read_onnx(path, shape, "QONNX")
    if not batch.dim_param:
        return ModelWrapper(proto), batch.dim_value
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = dynamic
    # Shapes follow from constants (the class token, expanded to the batch) and constants from shapes, hence in turns.
    graph = ModelWrapper(proto)
    for step in (InferShapes(), FoldConstants(exclude_op_types=list(QUANT_OPS)), InferShapes()):
        graph = graph.transform(step)
    return graph, dynamic


class QonnxModel(nn.Module):
    """A QONNX file as a module: images ``(batch, channels, height, width)`` to logits, by
    :class:`QonnxExecutor`, on the CPU.

    Args:
        path: a file written by :func:`maskaq_brevitas.export.export_qonnx`.
        shape: ``(channels, height, width)`` of the images.

    Raises:
        ExportError: the file is not there or is no ONNX file; when called: a node could not be executed.
        InputError: the file takes images of another shape.
    """

    def __init__(self, path: str | os.PathLike[str], shape: tuple[int, ...]):
        super().__init__()
        with quiet():
            graph, self.batch = load_for_batch(path, shape, DYNAMIC_BATCH)
            self.executor = QonnxExecutor(graph)

    def forward(self, images: Tensor) -> Tensor:
        with quiet():
            return torch.cat([self.executor(chunk) for chunk in whole_batches(images, self.batch)])[: len(images)]


def whole_batches(images: Tensor, batch: int) -> list[Tensor]:
    """Batches of exactly ``batch`` images; the last is filled up with its last image."""
    chunks = list(images.split(batch)) if len(images) else []
    if chunks and len(chunks[-1]) < batch:
        last = chunks[-1]
        chunks[-1] = torch.cat([last, last[-1:].expand(batch - len(last), -1, -1, -1)])
    return chunks


class QonnxExecutor:
    """Executes a QONNX graph node by node on the CPU: standard operators in ONNX Runtime, the others by qonnx.

    What qonnx' own ``execute_onnx`` does, except that it builds a new session for every standard node of every pass,
    and looks up, per node, annotations that only integer graphs of FINN have: most of its time on a ViT. Nor can it be
    stepped.

    Args:
        graph: qonnx ``ModelWrapper`` for one batch size; not changed.
    """

    def __init__(self, graph: Any):
        self.graph = graph
        self._opsets = graph.get_opset_imports()
        self._sessions: dict[str, Any] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of one batch ``(batch, channels, height, width)``.

        Of a graph with several outputs all in one, ``(batch, values)``.

        Raises:
            ExportError: a node could not be executed.
        """
        context = self._context(images)
        for node in self.graph.graph.node:
            self.run(node, context)
        return self._outputs(context)

    def in_step(self, model: nn.Module, images: Tensor, tolerance: float) -> InStep:
        """Execute one batch, set each quantizer's output to PyTorch's, and stop at the first wrong node.

        Args:
            model: the Brevitas model in eval mode on the CPU.
            images: ``(batch, channels, height, width)``.
            tolerance: largest difference, relative to the largest absolute value of the compared tensor.
        """
        from brevitas.proxy.quant_proxy import QuantProxyFromInjector

        expected, calls = capture_calls(model, images, lambda module: isinstance(module, QuantProxyFromInjector))
        modules = dict(model.named_modules())
        nodes, context = self.graph.graph.node, self._context(images)
        matched = flips = 0
        for index, node in enumerate(nodes):
            self.run(node, context)
            call = next_call(node, calls, modules) if node.op_type in QUANT_OPS else None
            if call is None:
                continue
            source, result = context[node.input[0]], context[node.output[0]]
            problem, synchronised, flipped = compare_quantizer(
                call, source, result, context[node.input[1]], context[node.input[2]], tolerance
            )
            if problem:
                broken = blame(nodes, model, images, context, index, problem, tolerance)
                return InStep(float("nan"), flips, matched, broken)
            matched, flips = matched + 1, flips + flipped
            context[node.output[0]] = synchronised

        difference = relative_difference(self._outputs(context).numpy(), expected.numpy())
        failure = None
        if not difference <= tolerance:
            problem = f"its result differs by {difference:.3g} of the largest logit"
            if not matched:
                problem += " (no quantizer of the file could be matched with the model's)"
            failure = blame(nodes, model, images, context, len(nodes) - 1, problem, tolerance)
        return InStep(difference, flips, matched, failure)

    def run(self, node: Any, context: Context) -> None:
        """Execute one node: read its inputs from ``context``, and write its outputs there.

        Raises:
            ExportError: it could not be executed.
        """
        from qonnx.core.onnx_exec import execute_node
        from qonnx.custom_op.registry import is_custom_op

        version = self._opsets.get(node.domain, self._opsets[""])
        has_subgraph = any(attribute.HasField("g") for attribute in node.attribute)
        try:
            if has_subgraph or is_custom_op(node.domain, node.op_type):
                execute_node(node, context, self.graph.graph, version)
                return
            given = {name: context[name] for name in node.input if name}
            key = node.output[0]
            if key not in self._sessions:
                self._sessions[key] = self._session(node, given, version)
            context.update(zip(filter(None, node.output), self._sessions[key].run(None, given), strict=True))
        except Exception as error:
            raise ExportError(
                f"Node {node.name} ({node.op_type}) could not be executed: {type(error).__name__}: "
                f"{str(error)[-600:]}. The file is damaged, or holds an operator that ONNX Runtime and qonnx do not "
                "know."
            ) from error

    def _session(self, node: Any, given: Context, version: int) -> Any:
        """An ONNX Runtime session of this node alone, for inputs of these types and shapes."""
        import onnx
        import onnxruntime

        inputs = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in given.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        graph = onnx.helper.make_graph([node], "node", inputs, outputs)
        opset = onnx.helper.make_opsetid(node.domain, version)
        proto = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=self.graph.model.ir_version)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # else hundreds of sessions have threads of their own
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _context(self, images: Tensor) -> Context:
        """Every tensor of the graph by name: parameters, the images, and buffers for the rest."""
        context: Context = self.graph.make_empty_exec_context()
        context[self.graph.graph.input[0].name] = images.numpy()
        return context

    def _outputs(self, context: Context) -> Tensor:
        return joined([torch.from_numpy(context[value.name]) for value in self.graph.graph.output])
