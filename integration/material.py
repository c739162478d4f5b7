"""What the flows take from the command line: a float model, labelled images, calibration images."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset
from torch.utils.data import Subset
from torch.utils.data import TensorDataset

from maskaq_brevitas import load_model
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import MaskAQError
from maskaq_brevitas.evaluation import digits_split
from maskaq_brevitas.evaluation import evaluate
from maskaq_brevitas.evaluation import labelled_folder
from maskaq_brevitas.files import write_whole
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.models.zoo import SHIPPED_MODEL
from maskaq_brevitas.report.report import text_table
from maskaq_brevitas.synthesis.augment import pixel_noise

__all__ = ["BATCH", "Material", "add_options", "print_table"]

BATCH = 16
"""Images per calibration batch."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a flow."""
    parser.add_argument("--model", default=SHIPPED_MODEL, help="timm name of a ViT or DeiT, or digits_vit (default)")
    parser.add_argument("--checkpoint", help="its weights, a .safetensors file; not needed for digits_vit")
    parser.add_argument("--eval-data", help="folder of labelled images; digits_vit brings its own")
    parser.add_argument("--eval-limit", type=int, help="evaluate on this many of them, evenly spaced")
    parser.add_argument("--images", type=int, default=32, help="calibration images of each kind (default 32)")
    parser.add_argument("--steps", type=int, default=60, help="iterations of synthesis per batch (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--out", help="file that the printed tables are also written to")


@dataclass(frozen=True, kw_only=True)
class Material:
    """A model and images for it.

    Attributes:
        model: float, in evaluation mode.
        evaluation: labelled images; none of them calibrates.
        noise, real: calibration images, normalised, ``(images, channels, height, width)``.
    """

    model: nn.Module
    evaluation: Dataset
    noise: Tensor
    real: Tensor

    @classmethod
    def parse(
        cls, parser: argparse.ArgumentParser, arguments: Sequence[str] | None
    ) -> tuple[argparse.Namespace, Material]:
        """The options of a command line and what they name; bad input ends the program with its message."""
        options = parser.parse_args(arguments)
        try:
            return options, cls.load(options)
        except MaskAQError as error:
            parser.error(str(error))

    @classmethod
    def load(cls, options: argparse.Namespace) -> Material:
        """What the options name; sets the number of threads.

        Raises:
            MaskAQError: for bad input, see the messages.
        """
        if min(options.images, options.steps, options.threads) < 1:
            raise ConfigurationError("--images, --steps, --threads: expected whole numbers >= 1.")
        torch.set_num_threads(options.threads)
        model = load_model(options.model, checkpoint=options.checkpoint)
        generator = torch.Generator().manual_seed(options.seed)
        if options.eval_data is None and options.model != SHIPPED_MODEL:
            raise ConfigurationError("Expected labelled images, got none: name a folder with --eval-data DIR.")
        if options.eval_data is None:
            evaluation: Dataset = digits_split(False, model)  # type: ignore[assignment]
            pool: Dataset = digits_split(True, model)  # type: ignore[assignment]
            chosen = torch.randperm(len(pool), generator=generator)[: options.images]  # type: ignore[arg-type]
        else:
            pool = labelled_folder(options.eval_data, model)
            order = torch.randperm(len(pool), generator=generator)
            chosen, rest = order[: options.images], order[options.images :].sort().values
            if not len(rest):
                raise ConfigurationError(f"--images {options.images}: no image of {len(pool)} is left to evaluate on.")
            evaluation = Subset(pool, rest.tolist())
        total, limit = len(evaluation), options.eval_limit  # type: ignore[arg-type]
        if limit is not None and 0 < limit < total:
            evaluation = Subset(evaluation, [index * total // limit for index in range(limit)])
        geometry = read_geometry(model)
        shape = (options.images, *geometry.input_size)
        return cls(
            model=model,
            evaluation=evaluation,
            noise=pixel_noise(shape, *geometry.bounds(torch.zeros(())), generator),
            real=torch.stack([pool[index][0] for index in chosen.tolist()]),
        )

    def loader(self, images: Tensor) -> DataLoader:
        """Calibration images as the DataLoader that a user has: ``(images, labels)``."""
        return DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.long)), batch_size=BATCH)

    def top1(self, model: nn.Module) -> str:
        """Accuracy of a model on the labelled images, percent."""
        return f"{evaluate(model, self.evaluation).top1:.1f}"

    @staticmethod
    def note(*cells: str) -> None:
        """Say a row as soon as it is found; the table comes at the end."""
        print(": ".join(cell for cell in cells if cell), file=sys.stderr, flush=True)

    def headline(self, options: argparse.Namespace) -> str:
        """What the tables below it were made of."""
        count = len(self.evaluation)  # type: ignore[arg-type]
        return (
            f"{options.model}: {options.images} calibration images, {options.steps} iterations of synthesis, seed "
            f"{options.seed}, {count} images to evaluate, {options.threads} thread(s)"
        )


def command_line(module: str, arguments: Sequence[str] | None) -> str:
    """The command that a flow's ``main(arguments)`` stands for; ``None``: the arguments of this process."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def print_table(
    options: argparse.Namespace, parts: Sequence[str | tuple[list[str], list[list[Any]]]], *, command: str
) -> None:
    """Print texts and tables ``(titles, rows)``, first two columns to the left; write ``--out`` if it is given.

    Args:
        command: what made them, written above them in the file (:func:`command_line`).
    """
    texts = [part if isinstance(part, str) else text_table(*part, right=range(2, len(part[0]))) for part in parts]
    text = "\n\n".join(texts)
    print(text)
    if options.out is not None:
        out = Path(options.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, lambda aside: aside.write_text(f"{command}\n\n{text}\n", encoding="utf-8"))
