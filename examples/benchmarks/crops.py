"""How far runs are from the float model on photographs that nobody is evaluated on: what to choose between them by.

    python examples/benchmarks/crops.py runs/a runs/b

A choice between images, options or rates must not be taken from the images that evaluate. This measures finished runs
on crops of other photographs, without labels: the colour photographs that scikit-image ships, or those of ``--folder``
(a few per class of things would be better; any will do). The divergence is in nats per crop; its standard error is
taken over photographs, because the crops of one are alike. The last two columns are of the run's own held-back
images, which are synthetic.

    pip install scikit-image
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional as F
from torchvision.io import ImageReadMode
from torchvision.io import decode_image
from torchvision.transforms import v2

from maskaq_brevitas.commands.common import load_run
from maskaq_brevitas.commands.common import saved_options
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.models.families import read_logits
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.modes import seeded
from maskaq_brevitas.report.report import text_table

SHIPPED = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "motorcycle_left", "retina", "rocket")
_ENDINGS = (".jpg", ".jpeg", ".png")


def photographs(folder: str | None) -> list[Tensor]:
    """Photographs as uint8 ``(3, height, width)``.

    Raises:
        InputError: if the folder holds none.
    """
    if folder is None:
        import skimage

        shipped = Path(skimage.__file__).parent / "data"
        files = [path for path in sorted(shipped.iterdir()) if path.stem in SHIPPED]
    else:
        files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _ENDINGS)
    if not files:
        raise InputError(f"Expected photographs ({', '.join(_ENDINGS)}) in {folder}, found none.")
    return [decode_image(str(path), mode=ImageReadMode.RGB) for path in files]


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


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL divergence of ``found`` from ``wanted``, logits ``(images, classes)`` both, in nats, ``(images,)``."""
    return F.kl_div(F.log_softmax(found, 1), F.log_softmax(wanted, 1), reduction="none", log_target=True).sum(1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument("--folder", metavar="DIR", help="photographs; default: those that scikit-image ships")
    parser.add_argument("--crops", type=int, default=6, metavar="N", help="of each photograph; default: 6")
    options = parser.parse_args(arguments)
    photos = photographs(options.folder)
    rows = []
    for run in options.runs:
        saved = saved_options(Namespace(run=run, quiet=True), quiet=True)
        calibrator = load_run(run, saved)
        with seeded(0):
            images = torch.cat([crops(photo, options.crops, calibrator.geometry) for photo in photos])
        models = (calibrator.float_model.eval(), calibrator.freeze())
        row = [run, saved.scheme]
        held_back = (calibrator.held_back or calibrator.pool).images()
        for part, each in ((images, options.crops), (held_back, 1)):
            wanted, found = (logits(model, part) for model in models)
            means = divergence(wanted, found).view(-1, each).mean(dim=1)
            error = float(means.std()) / len(means) ** 0.5
            equal = float((wanted.argmax(1) == found.argmax(1)).float().mean()) * 100
            row += [f"{float(means.mean()):.3f} +- {error:.3f}", f"{equal:.1f}"]
        rows.append(row)
        print(f"{run}: {row[2]} nats on {len(images)} crops of {len(photos)} photographs", file=sys.stderr)
    print(text_table(
        ["run", "scheme", "divergence: crops", "equal top-1 [%]", "held back", "equal top-1 [%]"], rows
    ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
