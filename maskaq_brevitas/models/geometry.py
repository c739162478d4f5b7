"""What a Vision Transformer expects at its input and how its tokens lie on the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from typing import cast

from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.families import attention_layouts
from maskaq_brevitas.models.families import attention_modules
from maskaq_brevitas.models.families import block_prefix
from maskaq_brevitas.models.families import class_count
from maskaq_brevitas.models.families import family_of
from maskaq_brevitas.models.families import has_class_token
from maskaq_brevitas.models.family import data_config
from maskaq_brevitas.models.layout import AttentionLayout

__all__ = ["Geometry", "read_geometry"]


@dataclass(frozen=True)
class Geometry:
    """Input and token layout of a model.

    Attributes:
        input_size: ``(channels, height, width)`` in pixels.
        grid: ``(rows, columns)`` of patch tokens.
        prefix_tokens: tokens before the patch tokens (class, distillation, registers).
        class_token: whether the first token is a class token.
        num_classes: outputs of the classifier; 0 if there is none.
        mean, std: normalisation per channel, in units of pixel values in [0, 1].
        layouts: how each attention module lies on the image; empty if each sees all patches in the order of the grid,
            behind the prefix tokens.
    """

    input_size: tuple[int, int, int]
    grid: tuple[int, int]
    prefix_tokens: int
    class_token: bool
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layouts: tuple[AttentionLayout, ...] = ()

    @property
    def patches(self) -> int:
        """Number of patch tokens."""
        return self.grid[0] * self.grid[1]

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], ``(..., channels, height, width)``, to what the model takes."""
        return (pixels - self._column(self.mean, pixels)) / self._column(self.std, pixels)

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        return images * self._column(self.std, images) + self._column(self.mean, images)

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised values of black and white, each ``(channels, 1, 1)``."""
        zeros = like.new_zeros(self.input_size[0], 1, 1)
        return self.normalize(zeros), self.normalize(zeros + 1)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        return like.new_tensor(values).view(-1, 1, 1)


def read_geometry(model: nn.Module) -> Geometry:
    """The geometry of a model, read from it.

    Mean and standard deviation (and the input size of a model that takes any) stand in no layer. They are read from the
    attribute ``pretrained_cfg`` that timm puts on its models and that may be set on any other: ``model.pretrained_cfg =
    dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))``. Without it they are those of the family's usual checkpoints.

    Raises:
        ModelError: if the model has no attention, or no patch embedding to read the grid from.
    """
    attention_modules(model)
    family = family_of(model)
    embedding: Any = getattr(model, "patch_embed", None)
    if family is not None and family.grid is not None:
        grid = family.grid(model)
    elif getattr(embedding, "grid_size", None) is not None:
        grid = embedding.grid_size
    else:
        raise ModelError(
            f"{type(model).__name__} has attention, but no patch_embed.grid_size to read the patch grid from. "
            "Expected a timm VisionTransformer with a fixed input size (img_size)."
        )
    data = data_config(model, family.data if family is not None else None)
    channels = _input_channels(model)
    image_size = getattr(embedding, "img_size", None) or data["input_size"][1:]
    if family is not None and family.input_size is not None:
        image_size = family.input_size(model)
    return Geometry(
        input_size=(channels, int(image_size[0]), int(image_size[1])),
        grid=(int(grid[0]), int(grid[1])),
        prefix_tokens=block_prefix(model),
        class_token=has_class_token(model),
        num_classes=class_count(model),
        mean=_per_channel(data["mean"], channels),
        std=_per_channel(data["std"], channels),
        layouts=attention_layouts(model),
    )


def _input_channels(model: nn.Module) -> int:
    """Channels of the image, from the first convolution or (patches cut by hand) from timm's ``in_chans``."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return int(cast(int, model.in_chans))


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One value per channel: a model with another number of channels than its configuration gets their mean."""
    values = tuple(float(value) for value in values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels
