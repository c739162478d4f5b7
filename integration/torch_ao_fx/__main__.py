"""int8 by torch.ao's FX graph mode (static and QAT) and torchao's PT2E, calibrated on noise, synthetic and real images.

    python -m integration.torch_ao_fx --model digits_vit

Accuracy, and speed on the CPU beside the float model of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from collections.abc import Mapping

import torch
from torch import Tensor
from torch import nn
from torch.utils.data import DataLoader

from integration.material import BATCH
from integration.material import Material
from integration.material import add_options
from integration.material import command_line
from integration.material import print_table
from integration.torch_ao_fx.flows import compiled
from integration.torch_ao_fx.flows import fx_int8
from integration.torch_ao_fx.flows import fx_qat_int8
from integration.torch_ao_fx.flows import pt2e_int8
from maskaq_brevitas import DataFreeCalibrator

TITLES = ["flow", "calibrated on", "top-1 [%]", "ms per image", "speed"]
SYNTHETIC = "synthetic images"


@torch.no_grad()
def milliseconds(models: Mapping[str, nn.Module], images: Tensor, repeats: int = 15) -> dict[str, float]:
    """Median time per image of each model; they take turns, so that a busy machine slows all of them down."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(images)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(found) / len(images) for name, found in seconds.items()}


def reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


class Table:
    """Accuracies as they are found; times are filled in at the end, all measured in turns."""

    def __init__(self, material: Material):
        self.material = material
        self.rows: list[tuple[str, str, str]] = []
        self.timed: dict[str, nn.Module] = {}
        self.failures: list[str] = []

    def add(self, flow: str, kind: str, make: Callable[[], nn.Module], *, timed: bool = False) -> nn.Module | None:
        """Make a model and measure its top-1; what fails gets a row that says so."""
        try:
            model = make()
        except Exception as error:  # compilers and optional packages fail in their own ways: the others still count
            self.rows.append((flow, kind, "failed"))
            self.failures.append(f"{flow}, {kind}: {reason(error)}" if kind else f"{flow}: {reason(error)}")
            return None
        self.rows.append((flow, kind, self.material.top1(model)))
        self.material.note(*self.rows[-1])
        if timed:
            self.timed[flow] = model
        return model

    def finished(self, images: Tensor) -> list[list[str]]:
        """All rows, with the times of one row of each flow that was to be timed."""
        times = milliseconds(self.timed, images)
        rows = []
        for flow, kind, accuracy in self.rows:
            time_of_row = times.get(flow) if kind in ("", SYNTHETIC) else None
            speed = "" if time_of_row is None else f"{times['float, eager'] / time_of_row:.2f}"
            rows.append([flow, kind, accuracy, "" if time_of_row is None else f"{time_of_row:.2f}", speed])
        return rows


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m integration.torch_ao_fx", description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    options, material = Material.parse(parser, arguments)
    model, example = material.model, material.real[:BATCH]
    calib_loader = DataFreeCalibrator(
        model, scheme="w8a8", num_images=options.images, batch_size=BATCH, steps=options.steps, seed=options.seed
    )
    calib_loader.ensure_images()
    loaders: dict[str, DataLoader] = {
        "Gaussian noise": material.loader(material.noise),
        SYNTHETIC: calib_loader,
        "real images": material.loader(material.real),
    }
    table = Table(material)
    table.add("float, eager", "", lambda: model, timed=True)
    for kind, loader in loaders.items():
        table.add("FX static", kind, lambda loader=loader: fx_int8(model, loader), timed=kind == SYNTHETIC)
    for kind in (SYNTHETIC, "real images"):
        table.add("FX QAT", kind, lambda kind=kind: fx_qat_int8(model, loaders[kind]), timed=kind == SYNTHETIC)
    references = {
        kind: table.add("PT2E reference", kind, lambda loader=loader: pt2e_int8(model, loader))
        for kind, loader in loaders.items()
    }
    if not options.no_compile:
        table.add("float, compiled", "", lambda: compiled(model, example), timed=True)
        reference = references[SYNTHETIC]
        if reference is not None:
            table.add("PT2E compiled", SYNTHETIC, lambda: compiled(reference, example), timed=True)
    sentences = [
        f"speed: time of the eager float model by that of the row, medians of batches of {len(example)}, all in turns",
        *(f"failed: {failure}" for failure in table.failures),
    ]
    print_table(
        options, [material.headline(options), (TITLES, table.finished(example)), "\n".join(sentences)],
        command=command_line("integration.torch_ao_fx", arguments),
    )  # fmt: skip


if __name__ == "__main__":
    main()
