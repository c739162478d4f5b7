"""Lets each transformer block be called with tokens alone, and checks what stands between one block and the next."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.families import block_names
from maskaq_brevitas.models.families import block_passages

__all__ = ["bound_arguments"]


@contextmanager
def bound_arguments(model: nn.Module, image: Tensor) -> Iterator[None]:
    """A context in which each block of ``model`` may be called as ``block(tokens)``.

    What the model itself gives a block beside its tokens (rotary position embedding, a shared bias, the size of the
    grid) is taken from a pass of one image, and added to every call until the context closes.

    Args:
        model: float or quantized.
        image: ``(1, channels, height, width)``, normalised.

    Raises:
        ModelError: if these arguments depend on the image, or if something stands between two blocks that the family
            does not name, so that the output of one is not what the next one takes.
    """
    calls = _block_calls(model, image)
    others = _block_calls(model, -image)
    _check_chain(model, calls)
    with ExitStack() as stack:
        for name, (inputs, named, _) in calls.items():
            if not _same((inputs[1:], named), (others[name][0][1:], others[name][1])):
                raise ModelError(
                    f"{type(model).__name__}: what {name} is given beside its tokens depends on the image, so blocks "
                    "cannot be reconstructed one by one. Use --tune distill."
                )
            if _holds_something((inputs[1:], named)):
                stack.enter_context(_bound(model.get_submodule(name), inputs[1:], named))
        yield


@contextmanager
def _bound(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Iterator[None]:
    handle = block.register_forward_pre_hook(
        lambda _block, given, given_named: ((given[0], *inputs), {**named, **given_named}), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _block_calls(model: nn.Module, image: Tensor) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Name of each block -> what it was given, by position and by name, and what it gave."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def noted(name: str) -> Callable[..., None]:
        def hook(_block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            calls[name] = inputs, named, output

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(noted(name), with_kwargs=True) for name in block_names(model)
    ]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _check_chain(model: nn.Module, calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]) -> None:
    names = list(calls)
    passages = block_passages(model)
    for before, name in zip(names, names[1:], strict=False):
        expected = calls[before][2]
        if name in passages:
            with torch.no_grad():
                expected = model.get_submodule(passages[name])(expected)
        found = calls[name][0][0]
        if found.shape != expected.shape or not torch.equal(found, expected):
            raise ModelError(
                f"{type(model).__name__}: {name} does not take what {before} gives, and the family does not name what "
                "stands between them, so blocks cannot be reconstructed one by one. Use --tune distill."
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def _holds_something(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_something(part) for part in value)
    if isinstance(value, dict):
        return any(_holds_something(part) for part in value.values())
    return value is not None and value is not False
