"""Quant model -> QONNX file: Brevitas' own exporter, qonnx' own cleanup, and the checks that neither of them does."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.export.brevitas_onnx import BATCH_DIMENSION
from maskaq_brevitas.export.brevitas_onnx import check_quantizers
from maskaq_brevitas.export.brevitas_onnx import checked_target
from maskaq_brevitas.export.brevitas_onnx import export_copy
from maskaq_brevitas.export.brevitas_onnx import has_dynamo
from maskaq_brevitas.export.brevitas_onnx import last_lines
from maskaq_brevitas.export.brevitas_onnx import run_exporter
from maskaq_brevitas.export.process import quiet
from maskaq_brevitas.export.process import require
from maskaq_brevitas.files import whole_file

__all__ = ["QUANT_OPS", "QonnxFile", "clean_graph", "export_qonnx"]

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
    target = checked_target(quant_model, path, input_shape, dynamic_batch, batch_size)
    dynamo = has_dynamo()
    require("onnx", "onnxoptimizer", "qonnx", *(["onnxscript"] if dynamo else []))
    from brevitas.export import export_qonnx as exporter

    with quiet():
        proto = run_exporter(
            exporter, "QONNX", export_copy(quant_model), input_shape, batch_size, dynamic_batch, dynamo
        )
        wrapper = clean_graph(proto, dynamic_batch)
        quant_nodes = check_quantizers(
            wrapper.graph, export_copy(quant_model), tuple(input_shape), batch_size, op_types=QUANT_OPS
        )
    with whole_file(target) as temporary:
        temporary.write_bytes(wrapper.model.SerializeToString())
    return QonnxFile(
        path=target,
        opset=wrapper.get_opset_imports()[""],
        quant_nodes=quant_nodes,
        bytes=target.stat().st_size,
        input_shape=(*input_shape,),
        dynamic_batch=dynamic_batch,
    )


def clean_graph(proto: Any, dynamic: bool) -> Any:
    """qonnx' standard cleanup: infer shapes, fold constants, name everything. Gives a ``ModelWrapper``.

    Raises:
        ExportError: qonnx failed.
    """
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
            f"qonnx could not clean the exported graph: {type(error).__name__}: {last_lines(error)}. "
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
