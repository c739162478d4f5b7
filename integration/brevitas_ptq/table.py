"""The cells of the table: measured one by one, kept in a JSON file, printed as Markdown."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import time
import warnings
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset

from integration.brevitas_ptq.algorithms import MODELS
from integration.brevitas_ptq.algorithms import TUNERS
from integration.brevitas_ptq.algorithms import Loader
from integration.brevitas_ptq.algorithms import ModelKind
from integration.brevitas_ptq.algorithms import borrowed_settings
from integration.brevitas_ptq.algorithms import calibrated_model
from integration.brevitas_ptq.algorithms import changed_layers
from integration.brevitas_ptq.algorithms import learned_round
from integration.brevitas_ptq.whole_run import quantize_ptq_imagenet
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.evaluation import evaluate
from maskaq_brevitas.files import write_whole
from maskaq_brevitas.quant.snapshot import frozen_snapshot

__all__ = ["ALGORITHMS", "KINDS", "Bench", "CellStore", "markdown"]

ALGORITHMS: dict[str, str] = {
    "calibrate": "calibrate",
    "bias-correction": "+ apply_bias_correction",
    "act-equalization": "apply_act_equalization, then calibrate",
    "gptq": "+ apply_gptq",
    "gpfq": "+ apply_gpfq",
    "qronos": "+ apply_qronos",
    "learned-round": "+ apply_learned_round",
    "whole-run": "quantize_ptq_imagenet",
}
KINDS = ("noise", "synthetic", "real")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all cells share: the float model, and labelled images that only measure."""

    float_model: nn.Module
    eval_data: Dataset
    round_iterations: int

    def cells(
        self, kind: ModelKind, scheme: str, loader: Loader, algorithms: Sequence[str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """The asked algorithms on one kind of images, one after another, each on its own copy of the calibrated model.

        A cell holds ``top1`` in percent; ``seconds`` of the algorithm alone; ``changed`` of ``layers``: in how many
        the quantized weight or bias is another than after calibration; and what Brevitas warned of.
        """
        widths = resolve_scheme(scheme)
        tuners = {**TUNERS, "learned-round": partial(learned_round, iterations=self.round_iterations)}
        with _quiet():
            start = time.perf_counter()
            calibrated = calibrated_model(kind, self.float_model, widths, loader)
            seconds = time.perf_counter() - start
        for algorithm in algorithms:
            with _quiet() as said:
                start = time.perf_counter()
                top1 = None
                if algorithm == "calibrate":
                    quant_model = calibrated
                elif algorithm == "act-equalization":
                    quant_model = calibrated_model(kind, self.float_model, widths, loader, equalize=True)
                    seconds = time.perf_counter() - start
                elif algorithm == "whole-run":
                    validation = DataLoader(self.eval_data, batch_size=64)
                    top1, seconds, quant_model = quantize_ptq_imagenet(
                        kind, self.float_model, widths, loader, validation
                    )
                else:
                    quant_model = copy.deepcopy(calibrated)
                    start = time.perf_counter()
                    tuners[algorithm](quant_model, loader)
                    seconds = time.perf_counter() - start
            if top1 is None:
                # The snapshot computes what the quant model computes, bit for bit, in half the time.
                top1 = evaluate(frozen_snapshot(quant_model), self.eval_data).top1
            layers, changed = changed_layers(calibrated, quant_model)
            yield algorithm, {
                "top1": round(top1, 2), "seconds": round(seconds, 1), "changed": changed, "layers": layers,
                "warnings": sorted({str(warning.message).splitlines()[0] for warning in said}),
            }  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """A context without Brevitas' prints and bars, that leaves no trace in the process; warnings are recorded."""
    nowhere = io.StringIO()
    with (
        borrowed_settings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(record=True) as said,
    ):  # fmt: skip
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield said


class CellStore:
    """Finished cells by ``algorithm|images|model|scheme``, in a JSON file if there is a path.

    Raises:
        ConfigurationError: if the file holds cells that were measured with another budget.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]):
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.cells: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] != self.settings:
                other = sorted(key for key in self.settings if found["settings"].get(key) != self.settings[key])
                raise ConfigurationError(
                    f"{path} holds a table of another budget (differing: {', '.join(other)}). Give another --out."
                )
            self.cells = found["cells"]

    def missing(self, algorithms: Sequence[str], images: str, model: str, scheme: str) -> list[str]:
        """Those of ``algorithms`` that are not measured yet."""
        return [name for name in algorithms if f"{name}|{images}|{model}|{scheme}" not in self.cells]

    def keep(self, algorithm: str, images: str, model: str, scheme: str, cell: dict[str, Any]) -> None:
        """Take a finished cell, and write the file anew, whole."""
        self.cells[f"{algorithm}|{images}|{model}|{scheme}"] = cell
        if self.path is not None:
            text = json.dumps({"settings": self.settings, "cells": self.cells}, indent=1) + "\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, lambda aside: aside.write_text(text, encoding="utf-8"))


def markdown(cells: Mapping[str, Mapping[str, Any]], schemes: Sequence[str]) -> str:
    """One table per scheme: top-1 in percent, and seconds of the algorithm; a star where it changed no layer."""
    parts = []
    for scheme in schemes:
        columns = [
            (model, images) for model in MODELS for images in KINDS
            if any(name.endswith(f"|{images}|{model}|{scheme}") for name in cells)
        ]  # fmt: skip
        head = [f"{MODELS[model]}, {images}" for model, images in columns]
        lines = [f"| {scheme} | " + " | ".join(head) + " |", "|---|" + "---:|" * len(columns)]
        for algorithm, title in ALGORITHMS.items():
            found = [cells.get(f"{algorithm}|{images}|{model}|{scheme}") for model, images in columns]
            if any(found):
                lines.append(f"| {title} | " + " | ".join(_text(algorithm, cell) for cell in found) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _text(algorithm: str, cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    star = " *" if algorithm != "calibrate" and not cell["changed"] else ""
    return f"{cell['top1']:.1f}{star} ({cell['seconds']:.0f} s)"
