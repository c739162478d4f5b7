"""The report of a run: what was quantized how, what it costs, how well it agrees, and how it was made."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.files import write_whole
from maskaq_brevitas.models.families import has_classes
from maskaq_brevitas.modes import evaluation_mode
from maskaq_brevitas.quant.cost import multiply_accumulates
from maskaq_brevitas.quant.snapshot import frozen_snapshot
from maskaq_brevitas.report.figures import Cost
from maskaq_brevitas.report.figures import PlaceFigures
from maskaq_brevitas.report.figures import QuantizerFigures
from maskaq_brevitas.report.figures import measure_cost
from maskaq_brevitas.report.figures import measure_places
from maskaq_brevitas.report.pictures import save_image_grid
from maskaq_brevitas.synthesis.maker import device_batches
from maskaq_brevitas.synthesis.pool import SyntheticImages

if TYPE_CHECKING:
    from maskaq_brevitas.calibrator import DataFreeCalibrator

__all__ = ["AGREEMENT_IMAGES", "AccuracyRow", "Report", "make_report", "text_table"]

#: Images of a pool, at most, on which a report compares both models: thousands would take minutes.
AGREEMENT_IMAGES = 256

_FLOAT_BY_DESIGN = (
    "LayerNorm, softmax, activation functions, residual additions, biases, position embedding, class token"
)
_PICTURES = 16

#: Draws a table from its titles and rows.
_Table = Callable[[list[str], list[list[Any]]], str]


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """Accuracy of one model on labelled images, which nothing was chosen on.

    Attributes:
        name: of the model, for example ``"calibrated on Gaussian noise"``.
        top1: percent.
        images: number of labelled images.
        calibration_images: number of images that its scales were set on; ``None`` for the float model.
    """

    name: str
    top1: float
    images: int
    calibration_images: int | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Figures of a run; ``print`` it, or :meth:`save` it.

    Attributes:
        title: model and scheme.
        places: every quantized layer and operand, in the model's order.
        cost: totals.
        agreement: share of images with the float model's top-1, 0-1, per pool (``"synthetic"``, ``"held-back
            synthetic"``); of a model without classes the mean cosine similarity of its features to the float model's.
            Of a large pool the first :data:`AGREEMENT_IMAGES` count.
        accuracy: rows on labelled data, if there was any.
        details: everything else as plain values: skipped layers, notes, equalised places, range factors, redrawn
            images, refreshes, export and its check, configuration, stages.
        pictures: the images that ``images.png`` shows.
    """

    title: str
    places: tuple[PlaceFigures, ...]
    cost: Cost
    agreement: dict[str, float]
    accuracy: tuple[AccuracyRow, ...]
    details: dict[str, Any]
    pictures: SyntheticImages = field(repr=False, compare=False)

    def __str__(self) -> str:
        return "\n".join(self._lines(text_table, heading=lambda text: f"\n{text}\n{'-' * len(text)}")).strip()

    def to_json(self) -> str:
        """The whole report as JSON; an infinite SQNR (no error at all) is ``null``."""
        content = {
            "title": self.title,
            "accuracy": [dataclasses.asdict(row) for row in self.accuracy],
            "agreement": self.agreement,
            "cost": dataclasses.asdict(self.cost),
            "places": [dataclasses.asdict(place) for place in self.places],
            **self.details,
        }
        return json.dumps(_finite(content), indent=2) + "\n"

    def to_markdown(self) -> str:
        """The report as a Markdown page."""
        lines = [f"# {self.title}", *self._lines(_markdown_table, heading=lambda text: f"\n## {text}\n")]
        return "\n".join([*lines, "", "![Synthetic images beside their informative patches](images.png)", ""])

    def save(self, folder: str | Path) -> None:
        """Write ``report.json``, ``report.md`` and ``images.png``; each appears only when whole.

        Raises:
            MissingExtraError: if matplotlib is not installed; the other two files are written then.
        """
        folder = Path(folder)
        write_whole(folder / "report.json", lambda aside: aside.write_text(self.to_json(), encoding="utf-8"))
        write_whole(folder / "report.md", lambda aside: aside.write_text(self.to_markdown(), encoding="utf-8"))
        pool = self.pictures
        shown = pool.pixels[:_PICTURES], pool.labels[:_PICTURES].tolist(), pool.informative[:_PICTURES]
        write_whole(folder / "images.png", lambda aside: save_image_grid(aside, *shown, pool.geometry.grid))

    def _lines(self, table: _Table, heading: Callable[[str], str]) -> Iterator[str]:
        """The text, section by section, with tables and headings drawn by the functions given."""
        cost, details = self.cost, self.details
        if self.accuracy:
            yield heading("Accuracy")
            yield table(
                ["model", "calibration images", "top-1 [%]", "labelled images"],
                [[row.name, _or_dash(row.calibration_images), f"{row.top1:.2f}", row.images] for row in self.accuracy],
            )
        yield heading("Totals")
        yield table(
            ["", "quantized", "float32", "ratio"],
            [
                ["size [MB]", f"{cost.bytes_quantized / 1e6:.3f}", f"{cost.bytes_float32 / 1e6:.3f}",
                 f"{cost.bytes_quantized / cost.bytes_float32:.3f}"],
                ["GBOPs per image", f"{cost.bops / 1e9:.3f}", f"{cost.bops_float32 / 1e9:.3f}",
                 f"{cost.bops / cost.bops_float32:.4f}"],
            ],
        )  # fmt: skip
        yield ""
        yield f"- {cost.parameters:,} parameters, {cost.macs / 1e9:.4f} GMACs per image"
        yield f"- share of MACs that runs quantized: {cost.macs_quantized / cost.macs:.2%}"
        for name, share in self.agreement.items():
            kind = "cosine similarity of the features with" if details["features"] else "top-1 equal to"
            yield f"- {kind} the float model on the {name} images: {share:.2%}"
        for note in details["notes"]:
            yield f"- {note}"
        if details["qonnx"]:
            yield heading("Check of the exported file")
            yield "\n".join(f"- {key}: {value}" for key, value in details["qonnx"].items())
        if details["card"]:
            yield heading("QONNX model card")
            yield from _card_lines(details["card"], table)
        yield heading("Quantized places")
        yield table(
            ["name", "type", "weight bits", "weight scale", "weight SQNR [dB]", "activation bits", "activation scale",
             "zero point", "activation SQNR [dB]", "MMACs"],
            [_place_row(place) for place in self.places],
        )  # fmt: skip
        blocks = [entry for entry in details["history"] if entry["event"] == "block"]
        if blocks:
            yield heading("Reconstruction")
            keys = ["block", "before", "after", "train_before", "train_after", "kept", "seconds"]
            yield table(keys, [[_number(entry[key]) for key in keys] for entry in blocks])
            yield "\nrelative errors of the blocks' outputs; before and after are on the held-back images"
        epochs = [entry for entry in details["history"] if entry["event"] == "epoch"]
        if epochs:
            yield heading("Tuning")
            keys = ["epoch", "train_loss", "held_back_loss", "skipped_steps", "pool_version", "seconds"]
            yield table(keys, [[_number(entry[key]) for key in keys] for entry in epochs])
            yield f"\nkept: epoch {details['best_epoch']} (0 is the calibrated model), by the held-back loss"
        if details["refreshes"]:
            yield heading("Refreshes")
            yield table(list(details["refreshes"][0]), [[_number(value) for value in entry.values()]
                                                        for entry in details["refreshes"]])  # fmt: skip
        yield heading("Stages")
        yield table(
            ["stage", "seconds", "peak memory so far [MiB]"],
            [[stage["stage"], stage["seconds"], stage["peak_memory_mib"]] for stage in details["stages"]],
        )
        yield heading("Configuration")
        yield "\n".join(f"- {key}: {value}" for key, value in details["configuration"].items())


@torch.no_grad()
def make_report(
    calibrator: DataFreeCalibrator,
    *,
    rows: Iterable[AccuracyRow] | None = None,
    qonnx_check: Any | None = None,
    model_card: Any | None = None,
    title: str | None = None,
) -> Report:
    """The report of a calibrated run. SQNRs are measured on the held-back images (on the pool if there are none).

    Args:
        calibrator: whose quant model is calibrated; it is left as it was.
        rows: accuracy on labelled data.
        qonnx_check: a :class:`~maskaq_brevitas.export.verify.QonnxCheck` of the exported file.
        model_card: a :class:`~maskaq_brevitas.export.card.ModelCard`, if it is a QONNX file.
        title: what the run is called; default: type of the model and scheme.
    """
    pool = calibrator.ensure_images()
    measured = calibrator.held_back or pool
    macs = multiply_accumulates(calibrator.float_model)
    floating = calibrator.maker.float_snapshot
    pools = {"synthetic": pool, "held-back synthetic": calibrator.held_back}
    # Inside a larger model figures are of its backbone.
    quant_model = calibrator.quant_backbone
    with evaluation_mode(quant_model):
        places = measure_places(quant_model, _batches(calibrator, measured), macs)
        cost = measure_cost(calibrator.float_model, quant_model, places, macs)
        try:
            quantized: nn.Module = frozen_snapshot(quant_model, calibrator.geometry.input_size)
        except ModelError:  # a quant model of the user's with quantizers that cannot be frozen
            quantized = quant_model
        agreement = {
            name: _agreement(floating, quantized, _first(calibrator, images))
            for name, images in pools.items()
            if images is not None
        }
    check = None if qonnx_check is None else dataclasses.asdict(qonnx_check)
    return Report(
        title=title or f"{type(calibrator.float_model).__name__}, {_origin(calibrator)}",
        places=tuple(places),
        cost=cost,
        agreement=agreement,
        accuracy=tuple(rows or ()),
        details={
            "notes": list(_notes(calibrator)),
            "features": not has_classes(calibrator.float_model),
            "skipped_layers": [dataclasses.asdict(layer) for layer in _skipped(calibrator)],
            "float_by_design": _FLOAT_BY_DESIGN if calibrator.swap_record is not None else None,
            "equalized_places": [
                {name: value for name, value in vars(place).items() if name not in ("consumers", "scales")}
                for place in calibrator.equalized
            ],
            "range_factors": calibrator.range_factors,
            "redrawn_images": calibrator.redrawn,
            "refreshes": calibrator.refreshes,
            "history": calibrator.history,
            "best_epoch": getattr(calibrator, "best_epoch", None),
            "qonnx": check,
            "card": None if model_card is None else dataclasses.asdict(model_card),
            "configuration": calibrator.identity(),
            "stages": calibrator.stages,
        },
        pictures=pool,
    )


def _card_lines(card: dict[str, Any], table: _Table) -> Iterator[str]:
    """Costs and data types as qonnx reads them from the file; the totals above are counted on the PyTorch model."""
    yield table(["operands", "MMACs"], [[types, f"{count / 1e6:.3f}"] for types, count in card["macs_by_type"].items()])
    yield ""
    yield f"- {card['macs'] / 1e6:.3f} MMACs, {card['bops'] / 1e9:.3f} GBOPs per image (qonnx.util.inference_cost)"
    yield f"- weights: {card['weights']:,}, {card['weight_bits'] / 8e6:.3f} MB"
    size = f"{card['activations']:,}, {card['activation_bits'] / 8e6:.3f} MB"
    yield f"- outputs of convolutions and matrix products: {size}"
    yield f"- operators that are not counted: {', '.join(card['uncounted']) or 'none'}"
    counts = Counter(card["tensors"].values())
    yield f"- data types of {len(card['tensors'])} tensors: " + ", ".join(
        f"{count} {name}" for name, count in counts.items()
    )
    yield ""
    yield table(["quantizer", "data type"], list(card["quantizers"].items()))


def _batches(calibrator: DataFreeCalibrator, pool: SyntheticImages) -> Iterator[Tensor]:
    return device_batches(pool, calibrator.batch_size or 16, calibrator.device)


def _first(calibrator: DataFreeCalibrator, pool: SyntheticImages) -> Iterator[Tensor]:
    """Batches of the images that tell how well both models agree."""
    images = pool.images(pool.pixels[:AGREEMENT_IMAGES])
    return (batch.to(calibrator.device) for batch in images.split(calibrator.batch_size or 16))


def _agreement(floating: nn.Module, quantized: nn.Module, batches: Iterable[Tensor]) -> float:
    if not has_classes(floating):
        pairs = [(floating(images).flatten(1), quantized(images).flatten(1)) for images in batches]
        return float(torch.cat([torch.cosine_similarity(p, q, dim=1) for p, q in pairs]).double().mean())
    equal = [floating(images).argmax(-1) == quantized(images).argmax(-1) for images in batches]
    return float(torch.cat(equal).double().mean())


def _skipped(calibrator: DataFreeCalibrator) -> Sequence[Any]:
    return calibrator.swap_record.skipped if calibrator.swap_record is not None else ()


def _origin(calibrator: DataFreeCalibrator) -> str:
    return calibrator.scheme.name if calibrator.swap_record is not None else "quant model as given"


def _notes(calibrator: DataFreeCalibrator) -> Iterator[str]:
    if calibrator.hosted is not None:
        larger = type(calibrator.hosted.model).__name__
        yield f"figures, and names of layers, are of the backbone {calibrator.hosted.name!r} of {larger} alone"
    if calibrator.swap_record is None:
        yield "the quant model was given: what it leaves in float is not known here, and was not chosen here"
        return
    scheme = calibrator.scheme
    yield f"float by design: {_FLOAT_BY_DESIGN}"
    skipped = "; ".join(f"{layer.name} ({layer.type_name}: {layer.reason})" for layer in _skipped(calibrator))
    yield f"layers skipped: {skipped or 'none'}"
    if scheme.resolved_probability_bits != scheme.bits.activation:
        yield (
            f"attention probabilities are kept at {scheme.resolved_probability_bits} bits, nominal activations are at "
            f"{scheme.bits.activation}: compare strict-* with schemes that quantize them at the nominal width"
        )
    if calibrator.allocated:
        counts = Counter(calibrator.allocated.values())
        spread = ", ".join(f"{count} at {bits}" for bits, count in sorted(counts.items()))
        yield f"bit widths chosen by sensitivity, within the bit operations of {scheme.average_bits:g} bits: {spread}"
    own_scales = [place for place in calibrator.equalized if place.per_channel]
    if own_scales:
        yield f"one scale per channel, each channel shifted to its grid, at {len(own_scales)} inputs of linear layers"
    equalized = [place for place in calibrator.equalized if not place.per_channel]
    moved = [place for place in equalized if place.error < place.error_before]
    if equalized:
        alphas = [place.alpha for place in moved]
        spread = f", exponents {min(alphas):g} to {max(alphas):g}" if alphas else ""
        yield f"channels equalised at {len(moved)} of {len(equalized)} places{spread}"
    if calibrator.range_factors:
        factors = sorted(calibrator.range_factors.values())
        yield (
            f"activation ranges searched at {len(factors)} places: {factors[0]:.3f} to {factors[-1]:.3f} of the "
            f"largest value, median {factors[len(factors) // 2]:.3f}"
        )
    yield f"images drawn again because their objective was not finite: {calibrator.redrawn}"


def _place_row(place: PlaceFigures) -> list[str]:
    weight, activation = place.weight, place.activation
    return [
        place.name, place.kind, *_quantizer_cells(weight),
        _quantizer_cells(activation)[0] if place.arriving_bits is None else str(place.arriving_bits),
        _quantizer_cells(activation)[1],
        _or_dash(None if activation is None else activation.zero_point), _quantizer_cells(activation)[2],
        f"{place.macs / 1e6:.3f}",
    ]  # fmt: skip


def _quantizer_cells(figures: QuantizerFigures | None) -> list[str]:
    if figures is None:
        return ["-", "-", "-"]
    low, high = figures.scale
    scale = f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}"
    return [str(figures.bits), scale, "-" if figures.sqnr is None else f"{figures.sqnr:.1f}"]


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """Plain values with infinities and NaN as ``None``: JSON knows neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_table(titles: list[str], rows: list[list[Any]], *, right: Sequence[int] | None = None) -> str:
    """Rows in aligned columns; the columns in ``right`` (default: all but the first) are aligned to the right."""
    cells = [titles, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    aligned = range(1, len(titles)) if right is None else right
    lines = [
        "  ".join(cell.rjust(widths[i]) if i in aligned else cell.ljust(widths[i]) for i, cell in enumerate(row))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _markdown_table(titles: list[str], rows: list[list[Any]]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
