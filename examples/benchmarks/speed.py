"""What a step of synthesis costs: against the bare networks, per lever, and as the work grows.

    python examples/benchmarks/speed.py --out runs/speed.json
    python examples/benchmarks/speed.py --models vit_tiny_patch16_224 --threads 1 --repetitions 3 --out runs/speed.json

Weights are random: speed does not depend on them. The *floor* is one forward and backward pass to the image through the
float model and one through the frozen snapshot of the w4a4 model: explicit attention, float32, nothing else. A *step* is one
iteration with all five terms of MaskAQ's objective. All variants of a model take turns within each repetition, so a busy
machine slows all of them; ratios are medians over repetitions of the ratio within one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.models.geometry import Geometry, read_geometry
from maskaq_brevitas.quant.snapshot import float_snapshot, frozen_snapshot
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.run_directory import installed_versions, write_whole
from maskaq_brevitas.synthesis.synthesizer import synthesize
from maskaq_brevitas.tuning.calibrate import calibrate

_DENSE = SynthesisConfig(init="low_frequency")
# What is switched on -> changes of the dense float32 step.
LEVERS: dict[str, dict[str, Any]] = {
    "all rows of attention": {"head_rows": None, "entropy_rows": None},
    "dense step": {},
    "bfloat16": {"precision": "bfloat16"},
    "30 % of the tokens": {"kept_tokens": 0.3},
    "all levers": {"precision": "bfloat16", "kept_tokens": 0.3},
}
_STEPS = 10  # the tokens are cut before 40 % of the run, so its length decides the mean cost only a little


class Case:
    """One model with its snapshots, and what is measured on it."""

    def __init__(self, name: str, batch: int, device: str, **changes: Any):
        torch.manual_seed(0)
        model = timm.create_model(name, **changes).eval()
        self.geometry: Geometry = read_geometry(model)
        self.images = torch.randn(batch, *self.geometry.input_size, device=device)
        self.labels = torch.zeros(batch, dtype=torch.long)
        quant_model, _ = swap_layers(model, "tensor-w4a4")
        calibrate(quant_model, [self.images[:2].cpu()])
        self.networks = float_snapshot(model).to(device), frozen_snapshot(quant_model).to(device)

    def floor(self, steps: int) -> None:
        for _ in range(steps):
            images = self.images.clone().requires_grad_(True)
            for network in self.networks:
                network(images).square().sum().backward()

    def synthesis(self, config: SynthesisConfig) -> Callable[[int], None]:
        def run(steps: int) -> None:
            synthesize(
                *self.networks, self.geometry, self.labels, config, generator=torch.Generator().manual_seed(0), steps=steps
            )

        return run


def timed(run: Callable[[int], None], steps: int, device: str) -> tuple[float, float | None]:
    """Seconds per step, and the peak of memory in MB above what was there before (None where it cannot be read)."""
    before = _reset_peak(device)
    start = time.perf_counter()
    run(steps)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    peak = _peak(device)
    return seconds, None if peak is None or before is None else peak - before


def compare(
    runs: dict[str, Callable[[int], None]], repetitions: int, steps: int, device: str, batch: int
) -> dict[str, dict[str, Any]]:
    """Medians of all runs, which take turns; the first is the floor that the others are divided by."""
    for run in runs.values():
        run(1)
    found: dict[str, list[tuple[float, float | None]]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            found[name].append(timed(run, steps, device))
    floor = next(iter(runs))
    table: dict[str, dict[str, Any]] = {}
    for name, rounds in found.items():
        seconds = [value for value, _ in rounds]
        peaks = [peak for _, peak in rounds if peak is not None]
        floors = [value for value, _ in found[floor]]
        table[name] = {
            "seconds_per_step": statistics.median(seconds),
            "images_per_second": batch / statistics.median(seconds),
            "ratio": statistics.median(ours / bare for ours, bare in zip(seconds, floors, strict=True)),
            "ratios": [ours / bare for ours, bare in zip(seconds, floors, strict=True)],
            "peak_mb": statistics.median(peaks) if peaks else None,
        }
    return table


def levers(name: str, options: argparse.Namespace) -> dict[str, Any]:
    case = Case(name, options.batch, options.device)
    runs: dict[str, Callable[[int], None]] = {"floor: two bare networks": case.floor}
    runs |= {
        title: case.synthesis(SynthesisConfig(**{"init": _DENSE.init, **changes})) for title, changes in LEVERS.items()
    }
    return compare(runs, options.repetitions, options.steps, options.device, options.batch)


def growth(name: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The dense step with another batch, image size or depth, one thing at a time."""
    half = max(1, options.batch // 2)
    cases = {
        f"batch {half}": (half, {}),
        f"batch {options.batch}": (options.batch, {}),
        f"batch {2 * options.batch}": (2 * options.batch, {}),
        f"384 pixels, batch {half}": (half, {"img_size": 384}),
        f"depth 24, batch {half}": (half, {"depth": 24}),
    }
    table = {}
    for title, (batch, changes) in cases.items():
        case = Case(name, batch, options.device, **changes)
        rows = compare(
            {"floor": case.floor, "step": case.synthesis(_DENSE)}, options.repetitions, options.steps, options.device, batch
        )
        table[title] = rows["step"]
        print(f"  {title:24} {_line(rows['step'])}", flush=True)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "deit_small_patch16_224"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=_STEPS, help="per measurement (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="medians over so many (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-growth", action="store_true", help="leave out the batches, sizes and depths")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(), "threads": options.threads, "batch": options.batch,
        "steps": options.steps, "repetitions": options.repetitions, "device": options.device, "versions": installed_versions(),
        "command": sys.argv[1:] if arguments is None else arguments, "levers": {}, "growth": {},
    }  # fmt: skip
    for name in options.models:
        print(f"{name}, batch {options.batch}, {options.threads} threads", flush=True)
        report["levers"][name] = levers(name, options)
        for title, row in report["levers"][name].items():
            print(f"  {title:24} {_line(row)}", flush=True)
    if not options.no_growth:
        print(f"{options.models[0]}, the dense step as the work grows (ratio to the floor of the same work)", flush=True)
        report["growth"][options.models[0]] = growth(options.models[0], options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))


def _line(row: dict[str, Any]) -> str:
    peak = "" if row["peak_mb"] is None else f"  {row['peak_mb']:7.0f} MB"
    return f"{row['images_per_second']:7.2f} image-iterations/s  {row['ratio']:5.2f} x the floor{peak}"


def _reset_peak(device: str) -> float | None:
    """Start a new peak; MB in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux
        return None
    return _status("VmRSS")


def _peak(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e6 if device != "cpu" else _status("VmHWM")


def _status(field: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{field}:")), None)


if __name__ == "__main__":
    main()
