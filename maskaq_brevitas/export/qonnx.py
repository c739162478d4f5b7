"""Quant model -> QONNX file: Brevitas' own exporter, qonnx' own cleanup, and the checks that neither of them does."""

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.export.capture import Call
from maskaq_brevitas.export.capture import capture_calls
from maskaq_brevitas.export.process import quiet
from maskaq_brevitas.export.process import require
from maskaq_brevitas.export.scopes import module_scopes
from maskaq_brevitas.export.scopes import record_scopes

__all__ = ["BATCH_DIMENSION", "QUANT_OPS", "QonnxFile", "count_quantizers", "enabled_quantizers", "export_qonnx"]

#: Name of the symbolic first dimension of a file that was exported with ``dynamic_batch=True``.
BATCH_DIMENSION = "batch"
#: Operators of the QONNX standard that a Brevitas quantizer becomes.
QUANT_OPS = ("Quant", "BipolarQuant")


@dataclass(frozen=True, kw_only=True)
class QonnxFile:
    """A QONNX file on disk.

    Attributes:
        path: where it lies.
        opset: version of the default ONNX operator set.
        quant_nodes: number of quantizer nodes in the graph.
        bytes: size on disk. Weights are stored in float32 in front of their Quant node, whatever their bit width.
        input_shape: (channels, height, width) of the input image, in pixels.
        dynamic_batch: whether the first dimension is symbolic.
    """

    path: Path
    opset: int
    quant_nodes: int
    bytes: int
    input_shape: tuple[int, int, int]
    dynamic_batch: bool


def enabled_quantizers(model: nn.Module) -> dict[str, nn.Module]:
    """Quantizer proxies of a Brevitas model that are switched on (weights, biases, activations), by module name."""
    from brevitas.proxy.quant_proxy import QuantProxyFromInjector

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantProxyFromInjector) and module.is_quant_enabled
    }


def count_quantizers(model: nn.Module) -> int:
    """Number of quantizers of a Brevitas model that are switched on; one shared by several layers counts once."""
    return len(enabled_quantizers(model))


def export_qonnx(
    quant_model: nn.Module,
    path: str | os.PathLike[str],
    *,
    input_shape: tuple[int, int, int],
    dynamic_batch: bool = False,
    batch_size: int = 1,
) -> QonnxFile:
    """Write a Brevitas model as a cleaned QONNX file.

    A copy of the model is exported, in eval mode, on the CPU, in float32: the model that is passed in is not touched.
    The file appears under its name only when whole. An existing file of that name is replaced.

    Args:
        quant_model: takes images ``(batch, channels, height, width)``, gives logits ``(batch, classes)``.
        path: the file to write; its folder must exist.
        input_shape: (channels, height, width), in pixels.
        dynamic_batch: leave the first dimension symbolic. ONNX tools take such a file; most QONNX tools (the qonnx
            executor, FINN) want a fixed batch.
        batch_size: the fixed batch; must be 1 with ``dynamic_batch``, where it has no meaning.

    Raises:
        InputError: ``input_shape`` or ``batch_size`` is out of range.
        MissingExtraError: onnx, onnxscript, onnxoptimizer or qonnx is not installed.
        ExportError: the folder does not exist, the model has no quantizers, the exporter failed, or quantizers of the
            model are missing in the graph.
    """
    target = Path(path)
    _check_arguments(target, input_shape, dynamic_batch, batch_size)
    if not count_quantizers(quant_model):
        raise ExportError(
            f"Expected a Brevitas model with quantizers, got {type(quant_model).__name__} with none switched on. "
            "Quantize the model first, and leave modes that disable its quantizers before exporting."
        )
    dynamo = _has_dynamo()
    require("onnx", "onnxoptimizer", "qonnx", *(["onnxscript"] if dynamo else []))

    model = copy.deepcopy(quant_model).cpu().float().eval()
    names = [name for name, _ in model.named_modules()]
    with quiet():
        proto = _export(model, input_shape, batch_size, dynamic_batch, dynamo)
        _check_batch(proto, dynamic_batch)
        record_scopes(proto, names)
        wrapper = _clean(proto, dynamic_batch)
        reference = copy.deepcopy(quant_model).cpu().float().eval()
        quant_nodes = _check_quantizers(wrapper.graph, reference, tuple(input_shape), batch_size)
    with whole_file(target) as temporary:
        temporary.write_bytes(wrapper.model.SerializeToString())
    return QonnxFile(
        path=target,
        opset=wrapper.get_opset_imports()[""],
        quant_nodes=quant_nodes,
        bytes=target.stat().st_size,
        input_shape=tuple(input_shape),
        dynamic_batch=dynamic_batch,
    )


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Path of a temporary file in the target's folder that takes the target's name on success and goes on failure."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files (0600); the finished one gets what a plain open() would have given it.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _check_arguments(target: Path, input_shape: tuple[int, int, int], dynamic_batch: bool, batch_size: int) -> None:
    if len(input_shape) != 3 or any(not isinstance(size, int) or size < 1 for size in input_shape):
        raise InputError(
            f"input_shape: expected three positive integers (channels, height, width), got {input_shape!r}. "
            "Leave the batch out of it and use batch_size."
        )
    if batch_size < 1 or (dynamic_batch and batch_size != 1):
        raise InputError(
            f"batch_size: expected a positive integer, and 1 with dynamic_batch, got batch_size={batch_size} with "
            f"dynamic_batch={dynamic_batch}. Choose either a fixed batch or a dynamic one."
        )
    if not target.parent.is_dir():
        raise ExportError(f"Expected an existing folder to write to, got {target.parent}. Make it first.")
    if target.is_dir():
        raise ExportError(f"Expected a file name to write to, got the folder {target}. Append a name ending in .onnx.")


def _has_dynamo() -> bool:
    # Brevitas exports through torch.export from torch 2.8 on; before, only the TorchScript exporter works.
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def _export(model: nn.Module, shape: tuple[int, int, int], batch: int, dynamic: bool, dynamo: bool) -> Any:
    """Run Brevitas' exporter in memory and give the ``onnx.ModelProto``. Changes the model's export handlers."""
    from brevitas.export import export_qonnx as brevitas_export_qonnx

    options: dict[str, Any] = {"dynamo": dynamo, "keep_initializers_as_inputs": False, "verbose": False}
    if dynamo:
        options["external_data"] = False
    # torch.export specialises a dynamic dimension of size 1 to a constant, hence two example images.
    example = torch.zeros((2 if dynamic else batch, *shape))
    if dynamic and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim(BATCH_DIMENSION, min=1, max=65536)},)
    elif dynamic:
        options |= {"input_names": ["image"], "output_names": ["logits"]}
        options["dynamic_axes"] = {"image": {0: BATCH_DIMENSION}, "logits": {0: BATCH_DIMENSION}}
    try:
        return brevitas_export_qonnx(model, args=example, export_path=None, **options)
    except Exception as error:
        advice = "Try dynamic_batch=False." if dynamic else "Check that the model runs on an input of this shape."
        raise ExportError(
            f"Brevitas' QONNX export of {type(model).__name__} with input {tuple(example.shape)} failed: "
            f"{type(error).__name__}: {_last_lines(error)}. {advice}"
        ) from error


def _last_lines(error: Exception, limit: int = 600) -> str:
    # torch.onnx wraps the reason in pages of advice; the exception it was raised from says it in one line.
    text = str(error.__cause__ or error).strip()
    return text if len(text) <= limit else f"... {text[-limit:]}"


def _check_batch(proto: Any, dynamic: bool) -> None:
    """Refuse a graph whose first dimension was traced as a constant although a dynamic one was asked for."""
    dimensions = [value.type.tensor_type.shape.dim[0] for value in (*proto.graph.input, *proto.graph.output)]
    if dynamic and not all(dimension.dim_param for dimension in dimensions):
        raise ExportError(
            "Expected a graph with a symbolic batch from input to output, got a constant: the model's code fixes the "
            "batch size. Export with dynamic_batch=False and the batch_size that is needed."
        )


def _clean(proto: Any, dynamic: bool) -> Any:
    """qonnx' standard cleanup: infer shapes, fold constants, name everything. Gives a ``ModelWrapper``."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    # qonnx folds constants by the first operator set in the list, which has to be that of ONNX itself.
    imports = sorted(proto.opset_import, key=lambda entry: entry.domain != "")
    del proto.opset_import[:]
    proto.opset_import.extend(imports)
    try:
        if not dynamic:
            return cleanup_model(ModelWrapper(proto))
        return _clean_dynamic(ModelWrapper(proto))
    except Exception as error:
        raise ExportError(
            f"qonnx could not clean the exported graph: {type(error).__name__}: {_last_lines(error)}. "
            "Please report this with the model's name."
        ) from error


def _clean_dynamic(wrapper: Any) -> Any:
    """The steps of qonnx' cleanup that are right for a symbolic batch.

    qonnx reads a symbolic dimension as 0, and would fold what follows from it: the class token, expanded to the batch,
    would become an empty constant and vanish from the graph. So ``Shape`` is not folded here.
    """
    from qonnx.transformation.fold_constants import FoldConstants
    from qonnx.transformation.general import GiveReadableTensorNames
    from qonnx.transformation.general import GiveUniqueNodeNames
    from qonnx.transformation.general import GiveUniqueParameterTensors
    from qonnx.transformation.general import RemoveStaticGraphInputs
    from qonnx.transformation.general import RemoveUnusedTensors
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.transformation.quant_constant_folding import FoldTransposeIntoQuantInit

    for step in (
        InferShapes(),
        GiveUniqueParameterTensors(),
        FoldConstants(exclude_op_types=[*QUANT_OPS, "Shape"]),
        FoldTransposeIntoQuantInit(),
        RemoveUnusedTensors(),
        RemoveStaticGraphInputs(),
        GiveUniqueNodeNames(),
        GiveReadableTensorNames(),
    ):
        wrapper = wrapper.transform(step)
    # Shapes inferred with a batch of 0 are wrong; without any, each reader infers its own.
    graph = wrapper.graph
    parameters = {tensor.name for tensor in graph.initializer}
    kept = [info for info in graph.value_info if info.name in parameters]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH_DIMENSION
    return wrapper


def _check_quantizers(graph: Any, model: nn.Module, shape: tuple[int, int, int], batch: int) -> int:
    """Number of quantizer nodes; an ``ExportError`` that names quantizers of the model which have none."""
    nodes = [node for node in graph.node if node.op_type in QUANT_OPS]
    quantizers = enabled_quantizers(model)
    exported = {scope for node in nodes for scope in module_scopes(node)}
    missing = [name for name in quantizers if name not in exported]
    if not missing:
        return len(nodes)
    # The exporter merges quantizers with one input and equal parameters, as of q, k and v with a Linear each.
    images = torch.rand((batch, *shape), generator=torch.Generator().manual_seed(0))
    _, calls = capture_calls(model, images, lambda module: module in set(quantizers.values()))
    missing = [name for name in missing if not any(_same(calls.get(name), calls.get(other)) for other in exported)]
    if not missing:
        return len(nodes)
    bypassed = all(name not in calls for name in missing)
    reason = (
        "The model's forward never calls them: exclude these layers from quantization."
        if bypassed
        else "The exporter decomposed them into plain ONNX operators: please report this with the model's name."
    )
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    raise ExportError(
        f"Expected a node for each of the model's {len(quantizers)} quantizers, got {len(nodes)} nodes, none for: "
        f"{shown}. {reason}"
    )


def _same(one: list[Call] | None, other: list[Call] | None) -> bool:
    """Whether two quantizers did the same to the same tensor, call by call."""
    if not one or not other or len(one) != len(other):
        return False
    pairs = list(zip(one, other, strict=True))
    if any(a.input is None or b.input is None for a, b in pairs):
        return False
    return all(torch.equal(a.input, b.input) and torch.equal(a.output, b.output) for a, b in pairs)
