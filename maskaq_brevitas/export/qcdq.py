"""Quant model -> ONNX file with QuantizeLinear and DequantizeLinear (QCDQ), which ONNX Runtime executes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.export.brevitas_onnx import check_quantizers
from maskaq_brevitas.export.brevitas_onnx import checked_target
from maskaq_brevitas.export.brevitas_onnx import export_copy
from maskaq_brevitas.export.brevitas_onnx import has_dynamo
from maskaq_brevitas.export.brevitas_onnx import last_lines
from maskaq_brevitas.export.brevitas_onnx import run_exporter
from maskaq_brevitas.export.integer_weights import INT4_OPSET
from maskaq_brevitas.export.integer_weights import store_integer_weights
from maskaq_brevitas.export.process import quiet
from maskaq_brevitas.export.process import require
from maskaq_brevitas.files import whole_file

__all__ = ["QcdqFile", "export_qcdq"]

#: For TorchScript, torch's older exporter: the first version with LayerNormalization as one node.
_TORCHSCRIPT_OPSET = 17


@dataclass(frozen=True, kw_only=True)
class QcdqFile:
    """A QCDQ file on disk.

    Attributes:
        path: where it lies.
        opset: version of the ONNX operator set.
        quantizers: number of DequantizeLinear nodes in the graph: one for each quantizer of weights or activations.
        int8_weights, int4_weights: number of weights that are stored in 8 and in 4 bits.
        bytes: size on disk.
        input_shape: (channels, height, width) of the input image, in pixels.
        dynamic_batch: whether the first dimension is symbolic.
    """

    path: Path
    opset: int
    quantizers: int
    int8_weights: int
    int4_weights: int
    bytes: int
    input_shape: tuple[int, int, int]
    dynamic_batch: bool


def export_qcdq(
    quant_model: nn.Module,
    path: str | os.PathLike[str],
    *,
    input_shape: tuple[int, int, int],
    dynamic_batch: bool = False,
    batch_size: int = 1,
) -> QcdqFile:
    """Write a Brevitas model as an ONNX QCDQ file: QuantizeLinear, Clip below 8 bits, DequantizeLinear.

    Weights are stored as integers, those whose codes fit 4 bits as INT4 (torch 2.8 or newer, opset 21; else int8). A
    copy of the model is exported, in eval mode, on the CPU, in float32: the model that is passed in is not touched. The
    file appears under its name only when whole. An existing file of that name is replaced.

    Run it with :class:`~maskaq_brevitas.export.QcdqModel`, or in ONNX Runtime, best with the option that this sets::

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")

    Args:
        quant_model: takes images ``(batch, channels, height, width)``, gives logits ``(batch, classes)``.
        path: the file to write; its folder must exist.
        input_shape: (channels, height, width), in pixels.
        dynamic_batch: leave the first dimension symbolic.
        batch_size: the fixed batch; must be 1 with ``dynamic_batch``, where it has no meaning.

    Raises:
        InputError: ``input_shape`` or ``batch_size`` is out of range.
        MissingExtraError: onnx, onnxscript, onnxoptimizer or qonnx is not installed.
        ExportError: the folder does not exist, the model has no quantizers, the exporter failed (quantized biases,
            widths above 8 bits), or quantizers of the model are missing in the graph.
    """
    target = checked_target(quant_model, path, input_shape, dynamic_batch, batch_size)
    dynamo = has_dynamo()
    require("onnx", "onnxoptimizer", "qonnx", *(["onnxscript"] if dynamo else []))
    from brevitas.export import export_onnx_qcdq

    opset = INT4_OPSET if dynamo else _TORCHSCRIPT_OPSET
    with quiet():
        proto = run_exporter(
            export_onnx_qcdq, "QCDQ", export_copy(quant_model), input_shape, batch_size, dynamic_batch, dynamo,
            opset_version=opset,
        )  # fmt: skip
        proto, weights = _finished(proto)
        quantizers = check_quantizers(
            proto.graph, export_copy(quant_model), tuple(input_shape), batch_size, op_types=("DequantizeLinear",)
        )
    with whole_file(target) as temporary:
        temporary.write_bytes(proto.SerializeToString())
    return QcdqFile(
        path=target,
        opset=opset,
        quantizers=quantizers,
        int8_weights=weights.int8,
        int4_weights=weights.int4,
        bytes=target.stat().st_size,
        input_shape=(*input_shape,),
        dynamic_batch=dynamic_batch,
    )


def _finished(proto: Any) -> tuple[Any, Any]:
    """The exporter's graph with integer weights, readable names, and nothing that ONNX Runtime refuses."""
    import onnx
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.general import GiveReadableTensorNames
    from qonnx.transformation.general import GiveUniqueNodeNames

    weights = store_integer_weights(proto)
    turn_codes(proto.graph)
    # Types of inner tensors have changed; every reader infers them.
    del proto.graph.value_info[:]
    try:
        proto = ModelWrapper(proto).transform(GiveUniqueNodeNames()).transform(GiveReadableTensorNames()).model
        onnx.checker.check_model(proto)
    except Exception as error:
        raise ExportError(
            f"The exported QCDQ graph is not valid: {type(error).__name__}: {last_lines(error)}. "
            "Please report this with the model's name."
        ) from error
    return proto, weights


def turn_codes(graph: Any) -> None:
    """Let a Transpose that follows a per-tensor DequantizeLinear turn the integers instead, in place.

    The values stay the same. ONNX Runtime (1.32, with its default optimisation) copies the quantizer to behind the
    Transpose, with another integer type than its zero point has, and then refuses its own graph.
    """
    writers = {name: node for node in graph.node for name in node.output}
    readers = {name: sum(name in node.input for node in graph.node) for name in writers}
    swapped = {}
    for turn in graph.node:
        back = writers.get(turn.input[0]) if turn.op_type == "Transpose" else None
        if back is None or any(attribute.name == "axis" for attribute in back.attribute):
            continue
        if back.op_type == "DequantizeLinear" and readers[back.output[0]] == 1:
            codes, values, turned = back.input[0], back.output[0], turn.output[0]
            turn.input[0], turn.output[0] = codes, values
            back.input[0], back.output[0] = values, turned
            swapped[back.name], swapped[turn.name] = turn, back
    ordered = [type(node).FromString(swapped.get(node.name, node).SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend(ordered)
