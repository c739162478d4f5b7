"""Quant model -> QONNX file that FINN maps to hardware operators, with a sample of its input and output beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.export.brevitas_onnx import check_quantizers
from maskaq_brevitas.export.brevitas_onnx import checked_target
from maskaq_brevitas.export.brevitas_onnx import has_dynamo
from maskaq_brevitas.export.brevitas_onnx import run_exporter
from maskaq_brevitas.export.finn_form import Cut
from maskaq_brevitas.export.finn_form import finn_form
from maskaq_brevitas.export.process import quiet
from maskaq_brevitas.export.process import require
from maskaq_brevitas.export.qonnx import QUANT_OPS
from maskaq_brevitas.export.qonnx import clean_graph
from maskaq_brevitas.export.verify import QonnxCheck
from maskaq_brevitas.export.verify import verify_qonnx
from maskaq_brevitas.files import whole_file

__all__ = ["FINN_OPSET", "FinnFile", "export_finn", "sample_path", "verify_finn", "write_finn_sample"]

#: From this version on GELU is a single node, which FINN maps; before, it is decomposed.
FINN_OPSET = 20


@dataclass(frozen=True, kw_only=True)
class FinnFile:
    """A QONNX file for FINN on disk.

    Attributes:
        path: where it lies.
        cut: the part of the model that it holds.
        quant_nodes: number of quantizer nodes in the graph.
        bytes: size on disk.
        input_shape: of the graph's input, batch included.
    """

    path: Path
    cut: Cut
    quant_nodes: int
    bytes: int
    input_shape: tuple[int, ...]


def export_finn(
    quant_model: nn.Module,
    path: str | os.PathLike[str],
    *,
    input_shape: tuple[int, int, int],
    cut: Cut = "full",
    dynamic_batch: bool = False,
) -> FinnFile:
    """Write a quant model of a scheme ``finn-wXaY`` as a QONNX file whose nodes all have a hardware operator in FINN.

    The graph computes what the model computes, in the form of :mod:`~maskaq_brevitas.export.finn_form`; its batch is 1,
    its opset 20. The model is not touched.

    Args:
        quant_model: a calibrated timm ``VisionTransformer``.
        path: the file to write; its folder must exist.
        input_shape: (channels, height, width) of the images, in pixels.
        cut: ``"full"``, or ``"encoder"``: from embedded tokens on, up to the last block.
        dynamic_batch: must be False; FINN takes a static batch of 1.

    Raises:
        ConfigurationError: with a dynamic batch, or an unknown cut.
        InputError, MissingExtraError: as :func:`~maskaq_brevitas.export.export_qonnx`.
        ExportError: FINN does not take the model (the places are named), or the exporter failed.
    """
    if dynamic_batch:
        raise ConfigurationError("FINN takes a static batch of 1 image, got a dynamic one. Use --batch fixed.")
    if cut not in ("full", "encoder"):
        raise ConfigurationError(f"cut: expected 'full' or 'encoder', got {cut!r}.")
    target = checked_target(quant_model, path, input_shape, False, 1)
    if not has_dynamo():
        raise ExportError(f"Expected torch 2.8 or later for opset {FINN_OPSET}, got {torch.__version__}.")
    require("onnx", "onnxoptimizer", "onnxscript", "qonnx")
    from brevitas.export import export_qonnx as exporter

    form = finn_form(quant_model, cut)
    shape = tuple(_given(quant_model, torch.zeros(1, *input_shape), cut).shape)
    with quiet():
        export: Any = partial(exporter, opset_version=FINN_OPSET, optimize=True)
        proto = run_exporter(export, "QONNX", finn_form(quant_model, cut), shape[1:], 1, False, True)
        graph = clean_graph(proto, dynamic=False)
        quant_nodes = check_quantizers(graph.graph, form, shape[1:], 1, op_types=QUANT_OPS)
    with whole_file(target) as temporary:
        temporary.write_bytes(graph.model.SerializeToString())
    return FinnFile(path=target, cut=cut, quant_nodes=quant_nodes, bytes=target.stat().st_size, input_shape=shape)


@torch.no_grad()
def write_finn_sample(
    quant_model: nn.Module, path: str | os.PathLike[str], image: Tensor, *, cut: Cut = "full"
) -> Path:
    """Write the input and output of one execution in PyTorch beside a file, as FINN's verification steps want them.

    Args:
        quant_model: that the file was exported from.
        path: of the file.
        image: ``(1, channels, height, width)``, normalised.
        cut: that the file holds.

    Returns:
        The path of the ``.npz`` with ``input`` and ``output``.
    """
    given = _given(quant_model, image.detach().to("cpu", torch.float32), cut)
    output = finn_form(quant_model, cut)(given)
    with whole_file(sample_path(path)) as temporary, temporary.open("wb") as stream:
        np.savez(stream, input=given.numpy(), output=output.numpy())
    return sample_path(path)


@torch.no_grad()
def _given(quant_model: nn.Module, image: Tensor, cut: Cut) -> Tensor:
    """What the graph of a cut takes for an image."""
    if cut == "full":
        return image
    tokens: Tensor = finn_form(quant_model).get_submodule("stem")(image)
    return tokens


def sample_path(path: str | os.PathLike[str]) -> Path:
    """Where the sample of a file lies: beside it, as ``NAME.sample.npz``."""
    return Path(path).with_suffix(".sample.npz")


def verify_finn(path: str | os.PathLike[str], quant_model: nn.Module, images: Tensor, **options: Any) -> QonnxCheck:
    """Execute a file of the cut ``"full"`` with qonnx and compare it in step with the model's form in PyTorch.

    Arguments, verdict and errors are those of :func:`~maskaq_brevitas.export.verify_qonnx`.
    """
    return verify_qonnx(path, finn_form(quant_model), images, **options)
