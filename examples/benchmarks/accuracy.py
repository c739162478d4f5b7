"""What each kind of calibration images, and each part of the method, is worth: one command, one table.

    python examples/benchmarks/accuracy.py --out runs/accuracy
    python examples/benchmarks/accuracy.py --out runs/ablation --ablation
    python examples/benchmarks/accuracy.py --model vit_tiny_patch16_224 --checkpoint weights.safetensors \\
        --eval-data photos --real-from-eval 4 --images 64 --steps 300 --seeds 0 --out runs/vit-tiny

All rows share quantizers, number of images, calibration and tuning code; they differ in the images alone. Finished
cells are kept in ``OUT/accuracy.json`` and skipped when the command is started again; another budget is refused.
``OUT/accuracy.md`` holds the table. Labels only evaluate; the rows with real images are a yardstick. ``--runs`` adds a
row for each finished run, evaluated on the same images: what the rows of the same tuning compare with.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.utils.data import Dataset
from torch.utils.data import Subset

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas import load_model
from maskaq_brevitas.commands.common import load_run
from maskaq_brevitas.commands.common import saved_options
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import from_mapping
from maskaq_brevitas.config import to_mapping
from maskaq_brevitas.evaluation import digits_split
from maskaq_brevitas.evaluation import evaluate
from maskaq_brevitas.evaluation import labelled_folder
from maskaq_brevitas.files import write_whole
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.run_directory import fingerprint
from maskaq_brevitas.run_directory import installed_versions
from maskaq_brevitas.synthesis.augment import pixel_noise
from maskaq_brevitas.synthesis.procedural import dead_leaves_images
from maskaq_brevitas.synthesis.scenes import scene_images

COLUMNS = ("w8a8", "w4a8", "w6a6", "w4a4", "w3a3")
ROWS = {
    "float": "Float model",
    "noise": "Gaussian noise",
    "class-pixel": "Class loss alone, on pixels from white noise",
    "class": "Class loss alone, in our 1/f spectrum",
    "entropy": "PSAQ style (class, variation, entropy)",
    "maskaq": "MaskAQ (all five terms)",
    "leaves": "Dead leaves (drawn, no model asked)",
    "scenes": "Scenes from random programs (drawn, no model asked)",
    "mixed": "MaskAQ and drawn scenes, half each (our default)",
    "real": "Real images",
    "noise+distill": "Gaussian noise + distillation",
    "maskaq+distill": "MaskAQ + distillation, no refresh",
    "maskaq+refresh": "MaskAQ + distillation with refresh",
    "mixed+distill": "MaskAQ and drawn scenes + distillation, no refresh",
    "mixed+refresh": "MaskAQ and drawn scenes + distillation with refresh",
    "real+distill": "Real images + distillation",
}
ABLATION_COLUMNS = ("w4a4", "w4a8")
# What is switched off -> changes of the synthesis; the refresh is a matter of the tuning.
ABLATION: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("Whole method", {}),
    "no-head": ("without head coherence", {"head_weight": 0.0}),
    "no-class": ("without class loss", {"class_weight": 0.0}),
    "no-tv": ("without total variation", {"tv_weight": 0.0}),
    "no-align": ("without alignment", {"align_weight": 0.0}),
    "no-entropy": ("without entropy", {"entropy_weight": 0.0}),
    "no-mask": ("without mask (all patches aligned)", {"mask_enabled": False}),
    "no-refresh": ("without refresh (steps spent at the start)", {}),
}


@dataclass(frozen=True)
class Images:
    """Calibration and held-back images, normalised ``(images, channels, height, width)``, and what they cost.

    ``labels`` are those that the images were made for; only a refresh reads them.
    """

    pool: Tensor
    held_back: Tensor
    labels: Tensor
    seconds: float = 0.0

    @classmethod
    def split(cls, found: Tensor, count: int) -> Images:
        """Images that were not made for labels: the first ``count`` calibrate, the others are held back."""
        return cls(found[:count], found[count:], torch.zeros(count, dtype=torch.long))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The parts that all cells share."""

    model: nn.Module
    eval_data: Dataset
    real_data: Dataset | None
    synthesis: SynthesisConfig
    tuning: DistillConfig
    images: int
    held_back: int
    device: str
    eval_limit: int | None
    progress: bool

    def calibrator(self, scheme: str, seed: int, synthesis: SynthesisConfig | None = None) -> DataFreeCalibrator:
        return DataFreeCalibrator(
            self.model, scheme=scheme, num_images=self.images, held_back=self.held_back, seed=seed, device=self.device,
            batch_size=self.synthesis.batch_size, synthesis=synthesis or self.synthesis, progress=self.progress,
        )  # fmt: skip

    def synthesise(self, scheme: str, seed: int, synthesis: SynthesisConfig) -> Images:
        calibrator = self.calibrator(scheme, seed, synthesis)
        start = time.perf_counter()
        calibrator.ensure_images()
        pool, held_back = calibrator.pool, calibrator.held_back
        return Images(pool.images(), held_back.images(), pool.labels.clone(), time.perf_counter() - start)

    def noise(self, scheme: str, seed: int) -> Images:
        geometry = self.calibrator(scheme, seed).geometry
        low, high = geometry.bounds(torch.zeros(()))
        shape = (self.images + self.held_back, *geometry.input_size)
        return Images.split(pixel_noise(shape, low, high, torch.Generator().manual_seed(seed)), self.images)

    def drawn(self, scheme: str, seed: int, draw: Callable[..., Tensor]) -> Images:
        geometry = self.calibrator(scheme, seed).geometry
        shape = (self.images + self.held_back, *geometry.input_size)
        shares = draw(shape, torch.Generator().manual_seed(seed))
        return Images.split(geometry.normalize(shares), self.images)

    def real(self, seed: int) -> Images:
        assert self.real_data is not None  # rows without data are left out
        order = torch.randperm(len(self.real_data), generator=torch.Generator().manual_seed(seed))
        chosen = order[: self.images + self.held_back].tolist()
        return Images.split(torch.stack([self.real_data[index][0] for index in chosen]), self.images)

    def long_synthesis(self, synthesis: SynthesisConfig) -> SynthesisConfig:
        """As many image-iterations as synthesis and refreshes together, all of them before the tuning."""
        refreshes = (self.tuning.epochs - 1) // self.tuning.refresh_every
        return replace(
            synthesis, warmup_steps=synthesis.resolved_warmup_steps,
            steps=synthesis.steps + refreshes * self.tuning.refresh_steps,
        )  # fmt: skip

    def measure(
        self, scheme: str, seed: int, images: Images, synthesis: SynthesisConfig, tuning: DistillConfig | None
    ) -> dict[str, Any]:
        """Quantize on ``images`` and evaluate: a finished cell."""
        calibrator = self.calibrator(scheme, seed, synthesis)
        for pool, found in ((calibrator.pool, images.pool), (calibrator.held_back, images.held_back)):
            labels = images.labels if pool is calibrator.pool else torch.zeros(len(found), dtype=torch.long)
            informative = torch.zeros(len(found), calibrator.geometry.patches, dtype=torch.bool)
            pool.put(torch.arange(len(found)), found, labels, informative)
            pool.version = 1
        start = time.perf_counter()
        calibrator.quantize(tuning)
        seconds = images.seconds + time.perf_counter() - start
        cell: dict[str, Any] = {"top1": self.top1(calibrator.freeze()), "seconds": round(seconds, 1)}
        if tuning is not None:
            cell["best_epoch"] = calibrator.best_epoch
            cell["alignment"] = [
                [entry["alignment_before"], entry["alignment_after"]] for entry in calibrator.refreshes
            ]
        return cell

    def top1(self, model: nn.Module) -> float:
        found = evaluate(model, self.eval_data, limit=self.eval_limit, device=self.device)
        return round(found.top1, 3)


def table_cells(
    bench: Bench, scheme: str, seed: int, rows: list[str], shared: dict[str, Images]
) -> Iterator[tuple[str, dict]]:
    """The asked rows of the first table, one after another; images that several rows share are made once.

    ``shared`` keeps images that do not depend on the scheme, for one seed.
    """
    made: dict[str, Images] = {}
    mixed, fixed = replace(bench.synthesis, procedural_share=0.5), replace(bench.tuning, refresh_every=None)
    base = replace(bench.synthesis, procedural_share=0.0)
    entropy = replace(base, head_weight=0.0, align_weight=0.0)
    kinds = {
        "noise": lambda: bench.noise(scheme, seed),
        "real": lambda: bench.real(seed),
        "leaves": lambda: bench.drawn(scheme, seed, dead_leaves_images),
        "scenes": lambda: bench.drawn(scheme, seed, scene_images),
        "class-pixel": lambda: bench.synthesise(scheme, seed, replace(
            entropy, tv_weight=0.0, entropy_weight=0.0, parameterization="pixel", init="gaussian", learning_rate=0.1
        )),
        "class": lambda: bench.synthesise(scheme, seed, replace(entropy, tv_weight=0.0, entropy_weight=0.0)),
        "entropy": lambda: bench.synthesise(scheme, seed, entropy),
        "maskaq": lambda: bench.synthesise(scheme, seed, base),
        "mixed": lambda: bench.synthesise(scheme, seed, mixed),
        "long": lambda: bench.synthesise(scheme, seed, bench.long_synthesis(base)),
        "mixed-long": lambda: bench.synthesise(scheme, seed, bench.long_synthesis(mixed)),
    }
    plan = {
        "noise+distill": ("noise", fixed),
        "maskaq+distill": ("long", fixed),
        "maskaq+refresh": ("maskaq", bench.tuning),
        "mixed+distill": ("mixed-long", fixed),
        "mixed+refresh": ("mixed", bench.tuning),
        "real+distill": ("real", fixed),
    }
    for row in rows:
        kind, tuning = plan.get(row, (row, None))
        store = shared if kind in ("noise", "real", "leaves", "scenes", "class-pixel", "class", "entropy") else made
        if kind not in store:
            store[kind] = kinds[kind]()
        synthesis = mixed if row.startswith("mixed") else base
        yield row, bench.measure(scheme, seed, store[kind], synthesis, tuning)


def ablation_cells(
    bench: Bench, scheme: str, seed: int, rows: list[str], _shared: dict[str, Images]
) -> Iterator[tuple[str, dict]]:
    """The asked rows of the second table: calibrated and tuned accuracy, on optimised images alone."""
    for row in rows:
        synthesis, tuning = replace(bench.synthesis, procedural_share=0.0, **ABLATION[row][1]), bench.tuning
        if row == "no-refresh":
            synthesis, tuning = bench.long_synthesis(synthesis), replace(tuning, refresh_every=None)
        images = bench.synthesise(scheme, seed, synthesis)
        calibrated = bench.measure(scheme, seed, images, synthesis, None)
        yield row, {**bench.measure(scheme, seed, images, synthesis, tuning), "calibrated_top1": calibrated["top1"]}


def markdown(
    cells: dict[str, dict], rows: dict[str, str], columns: list[str], seeds: list[int], ablation: bool, note: str
) -> str:
    """The table; mean and sample standard deviation over the seeds that are finished."""
    keys = ("calibrated_top1", "top1") if ablation else ("top1",)
    names = [f"{column} {kind}" for column in columns for kind in ("calibrated", "tuned")] if ablation else columns
    lines = ["| images | " + " | ".join(names) + " | s per cell |", "|---|" + "---:|" * (len(names) + 1)]
    for row, title in rows.items():
        texts, seconds = [], []
        for column in columns:
            found = [cells[name] for seed in seeds if (name := f"{row}|{column}|{seed}") in cells]
            seconds += [cell["seconds"] for cell in found]
            texts += [_spread([cell[key] for cell in found]) for key in keys]
        if seconds:
            lines.append(f"| {title} | " + " | ".join(texts) + f" | {statistics.mean(seconds):.0f} |")
    return "\n".join(lines) + f"\n\n{note}\n"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def machine(device: str) -> str:
    """The machine in words."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, {name}"
    return f"{name}, {torch.get_num_threads()} threads"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results; an unfinished bench there goes on")
    add("--ablation", action="store_true", help="second table: one part of the method switched off at a time")
    add("--model", default="digits_vit", help="digits_vit or a timm name")
    add("--checkpoint", type=Path, help="safetensors file with the weights")
    add("--eval-data", type=Path, help="folder of labelled images (not needed for digits_vit)")
    add("--calibration-data", type=Path, help="folder of real images for the rows with real images")
    add("--real-from-eval", type=int, metavar="K", help="take every K-th evaluation image for these rows")
    add("--eval-limit", type=int, help="evaluate on this many images")
    add("--images", type=int, default=32, help="calibration images")
    add("--held-back", type=int, default=8, help="images that only select the epoch")
    add("--batch-size", type=int, default=16, help="of synthesis and calibration")
    add("--steps", type=int, default=60, help="iterations of synthesis")
    add("--epochs", type=int, default=12, help="of distillation")
    add("--refresh-every", type=int, default=4, help="epochs between refreshes")
    add("--refresh-steps", type=int, help="iterations of a refresh; a quarter of --steps if left out")
    add("--synthesis", type=json.loads, default={}, metavar="JSON", help="further options of SynthesisConfig")
    add("--tuning", type=json.loads, default={}, metavar="JSON", help="further options of DistillConfig")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--schemes", nargs="+", help=f"columns; default {' '.join(COLUMNS)} (ablation: {' '.join(ABLATION_COLUMNS)})")
    add("--rows", nargs="+", choices=[*ROWS, *ABLATION], help="rows; default all")
    add("--runs", nargs="+", default=[], metavar="RUN", help="folders of finished runs of the model: a row for each")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    options.schemes = options.schemes or list(ABLATION_COLUMNS if options.ablation else COLUMNS)
    known = ABLATION if options.ablation else ROWS
    options.rows = options.rows or list(known)
    if unknown := [row for row in options.rows if row not in known]:
        parser.error(f"unknown rows for this table: {' '.join(unknown)}; known: {' '.join(known)}")
    if options.real_from_eval is not None and options.real_from_eval < 2:
        parser.error("--real-from-eval needs a number of at least 2")
    if options.model != "digits_vit" and options.eval_data is None:
        parser.error(f"--eval-data is needed for {options.model}")
    return options


def load_data(options: argparse.Namespace, model: nn.Module) -> tuple[Dataset, Dataset | None]:
    """Images to evaluate on, and real images to calibrate on (None if there are none)."""
    if options.eval_data is None:
        return digits_split(False, model), digits_split(True, model)
    data = labelled_folder(options.eval_data, model)
    if options.calibration_data is not None:
        return data, labelled_folder(options.calibration_data, model)
    if options.real_from_eval is None:
        return data, None
    every = range(len(data))
    real = [index for index in every if index % options.real_from_eval == 0]
    return Subset(data, [index for index in every if index % options.real_from_eval]), Subset(data, real)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    model = load_model(options.model, checkpoint=options.checkpoint).to(options.device)
    eval_data, real_data = load_data(options, model)
    synthesis = from_mapping(
        SynthesisConfig, {"steps": options.steps, "batch_size": options.batch_size, **options.synthesis}
    )
    tuning = from_mapping(DistillConfig, {
        "epochs": options.epochs, "refresh_every": options.refresh_every,
        "refresh_steps": options.refresh_steps or max(1, math.ceil(options.steps / 4)), **options.tuning,
    })  # fmt: skip
    bench = Bench(
        model=model, eval_data=eval_data, real_data=real_data, synthesis=synthesis, tuning=tuning,
        images=options.images, held_back=options.held_back, device=options.device, eval_limit=options.eval_limit,
        progress=not options.quiet,
    )  # fmt: skip
    run = RunDirectory(options.out, {
        "table": "ablation" if options.ablation else "accuracy", "model": options.model, "weights": fingerprint(model),
        "evaluated_on": len(eval_data), "eval_limit": options.eval_limit, "images": options.images,
        "held_back": options.held_back, "synthesis": to_mapping(synthesis), "tuning": to_mapping(tuning),
        "machine": machine(options.device), "versions": installed_versions(),
    }, "resume")  # fmt: skip
    cells: dict[str, dict] = run.read_json("accuracy.json")["cells"] if run.has("accuracy.json") else {}
    titles = {row: title for row, (title, _) in ABLATION.items()} if options.ablation else ROWS
    titles = {**titles, **{folder: f"Finished run {folder}" for folder in options.runs}}

    last = time.perf_counter()

    def keep(row: str, scheme: str, seed: int, cell: dict) -> None:
        nonlocal last
        now = time.perf_counter()
        cells[f"{row}|{scheme}|{seed}"] = {**cell, "elapsed": round(now - last, 1)}
        last = now
        minutes = sum(entry["elapsed"] for entry in cells.values()) / 60
        note = (
            f"Top-1 in percent, mean ± standard deviation over seeds {' '.join(map(str, options.seeds))}. "
            f"{options.model}, {evaluated} images evaluated, {options.images} to calibrate, "
            f"{options.held_back} held back; {synthesis.steps} iterations, {tuning.epochs} epochs, refresh of "
            f"{tuning.refresh_steps} iterations every {tuning.refresh_every} epochs. "
            f"{minutes:.0f} minutes so far on {run_machine}.\n\n"
            f"    python {shlex.join(sys.argv if arguments is None else [__file__, *arguments])}"
        )
        run.write_json("accuracy.json", {"cells": cells, "note": note})
        order = {name: titles[name] for name in titles if any(key.startswith(f"{name}|") for key in cells)}
        columns = list(dict.fromkeys([*options.schemes, *(key.split("|")[1] for key in cells)]))
        seeds = sorted({*options.seeds, *(int(key.split("|")[2]) for key in cells)})
        text = markdown(cells, order, columns, seeds, options.ablation, note)
        write_whole(run.file("accuracy.md"), lambda aside: aside.write_text(text, encoding="utf-8"))
        print(f"{row:16} {scheme} seed {seed}: {cell['top1']:.1f} ({cell['seconds']:.0f} s)", file=sys.stderr)

    run_machine = machine(options.device)
    evaluated = min(len(eval_data), options.eval_limit or len(eval_data))
    for seed in options.seeds:
        shared: dict[str, Images] = {}
        for scheme in options.schemes:
            missing = [row for row in options.rows if f"{row}|{scheme}|{seed}" not in cells]
            if real_data is None:
                missing = [row for row in missing if not row.startswith("real")]
            if "float" in missing:
                missing.remove("float")
                keep("float", scheme, seed, {"top1": bench.top1(model), "seconds": 0.0})
            make = ablation_cells if options.ablation else table_cells
            for row, cell in make(bench, scheme, seed, missing, shared):
                keep(row, scheme, seed, cell)
    for folder in options.runs:
        saved = saved_options(argparse.Namespace(run=folder, quiet=True), quiet=True)
        if f"{folder}|{saved.scheme}|{saved.seed}" not in cells:
            found = load_run(folder, saved)
            if fingerprint(found.float_model) != fingerprint(model):
                sys.exit(f"{folder}: expected a run of {options.model} with these weights, got one of {saved.model}.")
            report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
            seconds = sum(stage["seconds"] for stage in report["stages"])
            keep(folder, saved.scheme, saved.seed, {"top1": bench.top1(found.freeze()), "seconds": round(seconds, 1)})
    print((options.out / "accuracy.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
