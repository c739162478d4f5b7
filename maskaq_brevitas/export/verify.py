"""Does an exported file compute what the PyTorch model computes?

Comparing logits alone does not answer this. Two correct runs differ by float rounding (about 1e-7), now and then such a
difference crosses a rounding tie of a quantizer, and one step of a low-bit quantizer grows over the following layers to
several percent of the logits. A loose tolerance would accept wrong files, a strict one refuses right ones.

So the file is executed once more *in step* with PyTorch: behind each quantizer the values are
set to PyTorch's own, so that flips cannot spread. Each stretch of graph between two quantizers then starts from equal
inputs and has to give equal outputs, and a quantizer may deviate by one step, on ties only. What remains is an error of
the file, and the first place where it shows is its name.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.export.brevitas_onnx import export_copy
from maskaq_brevitas.export.brevitas_onnx import last_lines
from maskaq_brevitas.export.capture import capture_calls
from maskaq_brevitas.export.compare import Failure
from maskaq_brevitas.export.compare import InStep
from maskaq_brevitas.export.execute import DYNAMIC_BATCH
from maskaq_brevitas.export.execute import QonnxExecutor
from maskaq_brevitas.export.execute import load_for_batch
from maskaq_brevitas.export.execute import whole_batches
from maskaq_brevitas.export.execute_qcdq import load_qcdq
from maskaq_brevitas.export.execute_qcdq import qcdq_in_step
from maskaq_brevitas.export.execute_qcdq import qcdq_session
from maskaq_brevitas.export.outputs import joined
from maskaq_brevitas.export.outputs import output_tensors
from maskaq_brevitas.export.process import quiet
from maskaq_brevitas.export.process import require
from maskaq_brevitas.export.torch_formats import load_torch_file

__all__ = ["QonnxCheck", "verify_qcdq", "verify_qonnx", "verify_torch_file"]

#: Most images to execute in step with PyTorch, those with the largest difference first.
_IN_STEP_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class QonnxCheck:
    """A QONNX or QCDQ file against the PyTorch model.

    Attributes:
        images: number of images compared.
        max_abs_difference: largest absolute difference of a logit, file run on its own.
        relative_difference: the same, divided by the largest absolute logit.
        top1_agreement: share of images with equal top-1 class, 0-1; of pixels, where the model classifies those; of
            several outputs, share of images whose largest value is at the same place.
        in_step_difference: relative difference of the logits with the quantizers in step; None if not passed.
        rounding_flips: activations that fell on the other side of a rounding tie, while in step.
        passed: whether the file computes what the model computes, up to float rounding.
        first_diverging_node: name of the first ONNX node with a wrong result; None if passed.
        note: one sentence on how the verdict came about.
    """

    images: int
    max_abs_difference: float
    relative_difference: float
    top1_agreement: float
    in_step_difference: float | None
    rounding_flips: int
    passed: bool
    first_diverging_node: str | None
    note: str


def verify_qonnx(
    path: str | os.PathLike[str],
    quant_model: nn.Module,
    images: Tensor,
    *,
    tolerance: float = 1e-4,
    raise_on_mismatch: bool = True,
) -> QonnxCheck:
    """Execute a QONNX file with qonnx and compare it with the PyTorch model it was exported from.

    The file passes if the logits agree within ``tolerance`` with the quantizers in step with PyTorch (see the module's
    text), and no quantizer deviates other than by one step on a rounding tie. The figures of the file run on its own,
    top-1 agreement among them, are reported and are no criterion: flips change them in a correct file.

    The model is copied, and not touched.

    Args:
        path: a file written by :func:`maskaq_brevitas.export.export_qonnx`.
        quant_model: takes images, gives logits ``(batch, classes)``.
        images: ``(images, channels, height, width)``, normalised as for the model. Any number; a file with a fixed
            batch is filled up with the last image.
        tolerance: largest difference, relative to the largest absolute value of the compared tensor.
        raise_on_mismatch: raise where the file does not pass; otherwise the result says so.

    Raises:
        InputError: the images do not fit the file.
        MissingExtraError: onnx, onnxruntime or qonnx is not installed.
        ExportError: the file cannot be read or executed, or does not pass; then the first diverging node is named.
    """
    require("onnx", "onnxruntime", "qonnx")
    images = _checked(images)
    with quiet():
        graph, batch = load_for_batch(path, tuple(images.shape[1:]), min(DYNAMIC_BATCH, len(images)))
        executor = QonnxExecutor(graph)
        return _verify(
            path, quant_model, images, batch, tolerance, raise_on_mismatch,
            run=executor, run_in_step=lambda model, chunk: executor.in_step(model, chunk, tolerance),
        )  # fmt: skip


def verify_qcdq(
    path: str | os.PathLike[str],
    quant_model: nn.Module,
    images: Tensor,
    *,
    tolerance: float = 1e-4,
    raise_on_mismatch: bool = True,
) -> QonnxCheck:
    """Execute a QCDQ file in ONNX Runtime and compare it with the PyTorch model it was exported from.

    Arguments, verdict and errors are those of :func:`verify_qonnx`; the stored integers of the weights are compared
    too.

    Args:
        path: a file written by :func:`maskaq_brevitas.export.export_qcdq`.
        quant_model: takes images, gives logits ``(batch, classes)``; it is copied.
        images: ``(images, channels, height, width)``, normalised as for the model.
        tolerance: largest difference, relative to the largest absolute value of the compared tensor.
        raise_on_mismatch: raise where the file does not pass; otherwise the result says so.

    Raises:
        InputError: the images do not fit the file.
        MissingExtraError: onnx or onnxruntime is not installed.
        ExportError: the file cannot be read or executed, or does not pass; then the first diverging node is named.
    """
    require("onnx", "onnxruntime")
    images = _checked(images)
    with quiet():
        proto, batch = load_qcdq(path, tuple(images.shape[1:]))
        session = qcdq_session(proto)
        name = session.get_inputs()[0].name
        return _verify(
            path, quant_model, images, batch, tolerance, raise_on_mismatch,
            run=lambda chunk: joined([torch.from_numpy(value) for value in session.run(None, {name: chunk.numpy()})]),
            run_in_step=lambda model, chunk: qcdq_in_step(proto, model, chunk, tolerance),
        )  # fmt: skip


def verify_torch_file(
    path: str | os.PathLike[str],
    quant_model: nn.Module,
    images: Tensor,
    *,
    kind: Literal["torch-qcdq", "torch-export"],
    tolerance: float = 1e-4,
    raise_on_mismatch: bool = True,
) -> QonnxCheck:
    """Read a file of PyTorch's back, and compare its logits with those of the model it was exported from.

    The same kernels compute both in the same order, so the logits have to agree as they are; nothing is run in step.

    Args:
        path: a file written by :func:`maskaq_brevitas.export.export_torch_qcdq` or ``export_torch_program``.
        quant_model: takes images, gives logits ``(batch, classes)``; it is copied.
        images: ``(images, channels, height, width)``, normalised as for the model.
        kind: of the file.
        tolerance: largest difference, relative to the largest logit.
        raise_on_mismatch: raise where the file does not pass; otherwise the result says so.

    Raises:
        InputError: ``images`` is no batch of images.
        ExportError: the file cannot be read or executed, or does not pass.
    """
    images = _checked(images)
    with quiet(), torch.no_grad():
        try:
            run = load_torch_file(path, kind)
        except Exception as error:
            raise ExportError(
                f"Expected a file of kind {kind} at {os.fspath(path)}, got {type(error).__name__}: "
                f"{last_lines(error)}. Write it with the export command or function of that kind."
            ) from error
        # A file with a fixed batch is taken to be for one image, as the command line exports it.
        try:
            run(images[:1].repeat(2, 1, 1, 1))
            batch = DYNAMIC_BATCH
        except Exception:  # noqa: BLE001 - whatever the file's own check of its input raises
            batch = 1
        try:
            outputs = [joined(output_tensors(run(chunk)) or []) for chunk in whole_batches(images, batch)]
            found = torch.cat(outputs)[: len(images)]
        except Exception as error:
            raise ExportError(
                f"{os.fspath(path)} could not be executed on images {tuple(images.shape)}: {type(error).__name__}: "
                f"{last_lines(error)}. Give it images of the shape it was exported with."
            ) from error
        expected = _logits(export_copy(quant_model), images, batch)
    _check_shapes(expected, found)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if difference <= tolerance:
        note, failure = f"Logits agree within {tolerance:g} of the largest logit.", None
    else:
        note, failure = "", Failure(None, f"Its logits do not agree within {tolerance:g} of the largest logit.")
    return _conclude(path, expected, found, difference, 0, failure, note, raise_on_mismatch)


def _checked(images: Tensor) -> Tensor:
    if images.ndim != 4 or not len(images):
        raise InputError(
            f"images: expected (images, channels, height, width), at least one, got {tuple(images.shape)}. "
            "Add the first dimension to a single image."
        )
    return images.detach().to("cpu", torch.float32)


def _verify(
    path: str | os.PathLike[str],
    quant_model: nn.Module,
    images: Tensor,
    batch: int,
    tolerance: float,
    raise_on_mismatch: bool,
    *,
    run: Callable[[Tensor], Tensor],
    run_in_step: Callable[[nn.Module, Tensor], InStep],
) -> QonnxCheck:
    """The comparison, with the file executed by the functions given, ``batch`` images at a time."""
    model = export_copy(quant_model)
    expected = _logits(model, images, batch)
    found = torch.cat([run(chunk) for chunk in whole_batches(images, batch)])[: len(images)]
    _check_shapes(expected, found)
    per_image = (found - expected).abs().flatten(1).amax(1) / expected.abs().max()
    # Not "per_image > tolerance": NaN has to count as different.
    differing = int((~(per_image <= tolerance)).sum())
    # At least one image in step also where all agree: quantizers behind a wrong weight may have swallowed it.
    worst = per_image.nan_to_num(torch.inf).argsort(descending=True)[: min(max(differing, 1), _IN_STEP_IMAGES)]
    steps: list[InStep] = []
    for chunk in whole_batches(images[worst], batch):
        steps.append(run_in_step(model, chunk))
        if steps[-1].failure:
            break

    if differing:
        note = (
            f"{differing} of {len(images)} images differ by more than {tolerance:g} of the largest logit, through "
            f"rounding ties alone: with {steps[0].quantizers} quantizers in step, the logits agree on "
            f"those that differ most ({len(worst)})."
        )
    else:
        note = f"Logits agree within {tolerance:g} of the largest logit, and so do {steps[0].quantizers} quantizers."
    in_step, flips = max(step.difference for step in steps), sum(step.flips for step in steps)
    return _conclude(path, expected, found, in_step, flips, steps[-1].failure, note, raise_on_mismatch)


def _conclude(
    path: str | os.PathLike[str],
    expected: Tensor,
    found: Tensor,
    in_step: float,
    flips: int,
    failure: Failure | None,
    note: str,
    raise_on_mismatch: bool,
) -> QonnxCheck:
    """The figures and the verdict; ``note`` is for a file that passes."""
    difference = float((found - expected).abs().max())
    check = QonnxCheck(
        images=len(expected),
        max_abs_difference=difference,
        relative_difference=difference / float(expected.abs().max()),
        top1_agreement=float((found.argmax(1) == expected.argmax(1)).double().mean()),
        in_step_difference=None if failure else in_step,
        rounding_flips=flips,
        passed=failure is None,
        first_diverging_node=failure.node if failure else None,
        note=failure.message if failure else note,
    )
    if failure and raise_on_mismatch:
        raise ExportError(
            f"Expected {os.fspath(path)} to compute what the PyTorch model computes, got logits that differ by "
            f"{check.max_abs_difference:.3g} (relative {check.relative_difference:.3g}, equal top-1 on "
            f"{check.top1_agreement:.0%} of {check.images} images). {failure.message} Export the model again; if the "
            "file is fresh, please report this node and the model's name."
        )
    return check


def _logits(model: nn.Module, images: Tensor, batch: int) -> Tensor:
    # The same batches as the file: float sums depend on them, and each difference is a chance for a flip.
    outputs = [capture_calls(model, chunk, lambda module: False)[0] for chunk in whole_batches(images, batch)]
    if not all(isinstance(output, Tensor) and output.ndim >= 2 for output in outputs):
        raise InputError(
            "quant_model: expected one tensor (batch, classes) or (batch, channels, height, width) as its output, or "
            "several; got something else."
        )
    return torch.cat(outputs)[: len(images)]


def _check_shapes(expected: Tensor, found: Tensor) -> None:
    if expected.shape != found.shape:
        raise ExportError(
            f"Expected logits {tuple(expected.shape)} from the file, as from the model, got {tuple(found.shape)}. "
            "Is this file exported from this model?"
        )
