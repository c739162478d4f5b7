"""How images are changed at random before a training step: the two networks see the same change, so any is allowed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.modes import seeded_by
from maskaq_brevitas.synthesis.augment import cut_out
from maskaq_brevitas.synthesis.augment import draw_crops

__all__ = ["augment"]


def augment(images: Tensor, kind: str, generator: torch.Generator, geometry: Geometry | None = None) -> Tensor:
    """``images``, each changed at random; torch's global generator is left as it was.

    Args:
        images: normalised, ``(batch, channels, height, width)``.
        kind: see :attr:`~maskaq_brevitas.config.DistillConfig.augment`.
        generator: on the CPU; gives the seed.
        geometry: of the model; colours change between black and white as it normalises them. ``None``: the images are
            shares of white already.
    """
    if kind == "none":
        return images
    if kind in ("light", "mixed"):
        crops = _large_crops(images, generator)
        return crops if kind == "light" else _mirrored_and_mixed(crops, generator)
    if kind == "strong":
        shares = cut_out(images, draw_crops(tuple(images.shape), 0.3, 20, 0.5, generator))
        shares = shares if geometry is None else geometry.denormalize(shares)
        shares = _other_light(shares, generator)
        return _blended(shares if geometry is None else geometry.normalize(shares), generator)
    size = tuple(images.shape[-2:])
    steps: list[nn.Module] = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    if images.shape[1] == 3:
        steps += [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4)], p=0.8), v2.RandomGrayscale(p=0.2)]
    steps += [v2.RandomApply([v2.GaussianBlur(max(3, size[0] // 20 * 2 + 1))], p=0.5)]
    change = v2.Compose(steps)
    with seeded_by(generator):
        # torchvision's colour changes cut what lies outside of [0, 1].
        shares = images if geometry is None else geometry.denormalize(images)
        shares = torch.stack([change(image) for image in shares])
        if kind == "cutmix":
            # It mixes labels too, which we do not use.
            shares, _ = v2.CutMix(num_classes=1)(shares, torch.zeros(len(shares), dtype=torch.long))
        return shares if geometry is None else geometry.normalize(shares)


def _large_crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """A part of each image, at least 70 % of its area, at the size of the whole: all in one call.

    torchvision's ``RandomResizedCrop(scale=(0.7, 1), ratio=(0.9, 1.1))`` takes sixty calls for each image.
    """
    area, ratio, across, down = torch.rand(4, len(images), generator=generator)
    area, ratio = 0.7 + 0.3 * area, 0.9 * (1.1 / 0.9) ** ratio
    widths, heights = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    # Coordinates from -1 to 1: centres lie where the part stays inside.
    lines = torch.zeros(len(images), 2, 3)
    lines[:, 0, 0], lines[:, 0, 2] = widths, (2 * across - 1) * (1 - widths)
    lines[:, 1, 1], lines[:, 1, 2] = heights, (2 * down - 1) * (1 - heights)
    grid = F.affine_grid(lines.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _mirrored_and_mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored, and in half of them a box with a share of up to all of the area of another one."""
    count, height, width = len(images), *images.shape[-2:]
    order = torch.randperm(count, generator=generator)
    mirrored, mixed, area, across, down = torch.rand(5, count, 1, 1, 1, generator=generator)
    side = area.clamp(0.05, 0.95).sqrt()
    tall, wide = (side * height).round(), (side * width).round()
    top, left = (down * (height - tall)).round(), (across * (width - wide)).round()
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
    box = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide) & (mixed < 0.5)
    images = torch.where((mirrored < 0.5).to(images.device), images.flip(-1), images)
    return torch.where(box.to(images.device), images[order.to(images.device)], images)


# Those below take a whole batch in each call: on a GPU it is the number of calls that costs.


def _other_light(shares: Tensor, generator: torch.Generator) -> Tensor:
    """Other saturation, contrast, brightness and tint of each image, and a fifth of them out of focus.

    Args:
        shares: between black (0) and white (1); what goes beyond is cut off.
        generator: on the CPU.
    """
    count, channels = shares.shape[:2]

    def normal(deviation: float, channels: int = 1) -> Tensor:
        return (torch.randn(count, channels, 1, generator=generator) * deviation).exp()

    saturation = 0.3 + 1.3 * torch.rand(count, 1, 1, generator=generator)
    contrast, factor = normal(0.25), normal(0.2) * normal(0.08, channels)
    # All of it is one matrix for each image, from colours to colours, and an offset towards the image's mean.
    colours = saturation * torch.eye(channels) + (1 - saturation) / channels
    colours, offset = (factor * contrast * colours).to(shares), (factor * (1 - contrast)).to(shares)
    pixels = shares.flatten(2)
    pixels = torch.baddbmm(offset * pixels.mean(dim=(1, 2)).view(-1, 1, 1), colours, pixels)
    shares = pixels.clamp(0, 1).view_as(shares)
    blurred = (torch.rand(count, generator=generator) < 0.2).nonzero().flatten().to(shares.device)
    if len(blurred):
        coarse = F.avg_pool2d(shares[blurred], 2, ceil_mode=True)
        shares[blurred] = F.interpolate(coarse, size=shares.shape[-2:], mode="bilinear")
    return shares


def _blended(images: Tensor, generator: torch.Generator) -> Tensor:
    """In half of the images, blots with 10 to 90 % of the area show another image: nothing that has straight edges."""
    count, _, height, width = images.shape
    cells = int(torch.randint(2, 8, (), generator=generator))
    relief = F.interpolate(torch.randn(count, 1, cells, cells, generator=generator), (height, width), mode="bicubic")
    share, chosen = torch.rand(2, count, 1, 1, 1, generator=generator)
    ranked = relief[..., ::4, ::4].flatten(1).sort(dim=1).values
    level = ranked.gather(1, ((0.1 + 0.8 * share.view(-1, 1)) * (ranked.shape[1] - 1)).long())
    blots = (relief < level.view(-1, 1, 1, 1)) & (chosen < 0.5)
    other = torch.randperm(count, generator=generator)
    return torch.where(blots.to(images.device), images[other.to(images.device)], images)
