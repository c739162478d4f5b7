"""What a step of synthesis costs: against the bare networks, per lever, and as the work grows.

    python examples/benchmarks/speed.py --out runs/speed.json
    python examples/benchmarks/speed.py --models vit_tiny_patch16_224 --threads 1 --repetitions 3 --out runs/speed.json

Weights are random: speed does not depend on them. The *floor* is one forward and backward pass to the image through the
float model and one through the frozen snapshot of the w4a4 model: explicit attention, float32, nothing else. A *step*
is one iteration with all five terms of MaskAQ's objective; what a batch costs once (its need of memory is measured on
five images, the finished ones are looked at), a step's worth or less in a run of 30 to 200, is not in it. All variants
of a model take turns within each repetition, so a busy machine slows all of them; ratios are medians over repetitions
of the ratio within one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.files import write_whole
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.modes import multiplies_in_bfloat16
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.quant.snapshot import frozen_snapshot
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.run_directory import installed_versions
from maskaq_brevitas.synthesis.synthesizer import synthesize
from maskaq_brevitas.tuning.calibrate import calibrate

_FLOOR = "floor: two bare networks"
# What is switched on -> changes of the dense float32 step.
LEVERS: dict[str, dict[str, Any]] = {
    "all rows of attention": {"head_rows": None, "entropy_rows": None},
    "dense step": {},
    "bfloat16": {"precision": "bfloat16"},
    "alignment in every sixth iteration": {"align_every": 6},
    "and bfloat16": {"align_every": 6, "precision": "bfloat16"},
    "half of the patches": {"kept_tokens": 0.5},
    "all levers": {"precision": "auto", "kept_tokens": 0.5, "align_every": 6},
}
_CLEAR_REFS = Path("/proc/self/clear_refs")
# The patches are cut before 40 % of the run, so its length decides the mean cost only a little; of a multiple of six
# iterations behind the first, a sixth asks the quantized model.
_STEPS = 12


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

    def floor(self, steps: int) -> list[float]:
        """When each step ended."""
        ended = []
        for _ in range(steps):
            images = self.images.clone().requires_grad_(True)
            for network in self.networks:
                network(images).square().sum().backward()
            ended.append(_now(self.images.device))
        return ended

    def synthesis(self, config: SynthesisConfig) -> Callable[[int], list[float]]:
        def run(steps: int) -> list[float]:
            ended: list[float] = []
            synthesize(
                *self.networks,
                self.geometry,
                self.labels,
                config,
                generator=torch.Generator().manual_seed(0),
                steps=steps,
                on_step=lambda step, objective: ended.append(_now(self.images.device)),
            )
            return ended

        return run


def timed(run: Callable[[int], list[float]], steps: int) -> float:
    """Seconds per step: of ``steps`` that follow a first one."""
    ended = run(steps + 1)
    return (ended[-1] - ended[0]) / steps


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(run: Callable[[int], list[float]], device: str) -> float | None:
    """MB at the peak of two steps above what the networks and images take; None where it cannot be read.

    On a CPU in a process of its own: what an allocator once took it keeps.
    """
    before = _in_use(device)
    _start_peak(device)
    run(2)
    after = _peak(device)
    return None if before is None or after is None else after - before


def _peak_elsewhere(variant: str, batch: int, name: str, changes: dict[str, Any], device: str) -> float | None:
    task = json.dumps([variant, batch, name, changes, device])
    command = [sys.executable, "-W", "ignore", __file__, "--peak-of", task]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Measuring the memory of {variant!r} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(
    runs: dict[str, Callable[[int], list[float]]], repetitions: int, steps: int, batch: int
) -> dict[str, dict[str, Any]]:
    """Medians of all runs, which take turns; the first is the floor that the others are divided by."""
    for run in runs.values():
        run(1)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            found[name].append(timed(run, steps))
    floor = next(iter(runs))
    table: dict[str, dict[str, Any]] = {}
    for name, seconds in found.items():
        ratios = [ours / bare for ours, bare in zip(seconds, found[floor], strict=True)]
        table[name] = {
            "seconds_per_step": statistics.median(seconds), "images_per_second": batch / statistics.median(seconds),
            "ratio": statistics.median(ratios), "ratios": ratios,
        }  # fmt: skip
    return table


def variants(case: Case) -> dict[str, Callable[[int], list[float]]]:
    """The floor and every lever."""
    runs: dict[str, Callable[[int], list[float]]] = {_FLOOR: case.floor}
    for title, changes in LEVERS.items():
        runs[title] = case.synthesis(SynthesisConfig(**{"init": "low_frequency", **changes}))
    return runs


def measure(
    name: str, titles: Sequence[str], batch: int, options: argparse.Namespace, changes: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Speed and memory of the floor and the variants of these titles."""
    peaks = {title: _peak_elsewhere(title, batch, name, changes, options.device) for title in (_FLOOR, *titles)}
    case = Case(name, batch, options.device, **changes)
    runs = {title: run for title, run in variants(case).items() if title in peaks}
    table = compare(runs, options.repetitions, options.steps, batch)
    for title, row in table.items():
        row["peak_mb"] = peaks[title]
    return table


def growth(name: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The dense step with another batch, image size or depth, one thing at a time."""
    half = max(1, options.batch // 2)
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        f"batch {half}": (half, {}),
        f"batch {options.batch}": (options.batch, {}),
        f"batch {2 * options.batch}": (2 * options.batch, {}),
        f"384 pixels, batch {half}": (half, {"img_size": 384}),
        f"depth 24, batch {half}": (half, {"depth": 24}),
    }
    table = {}
    for title, (batch, changes) in cases.items():
        table[title] = measure(name, ["dense step"], batch, options, changes)["dense step"]
        print(f"  {title:34} {_line(table[title])}", flush=True)
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
    parser.add_argument("--out", type=Path, default=Path("runs/speed.json"), help="(default: %(default)s)")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak_of is not None:
        variant, batch, name, changes, device = json.loads(options.peak_of)
        case = Case(name, batch, device, **changes)
        print(json.dumps(peak_memory(variants(case)[variant], device)))
        return
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(), "threads": options.threads, "batch": options.batch,
        "steps": options.steps, "repetitions": options.repetitions, "device": options.device,
        "versions": installed_versions(),
        "command": sys.argv[1:] if arguments is None else arguments, "levers": {}, "growth": {},
    }  # fmt: skip
    titles = list(LEVERS)
    if not multiplies_in_bfloat16(torch.device(options.device)):  # minutes per step, and nobody uses it
        titles = [title for title, changes in LEVERS.items() if changes.get("precision") != "bfloat16"]
        print(f"Without bfloat16, which {options.device} would emulate here: all levers are in float32.", flush=True)
    for name in options.models:
        print(f"{name}, batch {options.batch}, {options.threads} threads", flush=True)
        report["levers"][name] = measure(name, titles, options.batch, options, {})
        for title, row in report["levers"][name].items():
            print(f"  {title:34} {_line(row)}", flush=True)
    if not options.no_growth:
        print(
            f"{options.models[0]}, the dense step as the work grows (ratio to the floor of the same work)", flush=True
        )
        report["growth"][options.models[0]] = growth(options.models[0], options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))


def _line(row: dict[str, Any]) -> str:
    peak = "" if row["peak_mb"] is None else f"  {row['peak_mb']:7.0f} MB"
    return f"{row['images_per_second']:7.2f} image-iterations/s  {row['ratio']:5.2f} x the floor{peak}"


def _in_use(device: str) -> float | None:
    return torch.cuda.memory_allocated() / 1e6 if device != "cpu" else _status("VmRSS")


def _start_peak(device: str) -> None:
    """Forget earlier peaks: making a model ready takes memory too."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR_REFS.exists():  # Linux
        _CLEAR_REFS.write_text("5")


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
