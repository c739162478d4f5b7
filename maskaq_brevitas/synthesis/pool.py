"""The pool of synthetic images: a map-style dataset in memory, replaced in place, saved as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from maskaq_brevitas.errors import DamagedFileError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import SynthesisError
from maskaq_brevitas.files import load_tensors
from maskaq_brevitas.files import save_tensors
from maskaq_brevitas.models.geometry import Geometry

__all__ = ["SyntheticImages", "balanced_labels"]


def balanced_labels(count: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """``count`` labels in random order, each class as often as any other (give or take one).

    A model without classes (``num_classes`` 0) gets zeros.
    """
    if num_classes == 0:
        return torch.zeros(count, dtype=torch.long)
    rounds = [torch.randperm(num_classes, generator=generator) for _ in range(-(-count // num_classes))]
    return torch.cat(rounds)[:count]


class SyntheticImages(Dataset[tuple[Tensor, int]]):
    """Images as uint8 pixels, with labels and informative regions; yields ``(normalised float image, label)``.

    Attributes:
        pixels: ``(images, channels, height, width)``, uint8.
        labels: ``(images,)``, int64: the class that each image was synthesised for, or, of an image that was drawn,
            what the float model sees in it.
        informative: ``(images, patches)``, bool.
        made_at: ``(images,)``, int64: the version in which each image was made last.
        version: how often the pool was made or replaced, in whole or in part; 0 means that no image has been made.
    """

    def __init__(self, count: int, geometry: Geometry):
        if count < 1:
            raise InputError(f"A pool needs at least one image, got num_images={count}.")
        self.geometry = geometry
        self.pixels = torch.zeros(count, *geometry.input_size, dtype=torch.uint8)
        self.labels = torch.zeros(count, dtype=torch.long)
        self.informative = torch.zeros(count, geometry.patches, dtype=torch.bool)
        self.made_at = torch.zeros(count, dtype=torch.long)
        self.version = 0

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.version == 0:
            # Another loader over this data set (accelerate makes one) would serve black images without this.
            raise SynthesisError(
                "The synthetic images have not been made yet. Call ensure_images() of the DataFreeCalibrator before "
                "its images are read through another loader."
            )
        return self.images(self.pixels[index]), int(self.labels[index])

    def images(self, pixels: Tensor | None = None) -> Tensor:
        """Normalised float images of ``pixels`` (default: of the whole pool)."""
        pixels = self.pixels if pixels is None else pixels
        return self.geometry.normalize(pixels.float() / 255)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Normalised images as the pool keeps them: uint8, a quarter of their memory."""
        return self.geometry.denormalize(images).mul(255).round().clamp(0, 255).to(torch.uint8)

    def put(
        self, indices: Tensor, images: Tensor, labels: Tensor, informative: Tensor, *, version: int = 1
    ) -> None:
        """Replace the images at ``indices``, in place.

        Args:
            indices: ``(batch,)``.
            images: normalised, ``(batch, channels, height, width)``; or what :meth:`to_pixels` makes of them.
            labels: ``(batch,)``.
            informative: ``(batch, patches)``.
            version: of the pool in which they belong.
        """
        self.pixels[indices] = images if images.dtype == torch.uint8 else self.to_pixels(images)
        self.labels[indices] = labels
        self.informative[indices] = informative
        self.made_at[indices] = version

    def save(self, path: str | Path) -> None:
        """Write the pool as safetensors; the file appears under its name only when whole.

        Raises:
            WriteError: if the disk is full or refuses the file.
        """
        save_tensors(Path(path), self._tensors())

    def load(self, path: str | Path) -> None:
        """Take the images of a saved pool, in place.

        Raises:
            DamagedFileError: if the file is missing, damaged, or of another number or size of images, or a label is no
                class of the model; the pool then stays as it is.
        """
        found = load_tensors(Path(path), self._tensors())
        classes = max(1, self.geometry.num_classes)
        outside = found["labels"][(found["labels"] < 0) | (found["labels"] >= classes)]
        if len(outside):
            raise DamagedFileError(f"{path}: expected labels from 0 to {classes - 1}, got {int(outside[0])}.")
        self.version = int(found.pop("version"))
        for name, tensor in found.items():
            getattr(self, name).copy_(tensor)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in ("pixels", "labels", "informative", "made_at")}
        return {**tensors, "version": torch.tensor(self.version)}
