"""Labelled images, and the accuracy of a model on them. They only ever evaluate: nothing is chosen on them."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from pathlib import PureWindowsPath
from typing import Any
from typing import Protocol
from typing import cast

import timm.data
import timm.utils
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset
from torch.utils.data import Subset
from torchvision import transforms
from tqdm import tqdm

from maskaq_brevitas.errors import DataError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import MissingExtraError
from maskaq_brevitas.models.families import class_count
from maskaq_brevitas.models.families import read_logits
from maskaq_brevitas.models.family import data_config
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.modes import evaluation_mode

__all__ = ["Accuracy", "LabelledData", "LabelledImages", "digits_images", "digits_split", "evaluate", "labelled_folder"]

DIGITS_SPLIT_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy of a model on a labelled data set.

    Attributes:
        top1: share of images whose label has the largest logit, percent.
        top5: share of images whose label is among the five largest logits, percent; 100 with five classes or fewer.
        images: number of images evaluated.
        predictions: (images,) int64, the class with the largest logit, in the order evaluated, on the CPU.
    """

    top1: float
    top5: float
    images: int
    predictions: Tensor = field(repr=False, compare=False)


class LabelledData(Protocol):
    """A map-style data set that gives ``(image, label)``: torch's ``Dataset`` with a length, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Image files with labels; gives ``(image, label)``: normalised float32 (channels x height x width), and an int.

    Raises:
        DataError: on access, naming the file, when an image cannot be decoded.
    """

    def __init__(self, files: list[Path], labels: list[int], transform: Callable[[Any], Tensor], mode: str = "RGB"):
        self.files = files
        self.labels = labels
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            with Image.open(self.files[index]) as image:
                pixels = image.convert(self.mode)
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, DecompressionBombError
            raise _broken_image(self.files[index], error) from error
        return self.transform(pixels), self.labels[index]


def digits_images(train: bool) -> tuple[Tensor, Tensor]:
    """One side of the fixed, stratified split of scikit-learn's handwritten digits, as 32 x 32 RGB images.

    The 8 x 8 originals are enlarged bicubically and repeated over three channels.

    Args:
        train: ``True`` for the two thirds (1198 images) that ``digits_vit`` has learned, ``False`` for the third (599
            images) held out.

    Returns:
        Images (images x 3 x 32 x 32), float32 in [0, 1], black background; labels (images,), int64 in [0, 10).

    Raises:
        MissingExtraError: when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo") from error
    digits = load_digits()
    train_pixels, test_pixels, train_labels, test_labels = train_test_split(
        digits.images, digits.target, test_size=1 / 3, random_state=DIGITS_SPLIT_SEED, stratify=digits.target)
    pixels, labels = (train_pixels, train_labels) if train else (test_pixels, test_labels)
    images = torch.from_numpy(pixels).float().unsqueeze(1) / 16  # (images x 1 x 8 x 8); the data set counts to 16
    images = F.interpolate(images, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    return images.repeat(1, 3, 1, 1), torch.from_numpy(labels).long()


def digits_split(train: bool, model: nn.Module) -> list[tuple[Tensor, int]]:
    """The split of :func:`digits_images`, normalised for the model, as a map-style data set.

    Each item is ``(image, label)``: float32 (3 x 32 x 32), and an int.

    Raises:
        MissingExtraError: when scikit-learn is not installed.
        DataError: when the model's input is not 3 x 32 x 32.
        ModelError: when the model is not a Vision Transformer whose input size can be read.
    """
    geometry = read_geometry(model)
    if geometry.input_size != (3, 32, 32):
        raise DataError(
            f"Expected a model with 3 x 32 x 32 input for the digits, got one with input size {geometry.input_size}. "
            f"Use 'digits_vit', or evaluate this model on a folder of its own images."
        )
    images, labels = digits_images(train)
    return list(zip(geometry.normalize(images), labels.tolist(), strict=True))


def labelled_folder(
    path: str | Path, model: nn.Module, *, num_classes: int | None = None, resize: bool | None = None
) -> LabelledImages:
    """Reads a folder of labelled images, with timm's own evaluation transform for the model.

    The folder holds either ``labels.csv`` with the columns ``file`` (relative to the folder) and ``label`` (class
    index), or one sub-folder of images for each class (ImageFolder), whose names in natural order are the classes 0, 1,
    2, ...

    Args:
        path: the folder.
        model: its ``pretrained_cfg`` gives interpolation, crop, mean and standard deviation.
        num_classes: classes of the model. ``None`` takes those of the model.
        resize: whether timm's resize and centre crop are applied. ``None`` applies them unless every image has exactly
            the model's input size already: such a folder was resized and cropped when it was made, and doing it
            twice would cut its borders off.

    Raises:
        DataError: when the folder or its labels are missing or malformed, an image is missing or broken, a label is
            outside ``[0, num_classes)``, a file lies outside the folder, the number of sub-folders is not that of the
            classes, the model takes images of other than one or three channels, or ``resize=False`` and an image has
            another size than the model's input.
        ModelError: when the model is not a Vision Transformer whose input size can be read.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"Expected a folder of labelled images, found none at '{root}'. Check the path.")
    if num_classes is None:
        num_classes = class_count(model)
    in_table = (root / "labels.csv").is_file()
    files, labels = _read_labels_csv(root, num_classes) if in_table else _read_class_folders(root, num_classes)
    geometry = read_geometry(model)
    channels, height, width = geometry.input_size
    if channels not in (1, 3):
        raise DataError(
            f"Expected a model of grey or colour images, got {type(model).__name__} with {channels} channels, which "
            "image files do not have. Give evaluate() a Dataset of your own, of normalised images (channels, height, "
            "width) and labels."
        )
    other_sizes = {file: size for file in files if (size := _image_size(file)) != (width, height)}
    if resize is False and other_sizes:
        file, size = next(iter(other_sizes.items()))
        raise DataError(
            f"Expected images of {width} x {height} pixels (width x height), the model's input, with resize=False; got "
            f"{size[0]} x {size[1]} in '{file}'. Leave resize out to resize and crop them."
        )
    if resize or (resize is None and other_sizes):
        # The geometry is read from the model itself: its configuration does not know of another img_size.
        config = data_config(model)
        config.update(input_size=geometry.input_size, mean=geometry.mean, std=geometry.std)
        transform = timm.data.create_transform(**config, is_training=False)
    else:
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(geometry.mean, geometry.std)])
    return LabelledImages(files, labels, transform, mode="L" if channels == 1 else "RGB")


def evaluate(
    model: nn.Module,
    dataset: LabelledData,
    *,
    batch_size: int = 64,
    limit: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Accuracy:
    """Measures the accuracy of a float or quantized model. Its train/eval flags and its device are put back.

    Args:
        model: images (batch x channels x height x width) -> logits (batch x classes), or transformers' output with
            them.
        dataset: map-style, gives ``(image, label)``.
        batch_size: images per step.
        limit: evaluate on this many images, evenly spaced over the data set; ``None`` or a larger number takes all.
        device: where to compute; ``None`` stays where the model is.
        progress: show a progress bar, when standard error is a terminal.

    Raises:
        InputError: when the data set is empty, ``batch_size`` or ``limit`` is below 1, or the model gives no logits.
        DataError: when a label is outside the model's classes, or an image cannot be decoded.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"Expected {name} of at least 1, got {value}.")
    total = len(dataset)
    if total == 0:
        raise InputError("Expected a data set with at least one image, got an empty one.")
    evaluated = cast(Dataset[Any], dataset)
    if limit is not None and limit < total:
        evaluated = Subset(evaluated, [index * total // limit for index in range(limit)])
        total = limit
    # A generator of its own: a DataLoader without one draws from the caller's random state.
    loader = DataLoader(evaluated, batch_size=batch_size, generator=torch.Generator())
    home = next(model.parameters(), torch.empty(0)).device
    correct1 = correct5 = 0
    predictions = []
    try:
        with evaluation_mode(model), torch.no_grad():
            model.to(device or home)
            for images, labels in tqdm(loader, desc="evaluate", unit="batch", disable=None if progress else True):
                logits = read_logits(model, model(images.to(device or home))).cpu()
                if logits.ndim != 2 or len(logits) != len(images):
                    raise InputError(
                        f"Expected logits of shape (batch x classes) with a batch of {len(images)}, got "
                        f"{tuple(logits.shape)}. Evaluate a model with a classifier."
                    )
                _check_labels(labels.tolist(), logits.shape[1])
                top1, top5 = timm.utils.accuracy(logits, labels, topk=(1, 5))  # percent of this batch
                correct1 += round(top1.item() * len(labels) / 100)
                correct5 += round(top5.item() * len(labels) / 100)
                predictions.append(logits.argmax(dim=1))
    finally:
        model.to(home)
    return Accuracy(
        top1=100 * correct1 / total, top5=100 * correct5 / total, images=total, predictions=torch.cat(predictions))


def _read_labels_csv(root: Path, num_classes: int) -> tuple[list[Path], list[int]]:
    """Files and class indices of ``labels.csv``, in its order."""
    table = root / "labels.csv"
    files: list[Path] = []
    labels: list[int] = []
    try:
        with open(table, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            if not {"file", "label"} <= set(reader.fieldnames or ()):
                raise DataError(
                    f"Expected the columns 'file,label' in the first line of '{table}', got {reader.fieldnames}.")
            for row in reader:
                place = f"line {reader.line_num} of '{table}'"
                name, label = (row["file"] or "").strip(), (row["label"] or "").strip()
                if not name or not label.removeprefix("-").isdecimal():
                    raise DataError(f"Expected 'file,label' with an integer label in {place}, got '{name},{label}'.")
                _check_labels([int(label)], num_classes, place)
                windows = PureWindowsPath(name)  # splits at / and \\ alike
                if windows.anchor or ".." in windows.parts:
                    raise DataError(
                        f"Expected a file inside the folder in {place}, got '{name}'. Use a path relative to it.")
                if not (root / name).is_file():
                    raise DataError(f"Expected the image '{name}' named in {place}, found no such file in '{root}'.")
                files.append(root / name)
                labels.append(int(label))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"Expected a UTF-8 table 'file,label', cannot read '{table}': {error}.") from error
    if not files:
        raise DataError(f"Expected at least one image in '{table}', got none.")
    return files, labels


def _read_class_folders(root: Path, num_classes: int) -> tuple[list[Path], list[int]]:
    """Files and class indices of an ImageFolder, by timm's reader."""
    samples, classes = find_images_and_targets(str(root))
    if not samples or "" in classes:  # "" is what timm calls the class of an image that lies in the folder itself
        raise DataError(
            f"Expected labels in '{root}': a file 'labels.csv' with the columns 'file,label', or all images in one "
            f"sub-folder for each class; got {'no images' if not samples else 'images without a label'}."
        )
    if len(classes) != num_classes:
        raise DataError(
            f"Expected {num_classes} sub-folders in '{root}', one for each class of the model, got {len(classes)}. "
            f"Write a 'labels.csv' (file,label) to evaluate on some of the classes."
        )
    return [Path(file) for file, _ in samples], [label for _, label in samples]


def _check_labels(labels: list[int], num_classes: int, place: str = "the data set") -> None:
    """Raises DataError, saying where, when a label is not a class index."""
    outside = [label for label in labels if not 0 <= label < num_classes]
    if outside:
        raise DataError(
            f"Expected labels from 0 to {num_classes - 1}, the classes of the model, got {outside[0]} in {place}. "
            f"Use data of the model's own classes."
        )


def _image_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels; raises DataError when the header of the file is not that of an image."""
    try:
        with Image.open(file) as image:
            size: tuple[int, int] = image.size
            image.verify()
    except Exception as error:  # as in LabelledImages
        raise _broken_image(file, error) from error
    return size


def _broken_image(file: Path, error: Exception) -> DataError:
    return DataError(
        f"Expected an image, cannot decode '{file}': {error}. Remove the file and its label, or copy it again.")
