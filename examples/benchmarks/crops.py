"""How far runs are from the float model on photographs without labels.

    python examples/benchmarks/crops.py runs/a runs/b

This package takes every choice within a run from synthetic images. Whoever develops it has to choose between ways of
making them, and must not take that choice from the images that evaluate: this measures finished runs on crops of other
photographs, the colour ones that scikit-image ships (without that on which ``examples/segmentation.py`` evaluates), or
those of ``--folder``. The divergence is in nats per crop; its standard error is taken over photographs, because the
crops of one are alike. The last two columns are of the run's own held-back images, which are synthetic.

    pip install scikit-image
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from statistics import stdev

import torch
from PIL import Image
from torch import Tensor
from torch import nn
from torchvision.transforms import v2

from maskaq_brevitas.commands.common import load_run
from maskaq_brevitas.commands.common import saved_options
from maskaq_brevitas.config.checks import check_at_least
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.models.families import read_logits
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.modes import seeded
from maskaq_brevitas.report.report import text_table
from maskaq_brevitas.tuning.losses import temperature_divergence

SHIPPED = ("astronaut", "chelsea", "coffee", "motorcycle_left", "retina", "rocket")
_ENDINGS = (".jpg", ".jpeg", ".png")


def photographs(folder: str | None) -> list[Tensor]:
    """Photographs as uint8 ``(3, height, width)``.

    Raises:
        InputError: if the folder holds none.
    """
    if folder is None:
        try:
            import skimage
        except ImportError as error:
            raise InputError("Expected scikit-image, found none. Install it, or name a --folder.") from error
        place = Path(skimage.__file__).parent / "data"
        files = [path for path in sorted(place.iterdir()) if path.stem in SHIPPED]
    else:
        place = Path(folder)
        files = sorted(path for path in place.rglob("*") if path.suffix.lower() in _ENDINGS)
    if not files:
        raise InputError(f"Expected photographs ({', '.join(_ENDINGS)}) in {place}, found none.")
    return [v2.functional.pil_to_tensor(Image.open(path).convert("RGB")) for path in files]


def crops(photo: Tensor, count: int, geometry: Geometry) -> Tensor:
    """The middle square of a photograph and random parts of it, normalised, ``(count, channels, height, width)``."""
    channels, height, width = geometry.input_size
    side = min(photo.shape[1:])
    whole = v2.functional.resize(v2.functional.center_crop(photo, [side, side]), [height, width], antialias=True)
    part = v2.Compose([
        v2.RandomResizedCrop((height, width), scale=(0.35, 1), ratio=(0.8, 1.25), antialias=True),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip
    found = torch.stack([whole, *(part(photo) for _ in range(count - 1))]).float() / 255
    return geometry.normalize(found if channels == 3 else found.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1))


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([read_logits(model, model(part)).float() for part in images.split(32)])


def compared(models: tuple[nn.Module, nn.Module], images: Tensor) -> tuple[float, float]:
    """Mean divergence of the second model from the first, and the share of equal top-1 in percent."""
    wanted, found = (logits(model, images) for model in models)
    equal = (wanted.argmax(1) == found.argmax(1)).float().mean()
    return float(temperature_divergence(wanted, found, 1.0)), float(equal) * 100


def summary(measured: list[tuple[float, float]]) -> list[str]:
    """Mean divergence with its standard error (of two or more), and mean share of equal top-1."""
    if not measured:
        return ["-", "-"]
    divergences = [value for value, _ in measured]
    error = f" +- {stdev(divergences) / len(divergences) ** 0.5:.3f}" if len(divergences) > 1 else ""
    return [f"{mean(divergences):.3f}{error}", f"{mean(share for _, share in measured):.1f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument("--folder", metavar="DIR", help="photographs; default: those that scikit-image ships")
    parser.add_argument("--crops", type=int, default=6, metavar="N", help="of each photograph; default: 6")
    options = parser.parse_args(arguments)
    check_at_least("--crops", options.crops, 1)
    photos = photographs(options.folder)
    rows = []
    for run in options.runs:
        saved = saved_options(Namespace(run=run, quiet=True), quiet=True)
        calibrator = load_run(run, saved)
        models = (calibrator.float_model.eval(), calibrator.freeze())
        with seeded(0):  # one photograph at a time: there may be many
            measured = [compared(models, crops(photo, options.crops, calibrator.geometry)) for photo in photos]
        held_back = []
        if calibrator.held_back is not None:
            held_back = [compared(models, image[None]) for image in calibrator.held_back.images()]
        rows.append([run, saved.scheme, *summary(measured), *summary(held_back)])
        print(f"{run}: {rows[-1][2]} nats, {options.crops} crops of each of {len(photos)} photographs", file=sys.stderr)
    print(text_table(
        ["run", "scheme", "divergence: crops", "equal top-1 [%]", "held back", "equal top-1 [%]"], rows
    ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
