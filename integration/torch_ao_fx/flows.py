"""The int8 flows of torch.ao and torchao, each a function from a float model and calibration batches to an int8 model.

Their own code is unchanged; a ``DataFreeCalibrator`` stands where they take a DataLoader.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from maskaq_brevitas.errors import MissingExtraError

__all__ = ["compiled", "fx_int8", "fx_qat_int8", "pt2e_int8", "pt2e_package"]

# Where FX graph mode quantization has been: torch.ao, which announces its end, and what is to follow it.
_FX_HOMES = ("torch.ao.quantization", "torchao.quantization")
_QAT_EPOCHS, _QAT_RATE = 4, 1e-5


def fx_int8(model: nn.Module, loader: DataLoader) -> nn.Module:
    """``prepare_fx``, calibration, ``convert_fx``: an int8 model with torch's quantized kernels.

    Raises:
        ImportError: if neither torch nor torchao has FX graph mode quantization.
    """
    with _quiet(), _engine() as engine:
        package, fx = _fx_package()
        example = next(iter(loader))[0][:1]
        prepared = fx.prepare_fx(copy.deepcopy(model).eval(), package.get_default_qconfig_mapping(engine), (example,))
        with torch.no_grad():
            for images, _ in loader:
                prepared(images)
        return fx.convert_fx(prepared)


def fx_qat_int8(model: nn.Module, loader: DataLoader) -> nn.Module:
    """``prepare_qat_fx``, a few epochs of distillation from the float model, ``convert_fx``.

    Raises:
        ImportError: if neither torch nor torchao has FX graph mode quantization.
    """
    with _quiet(), _engine() as engine:
        package, fx = _fx_package()
        example = next(iter(loader))[0][:1]
        mapping = package.get_default_qat_qconfig_mapping(engine)
        prepared = fx.prepare_qat_fx(copy.deepcopy(model).train(), mapping, (example,))
        optimizer = torch.optim.Adam(prepared.parameters(), lr=_QAT_RATE)
        for _ in range(_QAT_EPOCHS):
            for images, _ in loader:
                with torch.no_grad():
                    wanted = model(images).log_softmax(-1)
                loss = F.kl_div(prepared(images).log_softmax(-1), wanted, log_target=True, reduction="batchmean")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return fx.convert_fx(prepared.eval())


def pt2e_package() -> ModuleType:
    """torchao's PT2E package.

    Raises:
        MissingExtraError: if torchao is not installed, or has no PT2E.
    """
    try:
        with _quiet():
            return import_module("torchao.quantization.pt2e.quantize_pt2e")
    except ImportError as error:
        raise MissingExtraError("torchao", "pt2e") from error


def pt2e_int8(model: nn.Module, loader: DataLoader) -> nn.Module:
    """``torch.export``, ``prepare_pt2e`` with the X86InductorQuantizer, calibration, ``convert_pt2e``.

    On a CPU without VNNI activations take 7 bits, as torchao's documentation of ``reduce_range`` asks for.

    Returns:
        The reference model: it quantizes and dequantizes around float kernels, until :func:`compiled` fuses them.

    Raises:
        MissingExtraError: if torchao is not installed.
    """
    pt2e = pt2e_package()
    with _quiet():
        x86 = import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        widths = x86.get_default_x86_inductor_quantization_config(reduce_range=_overflows())
        quantizer = x86.X86InductorQuantizer().set_global(widths)
        images = next(iter(loader))[0]
        # The example must hold two images at least: a batch of one would be taken for a constant.
        example = images if len(images) > 1 else images.repeat(2, 1, 1, 1)
        batch = {0: torch.export.Dim("batch", min=1, max=4096)}
        exported = torch.export.export(model.eval(), (example,), dynamic_shapes=(batch,)).module()
        prepared = pt2e.prepare_pt2e(exported, quantizer)
        with torch.no_grad():
            for images, _ in loader:
                prepared(images)
        return _Borrowed(pt2e.convert_pt2e(prepared))


@torch.no_grad()
def compiled(model: nn.Module, images: Tensor) -> nn.Module:
    """The model compiled by inductor for inference, weights frozen: this is where PT2E's int8 kernels come in.

    Args:
        images: an example batch; other batch sizes are taken too.

    Raises:
        Exception: whatever ``torch.compile`` raises where it does not work (no C++ compiler, say).
    """
    from torch._inductor import config

    with _quiet():
        frozen = _Borrowed(torch.compile(copy.deepcopy(model), dynamic=True), freezing=config.patch)
        frozen(images)
        return frozen


class _Borrowed(nn.Module):
    """A function as a module for ``evaluate``: exported models refuse ``eval()``, and freezing is a global setting."""

    def __init__(self, function: Callable[[Tensor], Tensor], freezing: Callable[..., Any] | None = None):
        super().__init__()
        self.function = (function,)  # in a tuple: not a submodule
        self.freezing = freezing

    def __deepcopy__(self, memo: dict) -> _Borrowed:
        return _Borrowed(copy.deepcopy(self.function[0], memo), self.freezing)

    def forward(self, x: Tensor) -> Tensor:
        if self.freezing is None:
            return self.function[0](x)
        with self.freezing(freezing=True):
            return self.function[0](x)


def _overflows() -> bool:
    """Whether int8 kernels add two products in 16 bits here, which 8-bit activations overflow (x86 before VNNI)."""
    return not getattr(torch.cpu, "_is_vnni_supported", lambda: True)()


def _fx_package() -> tuple[ModuleType, ModuleType]:
    """The package of qconfigs and the module of FX graph mode quantization, wherever they are by now."""
    missing = []
    for home in _FX_HOMES:
        try:
            return import_module(home), import_module(f"{home}.quantize_fx")
        except ImportError as error:
            missing.append(str(error))
    raise ImportError(f"No FX graph mode quantization: {'; '.join(missing)}. Use PT2E.")


@contextmanager
def _engine() -> Iterator[str]:
    """A context with the best engine of int8 kernels that this torch has; the one chosen before is put back."""
    before = torch.backends.quantized.engine
    engines = torch.backends.quantized.supported_engines
    usable = [name for name in ("x86", "fbgemm", "onednn", "qnnpack") if name in engines]
    if not usable:
        raise ImportError(f"This torch has no quantized kernels that are known here: its engines are {engines}.")
    try:
        torch.backends.quantized.engine = usable[0]
        yield usable[0]
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without the announcements of the end of torch.ao, which come once per observer."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield
