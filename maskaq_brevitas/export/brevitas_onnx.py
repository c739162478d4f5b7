"""Running Brevitas' ONNX exporters on a copy of the model, and the checks that they do not make."""

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.export.capture import Call
from maskaq_brevitas.export.capture import capture_calls
from maskaq_brevitas.export.outputs import check_outputs
from maskaq_brevitas.export.scopes import module_scopes
from maskaq_brevitas.export.scopes import record_scopes

__all__ = [
    "BATCH_DIMENSION",
    "check_quantizers",
    "checked_target",
    "count_quantizers",
    "enabled_quantizers",
    "export_copy",
    "has_dynamo",
    "last_lines",
    "run_exporter",
]

#: Name of the symbolic first dimension of a file that was exported with ``dynamic_batch=True``.
BATCH_DIMENSION = "batch"


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


def export_copy(quant_model: nn.Module) -> nn.Module:
    """A copy to export: in eval mode, on the CPU, in float32."""
    return copy.deepcopy(quant_model).cpu().float().eval()


def checked_target(
    quant_model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: tuple[int, int, int],
    dynamic_batch: bool,
    batch_size: int,
) -> Path:
    """The path to write to, once the arguments that all exports share are found to be right.

    Raises:
        InputError: ``input_shape`` or ``batch_size`` is out of range.
        ExportError: the folder does not exist, or the model has no quantizers.
    """
    target = Path(path)
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
    if not count_quantizers(quant_model):
        raise ExportError(
            f"Expected a Brevitas model with quantizers, got {type(quant_model).__name__} with none switched on. "
            "Quantize the model first, and leave modes that disable its quantizers before exporting."
        )
    return target


def has_dynamo() -> bool:
    """Whether this torch has the exporter that Brevitas uses by default."""
    # Brevitas exports through torch.export from torch 2.8 on; before, only the TorchScript exporter works.
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def run_exporter(
    exporter: Callable[..., Any],
    title: str,
    model: nn.Module,
    shape: tuple[int, ...],
    batch: int,
    dynamic: bool,
    dynamo: bool,
    **options: Any,
) -> Any:
    """Run an ONNX exporter of Brevitas and give the ``onnx.ModelProto``, with the module path on every node.

    Args:
        exporter: of ``brevitas.export``; it changes the model's export handlers.
        title: of the format, for messages.
        shape: of one input, ``(channels, height, width)`` for an image; ``batch`` is their number where it is not
            ``dynamic``.
        dynamo: by way of torch.export; otherwise by TorchScript.
        options: what this exporter takes besides.

    Raises:
        ExportError: the model gives no tensors, the exporter failed, or the model's code fixes a batch that was to be
            dynamic.
    """
    import onnx

    names = [name for name, _ in model.named_modules()]
    options |= {"dynamo": dynamo, "keep_initializers_as_inputs": False}
    if dynamo:
        options["external_data"] = False
    # torch.export specialises a dynamic dimension of size 1 to a constant, hence two example images.
    example = torch.zeros((2 if dynamic else batch, *shape))
    check_outputs(model, example)
    if dynamic and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim(BATCH_DIMENSION, min=1, max=65536)},)
    elif dynamic:
        options |= {"input_names": ["image"], "output_names": ["logits"]}
        options["dynamic_axes"] = {"image": {0: BATCH_DIMENSION}, "logits": {0: BATCH_DIMENSION}}
    try:
        # Not in memory: Brevitas' QCDQ exporter gives nothing back. Not beside the target: torch may leave a .data
        # file.
        with tempfile.TemporaryDirectory() as folder:
            aside = os.path.join(folder, "model.onnx")
            exporter(model, args=example, export_path=aside, **options)
            proto = onnx.load(aside)
    except Exception as error:
        advice = "Try dynamic_batch=False." if dynamic else "Check that the model runs on an input of this shape."
        raise ExportError(
            f"Brevitas' {title} export of {type(model).__name__} with input {tuple(example.shape)} failed: "
            f"{type(error).__name__}: {last_lines(error)}. {advice}"
        ) from error
    _check_batch(proto, dynamic)
    record_scopes(proto, names)
    return proto


def last_lines(error: Exception, limit: int = 600) -> str:
    """The end of what an exception says, or of the one it was raised from."""
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


def check_quantizers(
    graph: Any, model: nn.Module, shape: tuple[int, ...], batch: int, *, op_types: tuple[str, ...]
) -> int:
    """Number of nodes of the given types, one of which each quantizer becomes.

    Raises:
        ExportError: quantizers of the model have none; they are named.
    """
    nodes = [node for node in graph.node if node.op_type in op_types]
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
    return all(
        a.input is not None
        and b.input is not None
        and torch.equal(a.input, b.input)
        and torch.equal(a.output, b.output)
        for a, b in pairs
    )
