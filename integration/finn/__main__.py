"""A data-free quantized Vision Transformer through FINN: what lands on hardware, what it computes, what it costs.

    python -m integration.finn --model digits_vit --scheme w4a4
    python -m integration.finn --variants

The model is quantized here, with the restrictions of FINN in the scheme, and exported; FINN+ runs in an environment of
its own, which is made at the first call unless one is named. Nothing of Vivado or Vitis is needed: the graph of
hardware operators is executed by FINN's Python, and the build steps go up to the estimate reports.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.utils.data import Dataset

from integration.finn.environment import VARIABLE
from integration.finn.environment import environment_python
from integration.finn.environment import run_frontend
from integration.finn.frontend import BEFORE
from integration.finn.reference import write_reference
from integration.finn.variants import VARIANTS
from integration.finn.variants import write_variant
from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas import load_model
from maskaq_brevitas.config import EFFORTS
from maskaq_brevitas.errors import MaskAQError
from maskaq_brevitas.evaluation import digits_split
from maskaq_brevitas.evaluation import evaluate
from maskaq_brevitas.evaluation import labelled_folder
from maskaq_brevitas.export import FinnLint
from maskaq_brevitas.export import export_finn
from maskaq_brevitas.export import lint_finn
from maskaq_brevitas.export.finn_lint import lint_text
from maskaq_brevitas.report.report import text_table

#: Output of FINN against PyTorch's, with the quantizers in step.
TOLERANCE = 1e-4


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m integration.finn", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="digits_vit", help="digits_vit or the timm name of a ViT")
    add("--checkpoint", type=Path, help="safetensors file with the weights")
    add("--scheme", default="w4a4", help="widths wXaY; the restrictions of finn-wXaY are compared with it")
    add("--effort", choices=tuple(EFFORTS), default="fast", help="of synthesis and tuning, as in 'maskaq quantize'")
    add("--cut", choices=("full", "encoder"), default="full", help="part of the model")
    add("--eval-data", type=Path, help="folder of labelled images (not needed for digits_vit)")
    add("--eval-limit", type=int, help="evaluate on this many images, evenly spaced")
    add("--samples", type=int, default=2, help="images that FINN executes")
    add("--part", default="xcvc1902-vsva2197-2MP-e-S", help="FPGA; GELU needs a Versal part")
    add("--fps", type=int, default=1000, help="images per second that the folding aims at")
    add("--clock", type=float, default=5.0, help="period in ns")
    add("--venv", type=Path, help=f"environment with finn-plus; default: {VARIABLE}, or one made in --out")
    add("--variants", action="store_true", help="instead: small graphs that break one rule each, FINN against the lint")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/finn"), help="folder of the run, the files and FINN's reports")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and give 0 if FINN maps everything, computes what PyTorch computes, and the lint said so."""
    options = parse(arguments)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    python = environment_python(options.venv, options.out / "venv")
    if options.variants:
        return compare_variants(options, python)
    began = time.monotonic()
    model = load_model(options.model, checkpoint=options.checkpoint)
    data = digits_split(False, model) if options.eval_data is None else labelled_folder(options.eval_data, model)
    quant_model, shape = quantized(options, model, data)
    path = options.out / f"{options.cut}.onnx"
    export_finn(quant_model, path, input_shape=shape, cut=options.cut)
    lint = lint_finn(path)
    print(f"\nlint: {lint_text(lint, only_verdict=True)}", flush=True)
    images = torch.stack([data[index][0] for index in range(options.samples)])
    write_reference(quant_model, images, options.out / "reference.npz", options.cut)
    request = {**_request(options, path, options.cut), "sample": str(options.out / "reference.npz")}
    result = run_frontend(python, {"model": request})
    passed = report(result["model"], lint, options)
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes; files and FINN's reports are in {options.out}")
    return 0 if passed else 1


def quantized(
    options: argparse.Namespace, model: nn.Module, data: Dataset
) -> tuple[nn.Module, tuple[int, int, int]]:
    """The quant model of ``finn-wXaY``, and a printed table of what its restrictions cost on the same images."""
    calibrator = DataFreeCalibrator(
        model, scheme=f"finn-{options.scheme}", effort=options.effort, seed=options.seed, run_dir=options.out / "run",
        run_mode="resume",
    )  # fmt: skip
    pool: Tensor = calibrator.ensure_images().images()

    def top1(candidate: nn.Module) -> tuple[str, str]:
        found = evaluate(candidate, data, limit=options.eval_limit, progress=False)
        return f"{found.top1:.2f}", str(found.images)

    rows = [["float", *top1(model)]]
    for scheme, text in ((options.scheme, "as it is"), (f"tensor-{options.scheme}", "one scale per tensor"),
                         (f"finn-{options.scheme}", "and signed softmax, patch tokens at 8 bit")):  # fmt: skip
        other = DataFreeCalibrator(model, scheme=scheme, seed=options.seed, progress=False)
        rows.append([f"{scheme}: {text}", *top1(other.calibrated_on(pool))])
    quant_model = calibrator.quantize()
    if calibrator.tuning:
        rows.append([f"finn-{options.scheme}, tuned ({options.effort})", *top1(calibrator.freeze())])
    print(f"{options.model}, {len(pool)} synthetic images, seed {options.seed}\n")
    print(text_table(["quant model", "top-1 [%]", "images"], rows), flush=True)
    return quant_model, calibrator.geometry.input_size


def report(result: dict[str, Any], lint: FinnLint, options: argparse.Namespace) -> bool:
    """Print what FINN found; whether everything landed, is equal to PyTorch, and was predicted."""
    nodes, unmapped = result["nodes"], result["unmapped"]
    version = result["versions"]["finn-plus"]
    print(f"\nFINN+ {version}, {options.part}: {nodes - len(unmapped)} of {nodes} nodes on hardware operators")
    print("  " + ", ".join(f"{count} {name}" for name, count in result["operators"].items()))
    for operator, name in unmapped:
        print(f"  left: {operator} ({name})")
    if result["failed"]:
        print(f"  step_{result['failed']['step']} failed: {result['failed']['error']}")
    equal = True
    for index, found in enumerate(result.get("execution", [])):
        strange = "; ".join(found["strange"])
        equal &= found["in_step"] <= TOLERANCE and not strange
        print(
            f"executed on image {index}: output differs from PyTorch's by {found['in_step']:.1e} with "
            f"{found['quantizers']} quantizers in step ({found['flips']} of {found['values']} values on the other side "
            f"of a rounding tie, at most {found['farthest_flip']:.1e} steps from it), by {found['alone']:.1e} on its "
            f"own; largest output {found['largest_output']:.2f}, top-1 {'equal' if found['same_top1'] else 'differs'}"
            + (f"; WRONG: {strange}" if strange else "")
        )
    if "estimates" in result:
        speed, area = result["estimates"]["performance"], result["estimates"]["resources"]
        print(
            f"estimated at {1e3 / options.clock:.0f} MHz: {speed['estimated_throughput_fps']:.0f} images/s, latency "
            f"{speed['estimated_latency_ns'] / 1e6:.2f} ms; "
            + ", ".join(f"{value:,.0f} {name}" for name, value in area.items())
        )
    lands = not result["failed"] and not unmapped
    agreed = lands == lint.lands
    print(f"the lint said {'so' if agreed else 'otherwise'}")
    return lands and equal and agreed and "execution" in result


def compare_variants(options: argparse.Namespace, python: Path) -> int:
    """A table of FINN's verdict beside the lint's; 0 if they agree on every graph."""
    lints, requests = {}, {}
    for name, variant in VARIANTS.items():
        folder = options.out / "variants" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_variant(variant, folder / "model.onnx")
        lints[name] = lint_finn(folder / "model.onnx")
        requests[name] = _request(options, folder / "model.onnx", f"variants/{name}")
    rows, agreed = [], True
    for name, result in run_frontend(python, requests).items():
        equal = verdict_of(result) == verdict_of_lint(lints[name])
        agreed &= equal
        rows.append(
            [name, verdict_of(result), verdict_of_lint(lints[name]), "yes" if equal else "NO", VARIANTS[name].text]
        )
    print(text_table(["variant", "FINN", "lint", "equal", "what it is"], rows, right=()))
    print(f"\nFINN and the lint {'agree on every graph' if agreed else 'DISAGREE'}")
    return 0 if agreed else 1


def verdict_of(result: dict[str, Any]) -> str:
    """FINN's verdict in words: that everything lands, the nodes that it left, or that it refused the file at all."""
    if result["failed"] and result["failed"]["step"] == BEFORE[0]:
        return "refused"
    return _left(operator for operator, _ in result["unmapped"])


def verdict_of_lint(lint: FinnLint) -> str:
    """The lint's, in the same words."""
    if any(node.effect == "refused" for node in lint.nodes):
        return "refused"
    return _left(node.operator for node in lint.nodes if node.effect != "hardware")


def _left(operators: Iterable[str]) -> str:
    found = sorted(operators)
    return "leaves " + ", ".join(f"{found.count(name)} {name}" for name in dict.fromkeys(found)) if found else "lands"


def _request(options: argparse.Namespace, path: Path, folder: str) -> dict[str, Any]:
    return {
        "model": str(path), "output": str(options.out / "finn" / folder), "part": options.part,
        "target_fps": options.fps,
        "clock_ns": options.clock,
    }  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MaskAQError as error:
        print(f"integration.finn: error: {error}", file=sys.stderr)
        sys.exit(2)
