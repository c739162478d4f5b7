"""Inputs and outputs of a model's modules in one forward pass, taken by hooks that are gone afterwards."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.export.outputs import joined
from maskaq_brevitas.export.outputs import output_tensors

__all__ = ["Call", "capture_calls", "is_leaf"]


class Call(NamedTuple):
    """First input and output of one call of a module. ``input`` is None where it is no tensor."""

    input: Tensor | None
    output: Tensor


def capture_calls(
    model: nn.Module, images: Tensor, select: Callable[[nn.Module], bool]
) -> tuple[Any, dict[str, list[Call]]]:
    """Run a model without gradients and keep what the selected modules took and gave.

    Args:
        images: ``(batch, channels, height, width)``.
        select: says whether a module is watched.

    Returns:
        The model's output, several tensors as one (:func:`~maskaq_brevitas.export.outputs.joined`), and for each
        watched module that was called its calls in order, by module name.
    """
    calls: dict[str, list[Call]] = {}
    handles: list[Any] = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            taken, given = _plain(args[0] if args else None), _plain(output)
            if given is not None:
                calls.setdefault(name, []).append(Call(taken, given))

        return hook

    try:
        for name, module in model.named_modules():
            if select(module):
                handles.append(module.register_forward_hook(keep(name)))
        with torch.no_grad():
            output = model(images)
            tensors = output_tensors(output) if _plain(output) is None else None
            return (_plain(output) if tensors is None else joined(tensors)), calls
    finally:
        for handle in handles:
            handle.remove()


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a layer: it has no children, or only Brevitas quantizers."""
    from brevitas.proxy.quant_proxy import QuantProxyFromInjector

    if isinstance(module, QuantProxyFromInjector):
        return False
    return all(isinstance(child, QuantProxyFromInjector) for child in module.children())


def _plain(value: Any) -> Tensor | None:
    """The tensor itself, or the dequantized values of a Brevitas QuantTensor (a NamedTuple in Brevitas 0.13)."""
    if not isinstance(value, Tensor):
        value = getattr(value, "value", None)
    return value.detach() if isinstance(value, Tensor) else None
