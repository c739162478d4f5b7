"""Whether images made with the levers of synthesis are worse: objective and accuracy over seeds.

    python examples/benchmarks/levers.py --out runs/levers
    python examples/benchmarks/levers.py --model vit_tiny_patch16_224 --checkpoint weights.safetensors \\
        --eval-data photos --eval-limit 500 --images 32 --out runs/levers

``speed.py`` tells what a lever saves; this, what it costs. The objective is that of the finished images with all five
terms, on all tokens, in float32, against the calibrated quant model of the first scheme: the same measure for every
row, although some rows did not optimise it (lower is better). Labels only evaluate. Finished cells are kept in ``OUT``
and not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas import load_model
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.evaluation import digits_split
from maskaq_brevitas.evaluation import evaluate
from maskaq_brevitas.evaluation import labelled_folder
from maskaq_brevitas.files import write_whole
from maskaq_brevitas.modes import multiplies_in_bfloat16
from maskaq_brevitas.report.report import text_table
from maskaq_brevitas.synthesis.procedural import procedural_places
from maskaq_brevitas.synthesis.synthesizer import synthesize

_SIXTH: dict[str, Any] = {"align_every": 6}
_HALF: dict[str, Any] = {**_SIXTH, "kept_tokens": 0.5, "learning_rate": 0.06}
_SUITED: dict[str, Any] = {**_HALF, "start_views": 3}
#: Title -> the changes of the dense float32 step, and how many times its iterations.
LEVERS: dict[str, tuple[dict[str, Any], float]] = {
    "dense step": ({}, 1),
    "bfloat16": ({"precision": "bfloat16"}, 1),
    "alignment in every sixth iteration": (_SIXTH, 1),
    "and bfloat16": ({**_SIXTH, "precision": "bfloat16"}, 1),
    "and half of the patches": (_HALF, 1),
    "and half of the patches, 4/3 of the iterations": (_HALF, 4 / 3),
    "and half of the patches, suited starts": (_SUITED, 1),
    "all of them": ({**_SUITED, "precision": "bfloat16"}, 1),
}


def objective(calibrator: DataFreeCalibrator, chosen: int = 16) -> float:
    """Mean objective of the optimised images as they are: what a first iteration of the dense step from them finds.

    ``chosen``: images at most. Nothing is changed.
    """
    pool, config = calibrator.pool, calibrator.synthesis
    places = (~procedural_places(len(pool), config.procedural_share)).nonzero().flatten()[:chosen]
    dense = replace(config, precision="float32", kept_tokens=1.0, colour_shift=0.0, colour_scale=0.0)
    found = synthesize(
        calibrator.maker.float_snapshot, calibrator.freeze(), calibrator.geometry, pool.labels[places], dense,
        generator=torch.Generator().manual_seed(0), start=pool.images(pool.pixels[places]), steps=1,
    )  # fmt: skip
    return found.trace["objective"][0]


def measure(
    make: Callable[..., DataFreeCalibrator], schemes: list[str], folder: Path, top1: Callable[[nn.Module], float]
) -> dict[str, Any]:
    """Seconds of synthesis, objective and accuracy of one lever and seed; ``make(scheme, **where)`` gives calibrators.
    """
    calibrator = make(schemes[0], run_dir=folder, run_mode="overwrite")
    start = time.perf_counter()
    calibrator.ensure_images()
    cell: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1), "top1": {}}
    for scheme in schemes:
        if scheme != schemes[0]:
            calibrator = make(scheme, images_from=folder)
        calibrator.calibrate()
        if scheme == schemes[0]:
            cell["objective"] = objective(calibrator)
        cell["top1"][scheme] = top1(calibrator.freeze())
    return cell


def spread(values: list[float], digits: int = 1) -> str:
    """Mean, and standard deviation of two or more."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of images and results; an unfinished bench there goes on")
    add("--model", default="digits_vit", help="digits_vit or a timm name")
    add("--checkpoint", type=Path, help="safetensors file with the weights")
    add("--eval-data", type=Path, help="folder of labelled images (not needed for digits_vit)")
    add("--eval-limit", type=int, help="evaluate on this many images")
    add("--images", type=int, default=32, help="half of them are optimised (default: %(default)s)")
    add("--steps", type=int, default=60, help="iterations (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--schemes", nargs="+", default=["w4a8", "w4a4"], help="images are made against the first")
    add("--levers", nargs="+", choices=list(LEVERS), help="rows; default: all that this machine does not emulate")
    add("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.model != "digits_vit" and options.eval_data is None:
        parser.error(f"--eval-data is needed for {options.model}")
    torch.set_num_threads(options.threads)
    model = load_model(options.model, checkpoint=options.checkpoint)
    data = digits_split(False, model) if options.eval_data is None else labelled_folder(options.eval_data, model)
    device = next(model.parameters()).device
    chosen = options.levers or [
        title for title, (changes, _) in LEVERS.items() if "precision" not in changes or multiplies_in_bfloat16(device)
    ]
    budget = {
        "model": options.model, "images": options.images, "steps": options.steps, "schemes": options.schemes,
        "evaluated": min(len(data), options.eval_limit or len(data)), "threads": options.threads,
    }  # fmt: skip
    kept = options.out / "levers.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {**budget, "cells": {}}
    if any(found[name] != value for name, value in budget.items()):
        sys.exit(f"{kept}: expected a bench of {budget}, found another one. Name another folder.")
    cells: dict[str, dict[str, Any]] = found["cells"]
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for title in chosen:
            name = f"{title}|{seed}"
            if name in cells:
                continue
            changes, times = LEVERS[title]
            config = SynthesisConfig(steps=round(options.steps * times), **changes)

            def make(
                scheme: str, config: SynthesisConfig = config, seed: int = seed, **where: Any
            ) -> DataFreeCalibrator:
                return DataFreeCalibrator(
                    model, scheme=scheme, num_images=options.images, held_back=0, synthesis=config, tuning=[],
                    seed=seed, **where,
                )  # fmt: skip

            cells[name] = measure(
                make, options.schemes, options.out / f"{list(LEVERS).index(title)}-{seed}",
                lambda network: evaluate(network, data, limit=options.eval_limit).top1,
            )  # fmt: skip
            write_whole(kept, lambda aside: aside.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8"))
            print(f"{title}, seed {seed}: {cells[name]}", file=sys.stderr, flush=True)
    rows = []
    for title in chosen:
        own = [cells[f"{title}|{seed}"] for seed in options.seeds]
        rows.append([
            title, spread([cell["seconds"] for cell in own], 0), spread([cell["objective"] for cell in own], 2),
            *(spread([cell["top1"][scheme] for cell in own]) for scheme in options.schemes),
        ])  # fmt: skip
    print(text_table(["", "s of synthesis", "objective", *(f"{scheme} [%]" for scheme in options.schemes)], rows))
    print(f"\n{budget}, seeds {options.seeds}: mean ± standard deviation")


if __name__ == "__main__":
    main()
