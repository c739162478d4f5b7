"""Quant model -> files that PyTorch reads back without Brevitas: TorchScript with integer weights, and torch.export."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.export.brevitas_onnx import BATCH_DIMENSION
from maskaq_brevitas.export.brevitas_onnx import checked_target
from maskaq_brevitas.export.brevitas_onnx import enabled_quantizers
from maskaq_brevitas.export.brevitas_onnx import export_copy
from maskaq_brevitas.export.brevitas_onnx import last_lines
from maskaq_brevitas.export.outputs import check_outputs
from maskaq_brevitas.export.process import quiet
from maskaq_brevitas.files import whole_file

__all__ = ["TorchFile", "export_torch_program", "export_torch_qcdq", "load_torch_file"]


@dataclass(frozen=True, kw_only=True)
class TorchFile:
    """A file that PyTorch reads back.

    Attributes:
        path: where it lies.
        quantizers: number of quantizers found in its graph.
        bytes: size on disk.
        input_shape: (channels, height, width) of the input image, in pixels.
        dynamic_batch: whether it takes any number of images.
    """

    path: Path
    quantizers: int
    bytes: int
    input_shape: tuple[int, int, int]
    dynamic_batch: bool


def export_torch_qcdq(
    quant_model: nn.Module,
    path: str | os.PathLike[str],
    *,
    input_shape: tuple[int, int, int],
    dynamic_batch: bool = True,
    batch_size: int = 1,
) -> TorchFile:
    """Write a Brevitas model as TorchScript with torch's own quantize operators (Brevitas' torch QCDQ).

    Weights are stored as int8, whatever their width. A copy is exported, in eval mode, on the CPU, in float32; the file
    appears under its name only when whole. Read it with ``torch.jit.load``; it takes any batch in either case, because
    tracing a timm model keeps the batch symbolic. That is checked where ``dynamic_batch`` is asked for.

    Args:
        quant_model: takes images ``(batch, channels, height, width)``, gives logits ``(batch, classes)``.
        path: the file to write; its folder must exist.
        input_shape: (channels, height, width), in pixels.
        dynamic_batch: whether it must take any number of images.
        batch_size: of the example image; must be 1 with ``dynamic_batch``.

    Raises:
        InputError: ``input_shape`` or ``batch_size`` is out of range.
        ExportError: the folder does not exist, the model has no quantizers, the exporter failed, quantizers are missing
            in the traced graph, or the file does not take another number of images.
    """
    from brevitas.export import export_torch_qcdq as brevitas_export

    def build(model: nn.Module, example: Tensor) -> tuple[Any, int]:
        traced = brevitas_export(model, args=example)
        if dynamic_batch and len(traced(example.repeat(2, 1, 1, 1))) != 2 * len(example):
            raise ValueError("the model's code fixes the batch size")
        nodes = list(traced.inlined_graph.nodes())
        activations = sum(node.kind().startswith("aten::quantize_per_") for node in nodes)
        return traced, activations + sum(_is_integer_weight(node) for node in nodes)

    return _export(
        quant_model, path, input_shape, dynamic_batch, batch_size, "torch QCDQ", build,
        lambda traced, aside: torch.jit.save(traced, os.fspath(aside)),
    )  # fmt: skip


def export_torch_program(
    quant_model: nn.Module,
    path: str | os.PathLike[str],
    *,
    input_shape: tuple[int, int, int],
    dynamic_batch: bool = True,
    batch_size: int = 1,
) -> TorchFile:
    """Write a Brevitas model as a ``torch.export`` program (``.pt2``), from Brevitas' inference mode.

    The program quantizes and dequantizes in float32 with core operators, weights included: nothing is smaller than in
    float, and any backend of torch.export can take it. A copy is exported, in eval mode, on the CPU; the file appears
    under its name only when whole. Read it with ``torch.export.load(path).module()``.

    Args:
        quant_model: takes images ``(batch, channels, height, width)``, gives logits ``(batch, classes)``.
        path: the file to write; its folder must exist.
        input_shape: (channels, height, width), in pixels.
        dynamic_batch: whether it must take any number of images.
        batch_size: the fixed batch; must be 1 with ``dynamic_batch``.

    Raises:
        InputError: ``input_shape`` or ``batch_size`` is out of range.
        ExportError: the folder does not exist, the model has no quantizers, the exporter failed, or quantizers are
            missing in the program.
    """
    from brevitas.export.inference import quant_inference_mode

    def build(model: nn.Module, example: Tensor) -> tuple[Any, int]:
        shapes = ({0: torch.export.Dim(BATCH_DIMENSION, min=1, max=65536)},) if dynamic_batch else None
        with quant_inference_mode(model):
            model(example)  # Brevitas sets the mode up in the first forward, with code that torch.export cannot trace
            program = torch.export.export(model.requires_grad_(False), (example,), dynamic_shapes=shapes)
        return program, sum(node.target is torch.ops.aten.round.default for node in program.graph.nodes)

    return _export(
        quant_model, path, input_shape, dynamic_batch, batch_size, "torch.export", build,
        lambda program, aside: torch.export.save(program, aside),
    )  # fmt: skip


def _is_integer_weight(node: Any) -> bool:
    """Whether a TorchScript node is a weight stored in integers; zero points have one value per channel at most."""
    if node.kind() != "prim::Constant" or not node.hasAttribute("value") or node.kindOf("value") != "t":
        return False
    value = node.t("value")
    return value.dtype in (torch.int8, torch.uint8) and value.ndim > 1 and value.numel() > len(value)


def _export(
    quant_model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: tuple[int, int, int],
    dynamic_batch: bool,
    batch_size: int,
    title: str,
    build: Callable[[nn.Module, Tensor], tuple[Any, int]],
    save: Callable[[Any, Path], None],
) -> TorchFile:
    """Build the artefact from a copy of the model, check its number of quantizers, and save it."""
    from brevitas.proxy import BiasQuantProxyFromInjector

    target = checked_target(quant_model, path, input_shape, dynamic_batch, batch_size)
    # torch.export specialises a dynamic dimension of size 1 to a constant, hence two example images.
    example = torch.zeros((2 if dynamic_batch else batch_size, *input_shape))
    model = export_copy(quant_model)
    check_outputs(model, example)
    try:
        with quiet(), torch.no_grad():
            artefact, found = build(model, example)
    except Exception as error:
        advice = "Try dynamic_batch=False." if dynamic_batch else "Check that the model runs on an input of this shape."
        raise ExportError(
            f"The {title} export of {type(quant_model).__name__} with input {tuple(example.shape)} failed: "
            f"{type(error).__name__}: {last_lines(error)}. {advice}"
        ) from error
    # A quantized bias is stored as it is, indistinguishable from a zero point.
    expected = sum(
        not isinstance(each, BiasQuantProxyFromInjector) for each in enabled_quantizers(quant_model).values()
    )
    if found < expected:
        raise ExportError(
            f"Expected the model's {expected} quantizers in the {title} graph, got {found}. The model's forward may "
            "never call some of its layers: exclude these from quantization."
        )
    with quiet(), whole_file(target) as temporary:
        save(artefact, temporary)
    return TorchFile(
        path=target,
        quantizers=found,
        bytes=target.stat().st_size,
        input_shape=(*input_shape,),
        dynamic_batch=dynamic_batch,
    )


def load_torch_file(path: str | os.PathLike[str], kind: str) -> Callable[[Tensor], Tensor]:
    """The function that a file computes; ``kind`` is ``"torch-qcdq"`` or ``"torch-export"``."""
    if kind == "torch-qcdq":
        script: Callable[[Tensor], Tensor] = torch.jit.load(os.fspath(path))
        return script
    return torch.export.load(os.fspath(path)).module()
