"""How many images may pass through the networks at once, by what autograd has to keep for each."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.modes import Precision
from maskaq_brevitas.modes import arithmetic

__all__ = ["auto_batch_size", "fitting", "graph_bytes", "is_out_of_memory", "parts"]

#: Without a limit by the user, on a CPU: ViT-Tiny at 224 pixels passes in parts of 8 images, which is as fast as 16.
_CPU_BYTES = 640 * 2**20
_SMALLEST_BATCH = 16


def graph_bytes(model: nn.Module, image: Tensor, *, precision: Precision = "float32") -> int:
    """Bytes that autograd keeps of each image between the forward and the backward pass through a frozen model.

    Args:
        model: without trainable parameters, on the device of ``image``.
        image: ``(1, channels, height, width)``.
        precision: as in :func:`~maskaq_brevitas.modes.arithmetic`.
    """
    # The difference of two passes: what does not grow with the batch, as weights cast to bfloat16, drops out. One image
    # alone is no measure: views of it stay contiguous where those of a batch are copied.
    return _kept(model, image.repeat(3, 1, 1, 1), precision) - _kept(model, image.repeat(2, 1, 1, 1), precision)


def _kept(model: nn.Module, images: Tensor, precision: Precision) -> int:
    kept: dict[int, Tensor] = {}  # the tensors themselves: a freed storage would give its address to another

    def note(tensor: Tensor) -> Tensor:
        alone = tensor.detach()  # a hook that gives the tensor itself back would tie the graph to itself for ever
        kept[tensor.untyped_storage().data_ptr()] = alone
        return alone

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        arithmetic(precision, images.device),
    ):
        model(images.detach().requires_grad_(True))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def fitting(bytes_per_image: float, device: torch.device, limit_mib: int | None = None) -> int:
    """How many images may pass through the networks at once, at least 1.

    Args:
        bytes_per_image: see :func:`graph_bytes`.
        device: where the networks run.
        limit_mib: what they may take together; None: 640 MiB on a CPU, half of the free memory of a GPU.
    """
    if limit_mib is not None:
        limit = limit_mib * 2**20
    elif device.type == "cuda":
        limit = torch.cuda.mem_get_info(device)[0] // 2
    else:
        limit = _CPU_BYTES
    return max(1, int(limit // max(1.0, bytes_per_image)))


def auto_batch_size(float_snapshot: nn.Module, image: Tensor, limit_mib: int | None = None) -> int:
    """Images to optimise together: 16 on a CPU, where more are not faster; on a GPU as many as pass at once, 16 to 256.

    Args:
        float_snapshot: the float model, frozen, on the device of ``image``.
        image: ``(1, channels, height, width)``.
        limit_mib: see :func:`fitting`; a limit counts on a CPU too.
    """
    if image.device.type == "cpu" and limit_mib is None:
        return _SMALLEST_BATCH
    # The quant snapshot keeps masks of its quantizers besides: 1.5 times as much for ViT-Tiny.
    most = fitting(3 * graph_bytes(float_snapshot, image), image.device, limit_mib)
    return min(256, max(_SMALLEST_BATCH, 2 ** int(math.log2(most))))


def parts(count: int, most: int) -> list[slice]:
    """``count`` images cut into as few parts as hold at most ``most`` each, of nearly equal size.

    Example:
        >>> [(part.start, part.stop) for part in parts(16, 10)]
        [(0, 8), (8, 16)]
    """
    size = math.ceil(count / math.ceil(count / most))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get memory; its allocator for a CPU says so by text alone."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
