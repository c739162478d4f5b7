"""What the commands of ``maskaq`` do, once their options are parsed."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.calibrator import DataFreeCalibrator
from maskaq_brevitas.config import EFFORTS
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import CheckpointError
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import MissingExtraError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.evaluation import Accuracy
from maskaq_brevitas.evaluation import LabelledData
from maskaq_brevitas.evaluation import digits_split
from maskaq_brevitas.evaluation import evaluate as measure_accuracy
from maskaq_brevitas.evaluation import labelled_folder
from maskaq_brevitas.export import FORMATS
from maskaq_brevitas.export import ModelCard
from maskaq_brevitas.export import QcdqModel
from maskaq_brevitas.export import QonnxCheck
from maskaq_brevitas.export import QonnxModel
from maskaq_brevitas.export import model_card
from maskaq_brevitas.export import write_card
from maskaq_brevitas.export.finn import write_finn_sample
from maskaq_brevitas.export.finn_lint import lint_finn as judge_for_finn
from maskaq_brevitas.export.finn_lint import lint_text
from maskaq_brevitas.export.process import require
from maskaq_brevitas.files import write_whole
from maskaq_brevitas.models.families import known_families
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.models.zoo import SHIPPED_MODEL
from maskaq_brevitas.models.zoo import load_model
from maskaq_brevitas.options import read_saved
from maskaq_brevitas.options import to_yaml
from maskaq_brevitas.progress import bars
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.report import AccuracyRow
from maskaq_brevitas.report import Report
from maskaq_brevitas.report.report import text_table
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.run_directory import fingerprint
from maskaq_brevitas.support import check_support
from maskaq_brevitas.support import recorded_support
from maskaq_brevitas.support import refusals
from maskaq_brevitas.synthesis.augment import pixel_noise
from maskaq_brevitas.synthesis.memory import auto_batch_size
from maskaq_brevitas.synthesis.other_run import images_of
from maskaq_brevitas.tuning.sensitivity import Switches
from maskaq_brevitas.tuning.sensitivity import place_blocks
from maskaq_brevitas.tuning.sensitivity import place_kinds
from maskaq_brevitas.tuning.sensitivity import place_layers
from maskaq_brevitas.tuning.sensitivity import sensitivity as measure_sensitivity
from maskaq_brevitas.tuning.stages import fitting_effort

__all__ = ["evaluate", "export", "lint_finn", "models", "quantize", "sensitivity"]

_SPLIT_SEED = 2_000_003


@dataclass(frozen=True)
class _Data:
    """Labelled images: what is evaluated on, and what the real-image row is calibrated on; either may be missing."""

    evaluation: LabelledData | None
    calibration: LabelledData | None


def quantize(options: Namespace) -> None:
    """The main job. Everything that can be wrong with the input is checked before the folder is made.

    Raises:
        MaskAQError: for bad input, see the messages.
    """
    out, mode = Path(options.out), "overwrite" if options.overwrite else "resume" if options.resume else "new"
    _resolve_paths(options)
    automatic = options.batch_size == "auto"
    options.batch_size = 16 if automatic else options.batch_size
    calibration = _calibrator_options(options)
    if not options.no_export:
        require(*FORMATS[options.format].packages)
    if mode == "new" and out.exists() and (out.is_file() or any(out.iterdir())):
        RunDirectory(out, {}, mode)  # says why it is refused
    model = load_model(options.model, checkpoint=options.checkpoint)
    if automatic:
        options.batch_size = _fitting_batch(model, calibration["device"])
    _fit_effort(options, model)
    calibration = _calibrator_options(options)
    calibration["images_from"] = images_of(calibration["images_from"], out, mode)
    calibrator = DataFreeCalibrator(model, **calibration)
    if mode == "resume" and out.is_dir():
        calibrator.run = RunDirectory(out, calibrator.identity(), mode)  # another configuration is refused at once
    data = _labelled_data(options, model)
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
                check, card = _export(
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


def evaluate(options: Namespace) -> None:
    """Print the accuracy of the float and the quantized model of a run, and of a QONNX file with its equal top-1.

    Raises:
        MaskAQError: for bad input, see the messages.
    """
    saved = _saved_options(options)
    for name in ("eval_limit", "eval_batch_size"):
        setattr(saved, name, getattr(options, name))
    saved.eval_data = options.eval_data or saved.eval_data
    calibrator = _load_run(options.run, saved)
    data = _labelled_data(saved, calibrator.float_model)
    if data.evaluation is None:
        raise ConfigurationError("Expected labelled images, got none: name a folder with --eval-data DIR.")
    models = {"float": calibrator.float_model, "quantized": calibrator.freeze()}
    if options.onnx is not None:
        require("onnx", "onnxruntime", "qonnx")
        models["ONNX file"] = _onnx_model(options.onnx, calibrator.geometry.input_size)
    found = {name: _measured(model, data, saved) for name, model in models.items()}
    print(f"{saved.model}, {saved.scheme}\n")
    print(text_table(
        ["model", "top-1 [%]", "images"], [[name, f"{row.top1:.2f}", row.images] for name, row in found.items()]
    ))  # fmt: skip
    if options.onnx is not None:
        equal = found["ONNX file"].predictions == found["quantized"].predictions
        print(f"\nONNX file and quantized model: equal top-1 on {int(equal.sum())} of {len(equal)} images")


def _onnx_model(path: str, shape: tuple[int, ...]) -> nn.Module:
    """A file as a module, executed by what its operators ask for: qonnx for Quant nodes, else ONNX Runtime."""
    import onnx

    try:
        domains = {entry.domain for entry in onnx.load(path).opset_import}
    except Exception as error:
        raise ExportError(
            f"Expected a QONNX or QCDQ file at {path}, got {type(error).__name__}: {error}. Write it with 'maskaq "
            "export'."
        ) from error
    return QonnxModel(path, shape) if any(domain.startswith("qonnx") for domain in domains) else QcdqModel(path, shape)


def export(options: Namespace) -> None:
    """Write the quantized model of a run as a file, check it on the held-back images, and print the check.

    Raises:
        MaskAQError: for bad input, see the messages; ExportError if the file does not compute what the model computes.
    """
    require(*FORMATS[options.format].packages)
    saved = _saved_options(options, quiet=True)
    calibrator = _load_run(options.run, saved)
    output = Path(options.output or Path(options.run) / FORMATS[options.format].file_name)
    check, card = _export(calibrator, output, options.format, options.batch)
    print(f"{output}\n{_check_line(check)}")
    if card is not None:
        print(f"{card.macs / 1e6:.1f} MMACs, {card.bops / 1e9:.3f} GBOPs, weights {card.weight_bits / 8e6:.3f} MB")


def lint_finn(options: Namespace) -> int:
    """Print what FINN would make of a QONNX file; 0 if every node becomes hardware, else 1.

    Raises:
        MaskAQError: if the file cannot be read.
    """
    lint = judge_for_finn(options.file)
    print(lint_text(lint, every_node=options.all, only_verdict=options.quiet))
    return 0 if lint.lands else 1


def sensitivity(options: Namespace) -> None:
    """Print, most costly first, what each group of quantizers of a run costs with everything else in float.

    Raises:
        MaskAQError: for bad input, see the messages.
    """
    if options.images < 1:
        raise InputError(f"--images: expected a whole number >= 1, got {options.images}.")
    saved = _saved_options(options)
    calibrator = _load_run(options.run, saved)
    images = calibrator.pool.images()[: options.images].to(calibrator.device)
    names = Switches(calibrator.quant_model).names
    group = {"kind": place_kinds, "layer": place_layers, "block": place_blocks}[options.by]
    groups: dict[str, Sequence[str]] = {**group(names), "none": (), "all": names}
    with bars(not options.quiet)(len(groups), "Measuring") as bar:
        found = measure_sensitivity(
            calibrator.quant_model, calibrator.maker.float_snapshot, images.split(saved.batch_size), groups,
            on_group=lambda _: bar.update(),
        )  # fmt: skip
    found = [*sorted(found[:-2], key=lambda entry: -entry.divergence), *found[-2:]]
    print(
        f"{saved.model}, {saved.scheme}: one {options.by} quantized, all else in float, {len(images)} synthetic "
        "images\n"
    )
    print(text_table(
        [options.by, "quantizers", "KL divergence from float [nats]", "equal top-1 [%]"],
        [[entry.name, entry.places, f"{entry.divergence:.4f}", f"{100 * entry.agreement:.1f}"] for entry in found],
    ))  # fmt: skip


def models(options: Namespace) -> None:
    """Print what works for each architecture family.

    Raises:
        ConfigurationError: if no family or example has the text in its name.
        MissingExtraError: if a family is to be measured whose package is not installed.
    """
    rows = recorded_support()
    wanted = (options.family or "").lower()
    rows = [row for row in rows if wanted in row.family.lower() or wanted in row.example.lower()]
    if not rows:
        known = ", ".join(dict.fromkeys(row.family for row in recorded_support()))
        raise ConfigurationError(f"Expected a text that is part of a family's name ({known}), got {options.family!r}.")
    if options.check:
        families = {family.name: family for family in known_families(optional=True)}
        if any(row.family not in families for row in rows):
            raise MissingExtraError("transformers", "hf")
        rows = [check_support(families[row.family], row.example).row for row in rows]
    titles = ["family", "example", "swapped", "MACs quantized", "taps", "FX", "QONNX", "ONNX Runtime"]
    print(text_table(titles, [list(vars(row).values()) for row in rows], right=()))
    print("\nMeasured on small models of these architectures, with random weights.")
    if not wanted:
        print("Known, and refused:")
        for reason in refusals():
            print(f"- {reason}")


def _resolve_paths(options: Namespace) -> None:
    """Absolute paths, so that the saved configuration holds in any folder."""
    for name in ("checkpoint", "eval_data", "calibration_data", "images_from"):
        if getattr(options, name) is not None:
            setattr(options, name, str(Path(getattr(options, name)).resolve()))


def _section(options: Namespace, prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(f"{prefix}."): value for name, value in vars(options).items() if name.startswith(f"{prefix}.")
    }


def _calibrator_options(options: Namespace) -> dict[str, Any]:
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
        device=_device(options.device),
        progress=not options.quiet,
    )


def _fit_effort(options: Namespace, model: nn.Module) -> None:
    """What a model does not bear of its effort (:func:`~maskaq_brevitas.tuning.stages.fitting_effort`) does not hold;
    where the user names it, it is refused.
    """
    usual, values = EFFORTS[options.effort], vars(options)
    fitting = fitting_effort(usual, model)
    for section, before, after in (
        ("synthesis", usual.synthesis, fitting.synthesis), ("tuning", usual.tuning, fitting.tuning)
    ):  # fmt: skip
        for key, value in ({} if before is None else vars(before)).items():
            if getattr(after, key) != value and values[f"{section}.{key}"] == value:
                values[f"{section}.{key}"] = getattr(after, key)


def _fitting_batch(model: nn.Module, device: torch.device) -> int:
    image = torch.zeros(1, *read_geometry(model).input_size, device=device)
    return auto_batch_size(float_snapshot(model).to(device), image)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigurationError(f"--device: expected a device of this machine, got {name!r}: {reason}") from error
    return device


def _labelled_data(options: Namespace, model: nn.Module) -> _Data:
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
    return _Data(evaluation, calibration)


def _measured(model: nn.Module, data: _Data, options: Namespace) -> Accuracy:
    assert data.evaluation is not None  # rows are made only where there are labelled images
    return measure_accuracy(
        model, data.evaluation, batch_size=options.eval_batch_size, limit=options.eval_limit,
        device=options.device, progress=not options.quiet,
    )  # fmt: skip


def _row(
    name: str, model: nn.Module, data: _Data, options: Namespace, calibration_images: int | None = None
) -> AccuracyRow:
    found = _measured(model, data, options)
    return AccuracyRow(name=name, top1=found.top1, images=found.images, calibration_images=calibration_images)


def _real_images(calibrator: DataFreeCalibrator, data: _Data, options: Namespace) -> Tensor | None:
    """As many real images as there are synthetic ones, drawn by the seed; None if there are none or none are wanted."""
    if data.calibration is None or data.evaluation is None or options.no_baselines:
        return None
    order = torch.randperm(len(data.calibration), generator=torch.Generator().manual_seed(options.seed))
    return torch.stack([data.calibration[index][0] for index in order[: options.images].tolist()])


def _compared_rows(
    calibrator: DataFreeCalibrator, real: Tensor | None, data: _Data, options: Namespace
) -> list[AccuracyRow]:
    """The same quantizers, calibrated in the same way, on noise, on the synthetic and on real images."""
    count = options.images
    rows = []

    def calibrated_row(name: str, images: Tensor | None) -> AccuracyRow:
        return _row(f"calibrated on {name}", calibrator.calibrated_on(images), data, options, count)

    if not options.no_baselines:
        rows.append(calibrated_row("Gaussian noise", _noise(calibrator, count, options.seed)))
    if not calibrator.tuning:
        rows.append(_row("calibrated on synthetic images", calibrator.freeze(), data, options, count))
    else:
        rows.append(calibrated_row("synthetic images", None))
        rows.append(_row("tuned on synthetic images", calibrator.freeze(), data, options, count))
    if real is not None:
        split = "real training images" if options.calibration_data is None else "real images"
        rows.append(calibrated_row(split, real))
    return rows


def _noise(calibrator: DataFreeCalibrator, count: int, seed: int) -> Tensor:
    shape = (count, *calibrator.geometry.input_size)
    low, high = calibrator.geometry.bounds(torch.zeros(()))
    return pixel_noise(shape, low, high, torch.Generator().manual_seed(_SPLIT_SEED + seed))


def _export(
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


def _saved_options(options: Namespace, *, quiet: bool = False) -> Namespace:
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


def _load_run(folder: str, saved: Namespace) -> DataFreeCalibrator:
    """The calibrator of a finished run, with its images and its quant model."""
    model = load_model(saved.model, checkpoint=saved.checkpoint)
    identity = RunDirectory.read_identity(folder)
    if fingerprint(model) != identity["weights"]:
        raise CheckpointError(
            f"Expected the float weights that {folder} was made from, got others for {saved.model!r}. "
            "Put back the checkpoint named in its config.yaml, or quantize again."
        )
    # A finished run has its images itself.
    options = {**_calibrator_options(saved), "images_from": None, "held_back": identity["held_back"]}
    calibrator = DataFreeCalibrator(model, **options)
    calibrator.load(folder)
    return calibrator


def _check_line(check: QonnxCheck) -> str:
    verdict = "passed" if check.passed else "FAILED"
    text = (
        f"{verdict}: executed on {check.images} images, largest difference of a logit {check.max_abs_difference:.2g} "
        f"(relative {check.relative_difference:.2g}), equal top-1 {check.top1_agreement:.0%}"
    )
    if check.in_step_difference is not None and check.relative_difference > 10 * check.in_step_difference:
        text += f"; rounding ties apart: relative {check.in_step_difference:.2g}"
    return text


def _print_result(
    report: Report, calibrator: DataFreeCalibrator, check: QonnxCheck | None, kind: str, out: Path
) -> None:
    """The one table of the main job."""
    cost = report.cost
    rows: list[list[Any]] = [
        [row.name, f"{row.top1:.2f} %", f"{row.images} labelled images"] for row in report.accuracy
    ]
    rows += [
        [f"agrees with float on {name} images", f"{100 * share:.2f} %", f"{len(pool)} images"]
        for (name, share), pool in zip(report.agreement.items(), (calibrator.pool, calibrator.held_back), strict=False)
        if pool is not None
    ]
    rows.append(["size", f"{cost.bytes_quantized / 1e6:.3f} MB", f"float32: {cost.bytes_float32 / 1e6:.3f} MB"])
    rows.append(["GBOPs per image", f"{cost.bops / 1e9:.3f}", f"float32: {cost.bops_float32 / 1e9:.3f}"])
    if check is not None:
        verdict, _, figures = _check_line(check).partition(": ")
        rows.append([f"{FORMATS[kind].title} check", verdict, figures])
    titles = [report.title, "top-1" if report.accuracy else "", ""]
    print(text_table(titles, rows, right=(1,)))
    seconds = sum(stage["seconds"] for stage in calibrator.stages)
    print(f"\n{seconds:.0f} s; report, images, model and configuration are in {out}")
