"""The pool of synthetic images: a map-style dataset in memory, replaced in place, saved as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from maskaq_brevitas.errors import InputError, RunDirectoryError, SynthesisError
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.run_directory import write_whole

__all__ = ["SyntheticImages", "balanced_labels"]

_TENSORS = ("pixels", "labels", "informative", "made_at")


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
        labels: ``(images,)``, int64: the class that each image was synthesised for, or, of an image that was drawn, what
            the float model sees in it.
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

    def put(
        self, indices: Tensor, images: Tensor, labels: Tensor, informative: Tensor, *, version: int = 1
    ) -> None:
        """Replace the images at ``indices``, in place.

        Args:
            indices: ``(batch,)``.
            images: normalised, ``(batch, channels, height, width)``.
            labels: ``(batch,)``.
            informative: ``(batch, patches)``.
            version: of the pool in which they belong.
        """
        pixels = self.geometry.denormalize(images).mul(255).round().clamp(0, 255)
        self.pixels[indices] = pixels.to(torch.uint8)
        self.labels[indices] = labels
        self.informative[indices] = informative
        self.made_at[indices] = version

    def save(self, path: str | Path) -> None:
        """Write the pool as safetensors; the file appears under its name only when whole."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        # One key only: safetensors writes several in random order, and the same pool must give the same bytes.
        metadata = {"version": str(self.version)}
        write_whole(Path(path), lambda aside: save_file(tensors, aside, metadata=metadata))

    def load(self, path: str | Path) -> None:
        """Take the images of a saved pool, in place.

        Raises:
            RunDirectoryError: if the file is missing, damaged, or of another number or size of images; the pool then
                stays as it is.
        """
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in _TENSORS}
                version = int((file.metadata() or {})["version"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise RunDirectoryError(f"{path} is not a readable pool of synthetic images: {error}.") from error
        for name, tensor in found.items():
            present = getattr(self, name)
            if tensor.shape != present.shape or tensor.dtype != present.dtype:
                raise RunDirectoryError(
                    f"{path}: {name} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(present.shape)} "
                    f"{present.dtype}: it was saved for another model or number of images."
                )
        for name, tensor in found.items():
            getattr(self, name).copy_(tensor)
        self.version = version
