"""Brevitas' post-training quantization as shipped, calibrated on noise, on synthetic and on real images: one table.

    python -m integration.brevitas_ptq --model digits_vit
    python -m integration.brevitas_ptq --model vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors \\
        --eval-data photos --eval-limit 200 --schemes w4a8 w8a8 --out runs/ptq.json

The synthetic images are made once and serve all cells: the calibration loader of a cell *is* a ``DataFreeCalibrator``.
Real images are a yardstick. They come from the training split (digits_vit), or, evenly spaced, from the labelled
folder, and are not evaluated on then. Finished cells are kept in ``--out`` and skipped when the command is started
again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from integration.brevitas_ptq.algorithms import MODELS, Loader
from integration.brevitas_ptq.table import ALGORITHMS, KINDS, Bench, CellStore, markdown
from maskaq_brevitas import DataFreeCalibrator, load_model
from maskaq_brevitas.config import SynthesisConfig, from_mapping, resolve_scheme, to_mapping
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.evaluation import digits_split, evaluate, labelled_folder
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.run_directory import fingerprint, installed_versions
from maskaq_brevitas.synthesis.augment import pixel_noise

_BATCH = 16


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m integration.brevitas_ptq", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="digits_vit", help="digits_vit or a timm name")
    add("--checkpoint", type=Path, help="safetensors file with the weights")
    add("--eval-data", type=Path, help="folder of labelled images (not needed for digits_vit)")
    add("--eval-limit", type=int, help="evaluate on this many images, evenly spaced")
    add("--schemes", nargs="+", default=["w4a4"], help="widths wXaY; default w4a4")
    add("--images", type=int, default=32, help="calibration images of each kind")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of images; default all")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="who swaps the layers; default both")
    add("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help="rows; default all")
    add("--steps", type=int, default=60, help="iterations of synthesis")
    add("--synthesis", type=json.loads, default={}, metavar="JSON", help="further options of SynthesisConfig")
    add("--learned-round-iters", type=int, default=100, help="iterations per layer (Brevitas' own default: 1,000)")
    add("--seed", type=int, default=0, help="of noise and synthesis")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=Path, help="JSON file of the cells; an unfinished table there goes on")
    options = parser.parse_args(arguments)
    if options.model != "digits_vit" and options.eval_data is None:
        parser.error(f"--eval-data is needed for {options.model}")
    try:
        options.resolved = [resolve_scheme(scheme) for scheme in options.schemes]
    except ConfigurationError as error:
        parser.error(str(error))
    if any(scheme.average_bits is not None for scheme in options.resolved):
        parser.error("--schemes: Brevitas' algorithms do not choose widths; expected wXaY, got one of auto-B")
    return options


def load_data(options: argparse.Namespace, model: nn.Module) -> tuple[Dataset, Dataset]:
    """Labelled images that measure, and as many real ones as ``--images`` says that calibrate; none is both."""
    if options.eval_data is None:
        measuring, real = digits_split(False, model), digits_split(True, model)
    else:
        folder = labelled_folder(options.eval_data, model)
        chosen = _evenly(len(folder), options.images)
        real = Subset(folder, chosen)
        measuring = Subset(folder, sorted(set(range(len(folder))) - set(chosen)))
    if options.eval_limit is not None and options.eval_limit < len(measuring):
        measuring = Subset(measuring, _evenly(len(measuring), options.eval_limit))
    return measuring, Subset(real, _evenly(len(real), options.images))


def _evenly(total: int, count: int) -> list[int]:
    return [index * total // count for index in range(min(count, total))]


def main(arguments: list[str] | None = None) -> str:
    """Measure what is missing, print the table, and return it."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    model = load_model(options.model, checkpoint=options.checkpoint)
    eval_data, real_data = load_data(options, model)
    synthesis = from_mapping(SynthesisConfig, {
        "steps": options.steps, "batch_size": _BATCH, "procedural_share": 0.5, **options.synthesis,
    })  # fmt: skip
    store = CellStore(options.out, {
        "model": options.model, "weights": fingerprint(model), "evaluated_on": len(eval_data), "images": options.images,
        "synthesis": to_mapping(synthesis), "synthesised_against": options.schemes[0], "seed": options.seed,
        "learned_round_iters": options.learned_round_iters, "threads": options.threads,
        "versions": installed_versions(),
    })  # fmt: skip
    bench = Bench(float_model=model, eval_data=eval_data, round_iterations=options.learned_round_iters)
    # In synthesis quantizers come into play once (alignment): those of the first scheme.
    calibrator = DataFreeCalibrator(
        model, scheme=options.resolved[0], num_images=options.images, batch_size=_BATCH, held_back=0,
        synthesis=synthesis, seed=options.seed,
    )  # fmt: skip

    def noise() -> Loader:
        geometry = read_geometry(model)
        low, high = (geometry.normalize(torch.full((3, 1, 1), value)) for value in (0.0, 1.0))
        images = pixel_noise(
            (options.images, *geometry.input_size), low, high, torch.Generator().manual_seed(options.seed)
        )
        return DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.long)), batch_size=_BATCH)

    loaders: dict[str, Callable[[], Loader]] = {
        "noise": noise, "synthetic": lambda: calibrator, "real": lambda: DataLoader(real_data, batch_size=_BATCH)
    }  # fmt: skip
    for scheme in options.schemes:
        for images in options.kinds:
            for kind in options.models:
                missing = store.missing(options.algorithms, images, kind, scheme)
                if not missing:
                    continue
                if images == "synthetic":
                    calibrator.ensure_images()
                for algorithm, cell in bench.cells(kind, scheme, loaders[images](), missing):
                    store.keep(algorithm, images, kind, scheme, cell)
                    lines = [
                        (
                            f"{scheme} {images:9} {kind:8} {algorithm:16} {cell['top1']:6.2f} ({cell['seconds']:.0f} s, "
                            f"{cell['changed']} of {cell['layers']} layers changed)"
                        ),
                        *cell["warnings"],
                    ]
                    print("\n    ".join(lines), file=sys.stderr, flush=True)
    start = time.perf_counter()
    float_top1 = evaluate(model, eval_data).top1
    print(f"float: {float_top1:.2f} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
    synthesised = [stage["seconds"] for stage in calibrator.stages if stage["stage"] == "synthesis"]
    took = f", made in {synthesised[0]:.0f} s" if synthesised else ""
    note = (
        f"Top-1 in percent (float: {float_top1:.1f}) on {len(eval_data)} images, and seconds of the algorithm behind "
        f"calibrate, or of the whole row; {options.images} calibration images, the synthetic ones of {synthesis.steps} "
        f"iterations{took}; seed {options.seed}, {options.threads} threads. A star: no layer changed.\n\n"
        f"    python -m integration.brevitas_ptq {shlex.join(sys.argv[1:] if arguments is None else arguments)}\n"
    )
    table = markdown(store.cells, options.schemes) + "\n" + note
    print(table)
    return table


if __name__ == "__main__":
    main()
