"""Hands out the outputs of a model's transformer blocks while a context is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch import nn

from maskaq_brevitas.models.families import block_names

__all__ = ["block_tap"]


@contextmanager
def block_tap(model: nn.Module) -> Iterator[list[Tensor]]:
    """A context in which every forward pass of ``model`` records what its blocks give, input side first.

    Yields:
        A list that each pass fills anew with one ``(batch, tokens, channels)`` per block; empty again in the end.

    Raises:
        ModelError: if the model has no blocks of a known type.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2)
        >>> with block_tap(model) as outputs, torch.no_grad():
        ...     _ = model(torch.zeros(1, 3, 32, 32))
        ...     print([tuple(output.shape) for output in outputs])
        [(1, 5, 192), (1, 5, 192)]
    """
    outputs: list[Tensor] = []
    handles = []
    try:
        handles.append(model.register_forward_pre_hook(lambda *_: outputs.clear()))
        for name in block_names(model):
            block = model.get_submodule(name)
            handles.append(block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
        outputs.clear()
