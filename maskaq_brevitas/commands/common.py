"""What several commands of ``maskaq`` share: their options as objects, labelled data, and a finished run."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskaq_brevitas.calibrator import DataFreeCalibrator
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.config import scheme_of_run
from maskaq_brevitas.errors import CheckpointError
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.evaluation import Accuracy
from maskaq_brevitas.evaluation import LabelledData
from maskaq_brevitas.evaluation import digits_split
from maskaq_brevitas.evaluation import evaluate as measure_accuracy
from maskaq_brevitas.evaluation import labelled_folder
from maskaq_brevitas.export import FORMATS
from maskaq_brevitas.export import ModelCard
from maskaq_brevitas.export import QonnxCheck
from maskaq_brevitas.export import model_card
from maskaq_brevitas.export import write_card
from maskaq_brevitas.export.finn import write_finn_sample
from maskaq_brevitas.files import write_whole
from maskaq_brevitas.models.zoo import SHIPPED_MODEL
from maskaq_brevitas.models.zoo import load_model
from maskaq_brevitas.options import read_saved
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.run_directory import fingerprint

__all__ = [
    "Data", "calibrator_options", "check_line", "export_run", "labelled_data", "load_run", "measured", "named_device",
    "saved_options",
]  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Labelled images: what is evaluated on, and what the real-image row is calibrated on; either may be missing."""

    evaluation: LabelledData | None
    calibration: LabelledData | None


def _section(options: Namespace, prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(f"{prefix}."): value for name, value in vars(options).items() if name.startswith(f"{prefix}.")
    }


def calibrator_options(options: Namespace) -> dict[str, Any]:
    """Keyword arguments of :class:`DataFreeCalibrator`, checked as far as they can be without the model."""
    if options.images < 1:
        raise InputError(f"--images: expected a whole number >= 1, got {options.images}.")
    for name in ("eval_limit", "eval_batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected a whole number >= 1, got {getattr(options, name)}.")
    overrides = {}
    for text in options.override:
        pattern, equals, bits = text.rpartition("=")
        if not equals or not pattern:
            raise ConfigurationError(f"--override: expected PATTERN=wXaY, for example 'head=w8a8', got {text!r}.")
        overrides[pattern] = bits
    reconstruct = ReconstructConfig(**_section(options, "reconstruct"))
    distill = DistillConfig(epochs=options.epochs, refresh_every=options.refresh_every, **_section(options, "tuning"))
    tuning = {
        "none": [], "distill": [distill], "reconstruct": [reconstruct], "reconstruct+distill": [reconstruct, distill]
    }[options.tune]  # fmt: skip
    return dict(
        scheme=resolve_scheme(f"auto-{options.average_bits:g}" if options.scheme == "auto" else options.scheme),
        overrides=overrides,
        num_images=options.images,
        batch_size=options.batch_size,
        synthesis=SynthesisConfig(
            steps=options.steps, batch_size=options.batch_size, **_section(options, "synthesis")
        ),
        images_from=options.images_from,
        tuning=tuning,
        seed=options.seed,
        device=named_device(options.device),
        progress=not options.quiet,
    )


def named_device(name: str) -> torch.device:
    """The device of a name; raises ConfigurationError, in torch's words, if this machine has none such."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigurationError(f"--device: expected a device of this machine, got {name!r}: {reason}") from error
    return device


def labelled_data(options: Namespace, model: nn.Module) -> Data:
    """Opens the labelled images that the options name; ``digits_vit`` brings its own."""
    shipped = options.model == SHIPPED_MODEL
    evaluation: LabelledData | None = None
    calibration: LabelledData | None = None
    if options.eval_data is not None:
        evaluation = labelled_folder(options.eval_data, model)
    elif shipped:
        evaluation = digits_split(False, model)
    if options.calibration_data is not None:
        calibration = labelled_folder(options.calibration_data, model)
    elif shipped and options.eval_data is None:
        calibration = digits_split(True, model)
    return Data(evaluation, calibration)


def measured(model: nn.Module, data: Data, options: Namespace) -> Accuracy:
    assert data.evaluation is not None  # rows are made only where there are labelled images
    return measure_accuracy(
        model, data.evaluation, batch_size=options.eval_batch_size, limit=options.eval_limit,
        device=options.device, progress=not options.quiet,
    )  # fmt: skip


def saved_options(options: Namespace, *, quiet: bool = False) -> Namespace:
    """The options that the run was made with; raises RunDirectoryError if there is none."""
    folder = Path(options.run)
    RunDirectory.read_identity(folder)
    if not (folder / "quant_model.safetensors").is_file():
        raise RunDirectoryError(
            f"Expected a finished run in {folder}, found no quant_model.safetensors. Finish it with "
            f"'maskaq quantize --config {folder / 'config.yaml'} --out {folder} --resume'."
        )
    saved = read_saved(folder / "config.yaml")
    saved.device = getattr(options, "device", "cpu")
    saved.quiet = quiet or options.quiet
    return saved


def load_run(folder: str, saved: Namespace) -> DataFreeCalibrator:
    """The calibrator of a finished run, with its images and its quant model."""
    model = load_model(saved.model, checkpoint=saved.checkpoint)
    identity = RunDirectory.read_identity(folder)
    if fingerprint(model) != identity["weights"]:
        raise CheckpointError(
            f"Expected the float weights that {folder} was made from, got others for {saved.model!r}. "
            "Put back the checkpoint named in its config.yaml, or quantize again."
        )
    # A finished run has its images itself, and may be older than an option of schemes that its name does not tell.
    options = {**calibrator_options(saved), "images_from": None, "held_back": identity["held_back"]}
    options["scheme"] = scheme_of_run(identity["scheme"])
    calibrator = DataFreeCalibrator(model, **options)
    calibrator.load(folder)
    return calibrator


def export_run(
    calibrator: DataFreeCalibrator, path: Path, kind: str, batch: str
) -> tuple[QonnxCheck, ModelCard | None]:
    """Write the file and execute it on the held-back images; one that fails the check never gets its name.

    A QONNX file gets its card beside it, one for FINN a sample of its input and output.
    """
    images = (calibrator.held_back or calibrator.pool).images()
    checks = []

    def write(aside: Path) -> None:
        shape = calibrator.geometry.input_size
        FORMATS[kind].export(calibrator.quant_model, aside, input_shape=shape, dynamic_batch=batch == "dynamic")
        checks.append(FORMATS[kind].verify(aside, calibrator.quant_model, images))

    write_whole(path, write)
    card = model_card(path) if kind == "qonnx" else None
    if card is not None:
        write_card(card, path)
    if kind == "finn":
        write_finn_sample(calibrator.quant_model, path, images[:1])
    return checks[0], card


def check_line(check: QonnxCheck) -> str:
    verdict = "passed" if check.passed else "FAILED"
    text = (
        f"{verdict}: executed on {check.images} images, largest difference of a logit {check.max_abs_difference:.2g} "
        f"(relative {check.relative_difference:.2g}), equal top-1 {check.top1_agreement:.0%}"
    )
    if check.in_step_difference is not None and check.relative_difference > 10 * check.in_step_difference:
        text += f"; rounding ties apart: relative {check.in_step_difference:.2g}"
    return text
