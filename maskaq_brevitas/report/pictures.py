"""The picture of a run: synthetic images beside their informative regions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from maskaq_brevitas.errors import MissingExtraError

__all__ = ["overlay", "save_image_grid"]

_SHADE = 0.25


def overlay(pixels: Tensor, informative: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images whose patches outside the informative region are darkened and greyed.

    Args:
        pixels: ``(images, channels, height, width)``, uint8.
        informative: ``(images, patches)``, bool.
        grid: rows and columns of patches.

    Returns:
        ``(images, 3, height, width)``, float32 in [0, 1].
    """
    images = pixels.float() / 255
    images = images if images.shape[1] == 3 else images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    # (images, patches) -> (images, 1, rows, columns) -> (images, 1, height, width)
    mask = F.interpolate(informative.float().view(-1, 1, *grid), size=images.shape[-2:], mode="nearest")
    dimmed = _SHADE * images.mean(dim=1, keepdim=True)
    return images * mask + dimmed * (1 - mask)


def save_image_grid(path: Path, pixels: Tensor, labels: list[int], informative: Tensor, grid: tuple[int, int]) -> None:
    """Write a PNG: pairs of image and informative region, four pairs in a row, captioned with the label.

    The state of matplotlib is neither read nor changed: the figure has a canvas of its own.

    Args:
        path: of the file.
        pixels: ``(images, channels, height, width)``, uint8.
        labels: class of each image.
        informative: ``(images, patches)``, bool.
        grid: rows and columns of patches.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz") from error
    plain = overlay(pixels, informative.new_ones(informative.shape), grid)
    masked = overlay(pixels, informative, grid)
    across = min(4, len(pixels))
    down = -(-len(pixels) // across)
    # Inches: pixel for pixel at 120 dots per inch where that fits; the caption above a pair takes a fifth more.
    cell = min(2.2, max(1.5, pixels.shape[-1] / 120 + 0.04))
    figure = Figure(figsize=(across * (2 * cell + 0.2), down * cell * 1.2 + 0.4), dpi=120)
    canvas = FigureCanvasAgg(figure)
    figure.text(0.5, 1 - 0.2 / figure.get_figheight(), "Synthetic images, each beside its informative patches",
                ha="center", va="center", fontsize=10)  # fmt: skip
    width, height = figure.get_size_inches()
    for index in range(len(pixels)):
        row, column = divmod(index, across)
        left, top = column * (2 * cell + 0.2) + 0.1, height - 0.4 - row * cell * 1.2
        for offset, image in enumerate((plain[index], masked[index])):
            place = (
                (left + offset * cell + 0.02) / width, (top - cell * 1.18) / height,
                (cell - 0.04) / width, (cell - 0.04) / height,
            )  # fmt: skip
            axes = figure.add_axes(place)
            axes.imshow(np.asarray(image.permute(1, 2, 0)), interpolation="nearest", vmin=0, vmax=1)
            axes.set_axis_off()
        figure.text((left + cell) / width, (top - cell * 0.1) / height, f"label {labels[index]}", ha="center",
                    va="center", fontsize=8)  # fmt: skip
    canvas.print_png(str(path))
