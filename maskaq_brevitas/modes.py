"""What a caller may have switched on around a call, and the random states that other packages draw from."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import contextmanager
from typing import Literal

import numpy
import torch
from torch import nn

from maskaq_brevitas.errors import SlowArithmeticWarning

__all__ = [
    "Precision",
    "arithmetic",
    "evaluation_mode",
    "fitting_precision",
    "kept_random_states",
    "multiplies_in_bfloat16",
    "own_modes",
    "seeded",
    "seeded_by",
    "warn_of_emulation",
]


#: How networks compute.
Precision = Literal["float32", "bfloat16", "auto"]


@contextmanager
def own_modes() -> Iterator[None]:
    """Inside, gradients can be taken and numbers are what the configuration says, whatever the caller has switched on.

    No ``inference_mode`` (its tensors cannot be trained), no ``no_grad``, no ``autocast``. Serves as a decorator too.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


def arithmetic(precision: Precision, device: torch.device) -> torch.autocast:
    """Inside, networks on ``device`` compute in ``"float32"`` or ``"bfloat16"`` (autocast); parameters keep their type.

    ``"auto"`` is what :func:`fitting_precision` gives.

    Without autocast's cache of casts, which it keeps until the *outermost* autocast ends. That may be the one of
    :func:`own_modes`, after many steps of training: all of them would see the biases of the first.
    """
    return torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=fitting_precision(precision, device) == "bfloat16",
        cache_enabled=False,
    )  # fmt: skip


def fitting_precision(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """``precision``, with ``"auto"`` as bfloat16 where the hardware multiplies in it, else float32."""
    if precision != "auto":
        return precision
    return "bfloat16" if multiplies_in_bfloat16(device) else "float32"


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has instructions for it; else each product is emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())  # an older torch


def warn_of_emulation(stage: str, precision: Precision, device: torch.device) -> None:
    """Tell that a stage which begins now will take long.

    Warns:
        SlowArithmeticWarning: if its precision is bfloat16 and the device has to emulate that.
    """
    if precision == "bfloat16" and not multiplies_in_bfloat16(device):
        warnings.warn(
            f"{stage}.precision is bfloat16, which this {device.type} can only emulate: expect {stage} to take many "
            "times as long. precision='auto' takes bfloat16 where the hardware multiplies in it, float32 elsewhere.",
            SlowArithmeticWarning, stacklevel=3,
        )  # fmt: skip


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode; afterwards every module has its own flag back.

    Asking a Brevitas proxy for its scale changes flags too: quantizers share some of their stateless parts.
    """
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def kept_random_states() -> Iterator[None]:
    """The random states of Python, numpy and torch (CPU) are put back on exit, also on failure."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, torch draws from this seed, on the CPU and on ``device``; on exit their states are put back.

    The state of any other GPU is not touched. (``torch.manual_seed`` seeds all devices, and ``fork_rng`` puts back only
    those that it is told.)
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def seeded_by(generator: torch.Generator, device: torch.device | None = None) -> AbstractContextManager[None]:
    """:func:`seeded` with a seed that ``generator``, on the CPU, gives: for code that draws from torch's global one."""
    return seeded(int(torch.randint(2**62, (), generator=generator)), device)
