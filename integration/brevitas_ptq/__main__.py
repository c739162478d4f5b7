"""Brevitas' post-training quantization as shipped, calibrated on noise, on synthetic and on real images: one table.

    python -m integration.brevitas_ptq --model digits_vit
    python -m integration.brevitas_ptq --model vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors \\
        --eval-data photos --eval-limit 200 --schemes w8a8 w4a8 --out runs/ptq.json

The synthetic images are made once and serve all cells: the calibration loader of a cell *is* a ``DataFreeCalibrator``.
Real images are a yardstick. Finished cells are kept in ``--out`` and skipped when the command is started again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from integration.brevitas_ptq.algorithms import MODELS
from integration.brevitas_ptq.algorithms import Loader
from integration.brevitas_ptq.table import ALGORITHMS
from integration.brevitas_ptq.table import KINDS
from integration.brevitas_ptq.table import Bench
from integration.brevitas_ptq.table import CellStore
from integration.brevitas_ptq.table import markdown
from integration.material import BATCH
from integration.material import Material
from integration.material import add_options
from integration.material import command_line
from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.config import Scheme
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import from_mapping
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.config import to_mapping
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.evaluation import evaluate
from maskaq_brevitas.run_directory import fingerprint
from maskaq_brevitas.run_directory import installed_versions


def parser() -> argparse.ArgumentParser:
    """The command line: what all flows take, and which cells are wanted."""
    found = argparse.ArgumentParser(prog="python -m integration.brevitas_ptq", description=__doc__.splitlines()[0])
    add_options(found)
    found.add_argument("--schemes", nargs="+", default=["w4a4"], help="widths wXaY (default w4a4)")
    found.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of images (default all)")
    found.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="who swaps (default both)")
    found.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help="default all")
    found.add_argument("--synthesis", type=json.loads, default={}, metavar="JSON", help="further synthesis options")
    found.add_argument(
        "--learned-round-iters", type=int, default=100, help="iterations per layer (default 100; Brevitas' own: 1,000)"
    )
    return found


def fixed_widths(name: str) -> Scheme:
    """The scheme of a name.

    Raises:
        ConfigurationError: if it is unknown, or one whose widths are chosen layer by layer.
    """
    scheme = resolve_scheme(name)
    if scheme.average_bits is not None:
        raise ConfigurationError(f"--schemes: Brevitas' algorithms do not choose widths; expected wXaY, got {name}.")
    return scheme


def main(arguments: list[str] | None = None) -> str:
    """Measure what is missing, print the table, and return it."""
    options_of = parser()
    options, material = Material.parse(options_of, arguments)
    try:
        schemes = [fixed_widths(name) for name in options.schemes]
        synthesis = from_mapping(SynthesisConfig, {
            "steps": options.steps, "batch_size": BATCH, "procedural_share": 0.5, **options.synthesis,
        })  # fmt: skip
        store = CellStore(None if options.out is None else Path(options.out), settings(options, material, synthesis))
    except ConfigurationError as error:
        options_of.error(str(error))
    # In synthesis quantizers come into play once (alignment): those of the first scheme.
    calibrator = DataFreeCalibrator(
        material.model, scheme=schemes[0], num_images=options.images, batch_size=BATCH, held_back=0,
        synthesis=synthesis, seed=options.seed,
    )  # fmt: skip
    loaders: dict[str, Loader] = {
        "noise": material.loader(material.noise), "synthetic": calibrator, "real": material.loader(material.real)
    }  # fmt: skip
    bench = Bench(
        float_model=material.model, eval_data=material.evaluation, round_iterations=options.learned_round_iters
    )
    for scheme in options.schemes:
        for images in options.kinds:
            for kind in options.models:
                missing = store.missing(options.algorithms, images, kind, scheme)
                if missing and images == "synthetic":
                    calibrator.ensure_images()
                for algorithm, cell in bench.cells(kind, scheme, loaders[images], missing) if missing else ():
                    store.keep(algorithm, images, kind, scheme, cell)
                    tell(f"{scheme} {images:9} {kind:8} {algorithm:16}", cell)
    note = (
        f"Top-1 in percent (float: {evaluate(material.model, material.evaluation).top1:.1f}), and seconds of the "
        f"algorithm behind calibrate, or of the whole row. A star: no layer changed. {material.headline(options)}"
    )
    took = [stage["seconds"] for stage in calibrator.stages if stage["stage"] == "synthesis"]
    note += f"; synthesis took {took[0]:.0f} s." if took else "."
    command = command_line("integration.brevitas_ptq", arguments)
    table = f"{markdown(store.cells, options.schemes)}\n{note}\n\n    {command}\n"
    print(table)
    return table


def settings(options: argparse.Namespace, material: Material, synthesis: SynthesisConfig) -> dict[str, Any]:
    """What figures depend on, as plain values: cells of one file share it."""
    return {
        "model": options.model, "weights": fingerprint(material.model), "evaluated_on": len(material.evaluation),
        "images": options.images, "synthesis": to_mapping(synthesis), "synthesised_against": options.schemes[0],
        "seed": options.seed, "learned_round_iters": options.learned_round_iters, "threads": options.threads,
        "versions": installed_versions(),
    }  # fmt: skip


def tell(name: str, cell: dict[str, Any]) -> None:
    """One finished cell, and what Brevitas warned of."""
    text = f"{name} {cell['top1']:6.2f} ({cell['seconds']:.0f} s, {cell['changed']} of {cell['layers']} layers changed)"
    print("\n    ".join([text, *cell["warnings"]]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
