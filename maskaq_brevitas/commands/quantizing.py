"""``maskaq quantize``."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.calibrator import DataFreeCalibrator
from maskaq_brevitas.commands.common import Data
from maskaq_brevitas.commands.common import calibrator_options
from maskaq_brevitas.commands.common import check_line
from maskaq_brevitas.commands.common import export_run
from maskaq_brevitas.commands.common import labelled_data
from maskaq_brevitas.commands.common import measured
from maskaq_brevitas.config import EFFORTS
from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import MissingExtraError
from maskaq_brevitas.export import FORMATS
from maskaq_brevitas.export import QonnxCheck
from maskaq_brevitas.export.process import require
from maskaq_brevitas.files import write_whole
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.models.zoo import load_model
from maskaq_brevitas.options import to_yaml
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.report import AccuracyRow
from maskaq_brevitas.report import Report
from maskaq_brevitas.report.report import AGREEMENT_IMAGES
from maskaq_brevitas.report.report import text_table
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.synthesis.augment import pixel_noise
from maskaq_brevitas.synthesis.memory import auto_batch_size
from maskaq_brevitas.synthesis.other_run import images_of
from maskaq_brevitas.tuning.stages import fitting_effort

__all__ = ["quantize"]

_SPLIT_SEED = 2_000_003
# What an effort may not hold for a model, in groups that are the user's as soon as one of each is.
_FITTED = (("kept_tokens",), ("head_weight", "entropy_weight", "align_weight"))


def quantize(options: Namespace) -> None:
    """The main job. Everything that can be wrong with the input is checked before the folder is made.

    Raises:
        MaskAQError: for bad input, see the messages.
    """
    out, mode = Path(options.out), "overwrite" if options.overwrite else "resume" if options.resume else "new"
    _resolve_paths(options)
    automatic = options.batch_size == "auto"
    options.batch_size = 16 if automatic else options.batch_size
    calibration = calibrator_options(options)
    if not options.no_export:
        require(*FORMATS[options.format].packages)
    if mode == "new" and out.exists() and (out.is_file() or any(out.iterdir())):
        RunDirectory(out, {}, mode)  # says why it is refused
    model = load_model(options.model, checkpoint=options.checkpoint)
    if automatic:
        options.batch_size = _fitting_batch(model, calibration["device"])
    _fit_effort(options, model)
    calibration = calibrator_options(options)
    calibration["images_from"] = images_of(calibration["images_from"], out, mode)
    calibrator = DataFreeCalibrator(model, **calibration)
    if mode == "resume" and out.is_dir():
        calibrator.run = RunDirectory(out, calibrator.identity(), mode)  # another configuration is refused at once
    data = labelled_data(options, model)
    rows = []
    if data.evaluation is not None:
        with calibrator.stage("evaluation of the float model"):  # it also decodes every image
            rows.append(_row("float", model, data, options))
    real = _real_images(calibrator, data, options)
    calibrator.run = RunDirectory(out, calibrator.identity(), mode)
    write_whole(out / "config.yaml", lambda aside: aside.write_text(to_yaml(options), encoding="utf-8"))

    calibrator.quantize()
    calibrator.save()
    if data.evaluation is not None:
        with calibrator.stage("evaluation and baselines"):
            rows += _compared_rows(calibrator, real, data, options)
    check = card = failure = None
    if not options.no_export:
        with calibrator.stage("export and check"):
            try:
                check, card = export_run(
                    calibrator, out / FORMATS[options.format].file_name, options.format, options.batch
                )
            except ExportError as error:  # the rest of the run is worth a report
                failure = error
    report = calibrator.report(
        rows=rows, qonnx_check=check, model_card=card, title=f"{options.model}, {options.scheme}"
    )
    try:
        report.save(out)
    except MissingExtraError as error:
        print(f"maskaq: warning: {out}/images.png is left out. {error}", file=sys.stderr)
    _print_result(report, calibrator, check, options.format, out)
    if failure is not None:
        raise failure


def _resolve_paths(options: Namespace) -> None:
    """Absolute paths, so that the saved configuration holds in any folder."""
    for name in ("checkpoint", "eval_data", "calibration_data", "images_from"):
        if getattr(options, name) is not None:
            setattr(options, name, str(Path(getattr(options, name)).resolve()))


def _fit_effort(options: Namespace, model: nn.Module) -> None:
    """What a model does not bear of its effort (:func:`~maskaq_brevitas.tuning.stages.fitting_effort`) does not hold;
    where the user names it, it is refused.
    """
    usual, values = EFFORTS[options.effort], vars(options)
    fitting = fitting_effort(usual, model)
    if options.images_from is None and options.images == usual.num_images:
        options.images = fitting.num_images
    for section, before, after in (
        ("synthesis", usual.synthesis, fitting.synthesis), ("tuning", usual.tuning, fitting.tuning)
    ):  # fmt: skip
        if before is None or after is None or (section == "synthesis" and options.images_from is not None):
            continue
        for names in _FITTED:
            changed = [name for name in names if getattr(before, name, None) != getattr(after, name, None)]
            if all(values[f"{section}.{name}"] == getattr(before, name) for name in changed):
                values.update({f"{section}.{name}": getattr(after, name) for name in changed})


def _fitting_batch(model: nn.Module, device: torch.device) -> int:
    image = torch.zeros(1, *read_geometry(model).input_size, device=device)
    return auto_batch_size(float_snapshot(model).to(device), image)


def _row(
    name: str, model: nn.Module, data: Data, options: Namespace, calibration_images: int | None = None
) -> AccuracyRow:
    found = measured(model, data, options)
    return AccuracyRow(name=name, top1=found.top1, images=found.images, calibration_images=calibration_images)


def _real_images(calibrator: DataFreeCalibrator, data: Data, options: Namespace) -> Tensor | None:
    """As many real images as synthetic ones calibrate, drawn by the seed; None if there are none or none are wanted."""
    if data.calibration is None or data.evaluation is None or options.no_baselines:
        return None
    order = torch.randperm(len(data.calibration), generator=torch.Generator().manual_seed(options.seed))
    return torch.stack([data.calibration[index][0] for index in order[: calibrator.calibration_images].tolist()])


def _compared_rows(
    calibrator: DataFreeCalibrator, real: Tensor | None, data: Data, options: Namespace
) -> list[AccuracyRow]:
    """The same quantizers, calibrated in the same way, on noise, on the synthetic and on real images."""
    count = calibrator.calibration_images
    rows = []

    def calibrated_row(name: str, images: Tensor | None) -> AccuracyRow:
        return _row(f"calibrated on {name}", calibrator.calibrated_on(images), data, options, count)

    if not options.no_baselines:
        rows.append(calibrated_row("Gaussian noise", _noise(calibrator, count, options.seed)))
    if not calibrator.tuning:
        rows.append(_row("calibrated on synthetic images", calibrator.freeze(), data, options, count))
    else:
        rows.append(calibrated_row("synthetic images", None))
        rows.append(_row("tuned on synthetic images", calibrator.freeze(), data, options, options.images))
    if real is not None:
        split = "real training images" if options.calibration_data is None else "real images"
        rows.append(calibrated_row(split, real))
    return rows


def _noise(calibrator: DataFreeCalibrator, count: int, seed: int) -> Tensor:
    shape = (count, *calibrator.geometry.input_size)
    low, high = calibrator.geometry.bounds(torch.zeros(()))
    return pixel_noise(shape, low, high, torch.Generator().manual_seed(_SPLIT_SEED + seed))


def _print_result(
    report: Report, calibrator: DataFreeCalibrator, check: QonnxCheck | None, kind: str, out: Path
) -> None:
    """The one table of the main job."""
    cost = report.cost
    rows: list[list[Any]] = [
        [row.name, f"{row.top1:.2f} %", f"{row.images} labelled images"] for row in report.accuracy
    ]
    rows += [
        [f"agrees with float on {name} images", f"{100 * share:.2f} %", f"{min(len(pool), AGREEMENT_IMAGES)} images"]
        for (name, share), pool in zip(report.agreement.items(), (calibrator.pool, calibrator.held_back), strict=False)
        if pool is not None
    ]
    rows.append(["size", f"{cost.bytes_quantized / 1e6:.3f} MB", f"float32: {cost.bytes_float32 / 1e6:.3f} MB"])
    rows.append(["GBOPs per image", f"{cost.bops / 1e9:.3f}", f"float32: {cost.bops_float32 / 1e9:.3f}"])
    if check is not None:
        verdict, _, figures = check_line(check).partition(": ")
        rows.append([f"{FORMATS[kind].title} check", verdict, figures])
    titles = [report.title, "top-1" if report.accuracy else "", ""]
    print(text_table(titles, rows, right=(1,)))
    seconds = sum(stage["seconds"] for stage in calibrator.stages)
    print(f"\n{seconds:.0f} s; report, images, model and configuration are in {out}")
