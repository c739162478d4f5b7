"""What is done with a finished run: ``maskaq evaluate``, ``export`` and ``sensitivity``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from maskaq_brevitas.commands.common import check_line
from maskaq_brevitas.commands.common import export_run
from maskaq_brevitas.commands.common import labelled_data
from maskaq_brevitas.commands.common import load_run
from maskaq_brevitas.commands.common import measured
from maskaq_brevitas.commands.common import saved_options
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.export import FORMATS
from maskaq_brevitas.export import QcdqModel
from maskaq_brevitas.export import QonnxModel
from maskaq_brevitas.export.process import require
from maskaq_brevitas.progress import bars
from maskaq_brevitas.report.report import text_table
from maskaq_brevitas.tuning.sensitivity import Switches
from maskaq_brevitas.tuning.sensitivity import place_blocks
from maskaq_brevitas.tuning.sensitivity import place_kinds
from maskaq_brevitas.tuning.sensitivity import place_layers
from maskaq_brevitas.tuning.sensitivity import sensitivity as measure_sensitivity

__all__ = ["evaluate", "export", "sensitivity"]


def evaluate(options: Namespace) -> None:
    """Print the accuracy of the float and the quantized model of a run, and of a QONNX file with its equal top-1.

    Raises:
        MaskAQError: for bad input, see the messages.
    """
    saved = saved_options(options)
    for name in ("eval_limit", "eval_batch_size"):
        setattr(saved, name, getattr(options, name))
    saved.eval_data = options.eval_data or saved.eval_data
    calibrator = load_run(options.run, saved)
    data = labelled_data(saved, calibrator.float_model)
    if data.evaluation is None:
        raise ConfigurationError("Expected labelled images, got none: name a folder with --eval-data DIR.")
    models = {"float": calibrator.float_model, "quantized": calibrator.freeze()}
    if options.onnx is not None:
        require("onnx", "onnxruntime", "qonnx")
        models["ONNX file"] = _onnx_model(options.onnx, calibrator.geometry.input_size)
    found = {name: measured(model, data, saved) for name, model in models.items()}
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
    saved = saved_options(options, quiet=True)
    calibrator = load_run(options.run, saved)
    output = Path(options.output or Path(options.run) / FORMATS[options.format].file_name)
    check, card = export_run(calibrator, output, options.format, options.batch)
    print(f"{output}\n{check_line(check)}")
    if card is not None:
        print(f"{card.macs / 1e6:.1f} MMACs, {card.bops / 1e9:.3f} GBOPs, weights {card.weight_bits / 8e6:.3f} MB")


def sensitivity(options: Namespace) -> None:
    """Print, most costly first, what each group of quantizers of a run costs with everything else in float.

    Raises:
        MaskAQError: for bad input, see the messages.
    """
    if options.images < 1:
        raise InputError(f"--images: expected a whole number >= 1, got {options.images}.")
    saved = saved_options(options)
    calibrator = load_run(options.run, saved)
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
