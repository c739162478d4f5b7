"""What a model gives, for exports and their checks: one tensor, or a list or mapping of tensors with one entry per
image each.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ExportError

__all__ = ["check_outputs", "joined", "output_tensors"]


def output_tensors(value: Any) -> list[Tensor] | None:
    """The tensors of an output, in the order in which exporters write them; None if it holds something else.

    Args:
        value: a tensor, a list or tuple of tensors, or a mapping to tensors, and to lists and tuples of them, of which
            those that are None are left out.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        parts = [part if isinstance(part, (list, tuple)) else (part,) for part in value.values() if part is not None]
        value = [tensor for part in parts for tensor in part]
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(part, Tensor) for part in value):
        return None
    return list(value)


def joined(tensors: list[Tensor]) -> Tensor:
    """One tensor: the only one as it is, several as ``(batch, all their values)``."""
    return tensors[0] if len(tensors) == 1 else torch.cat([part.flatten(1) for part in tensors], dim=1)


def check_outputs(model: nn.Module, example: Tensor) -> None:
    """Refuse a model that gives something else than tensors with one entry per image.

    Args:
        model: in evaluation mode.
        example: images ``(batch, channels, height, width)`` on its device.

    Raises:
        ExportError: it does. A model that cannot be run on ``example`` is left to the exporter, which says why.
    """
    try:
        with torch.no_grad():
            output = model(example)
    except Exception:  # noqa: BLE001 - whatever a model raises
        return
    tensors = output_tensors(output)
    if tensors is None or any(part.ndim < 2 or len(part) != len(example) for part in tensors):
        inner = f" of {type(output[0]).__name__}" if isinstance(output, (list, tuple)) and output else ""
        inner = f" {tuple(output.shape)}" if isinstance(output, Tensor) else inner
        raise ExportError(
            f"{type(model).__name__} cannot be exported: it gives {type(output).__name__}{inner}, and a file needs "
            "tensors with one entry per image, such as (batch, classes) or (batch, channels, height, width). "
            "Detections have another number in each image. Export the part in front of them: the backbone, "
            "calibrator.quant_model.get_submodule(name)."
        )
