"""A quant model's twin for training: the same parameters, the same outputs, a fraction of the time.

Brevitas runs a dozen small modules per quantizer. The twin shares every parameter with the quant model, so what is
trained in one is trained in the other, and computes each quantizer in one expression. That alone saves a third of a
training step on a CPU; compiled (:func:`compile_blocks`), it takes a third of the time.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from typing import cast

import torch
from brevitas.core.function_wrapper import TensorClampSte
from brevitas.core.scaling import ParameterFromRuntimeStatsScaling
from brevitas.core.scaling import ParameterFromStatsFromParameterScaling
from brevitas.nn import QuantConv2d
from brevitas.nn import QuantIdentity
from brevitas.nn import QuantLinear
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas.errors import CompilationWarning
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.attention import ChannelAffine
from maskaq_brevitas.models.families import block_names
from maskaq_brevitas.models.families import channel_places
from maskaq_brevitas.quant.snapshot import check_layer
from maskaq_brevitas.quant.snapshot import integer_bounds

__all__ = [
    "LearnedQuantize", "biases_follow", "compile_blocks", "quantization_dropped", "scales_turn", "set_pivots",
    "training_twin",
]  # fmt: skip

_SCALINGS = (ParameterFromRuntimeStatsScaling, ParameterFromStatsFromParameterScaling)


class LearnedQuantize(nn.Module):
    """Uniform quantization with a learned scale, as Brevitas' ``IntQuant`` computes it, gradients included.

    ``(clamp(round(x / scale + zero_point)) - zero_point) * scale``; rounding passes gradients on, clamping only
    inside the range. The scale's gradient is that of LSQ (Esser et al., ICLR 2020) without its normalisation.

    Args:
        proxy: a calibrated Brevitas quantizer of a weight or an activation; its scale parameter is shared.

    Raises:
        ModelError: if the scale is not one parameter.
    """

    value: nn.Parameter
    divisor: Tensor
    zero_point: Tensor | None
    pivot: Tensor | None
    dropped: Tensor | None

    def __init__(self, proxy: QuantProxyFromInjector):
        super().__init__()
        impls = [part for part in proxy.modules() if isinstance(part, _SCALINGS)]
        scale = proxy.scale()
        if len(impls) != 1 or scale is None or impls[0].value.numel() != scale.numel():
            raise ModelError(f"{type(proxy).__name__}: expected a scale that is one learned parameter.")
        self.value = impls[0].value
        self.shape = tuple(scale.shape)
        self.low, self.high = integer_bounds(proxy)
        # Brevitas keeps the largest value of the range and divides it by a power of two, or by one less. By a tensor:
        # a GPU divides by a plain number with other last bits.
        self.register_buffer("divisor", (self.value.detach().flatten()[0] / scale.detach().flatten()[0]).round())
        # Some Brevitas quantizers pass gradients on beyond the range.
        self.clamps_through = any(isinstance(part, TensorClampSte) for part in proxy.modules())
        zero_point = proxy.zero_point()
        self.register_buffer("zero_point", zero_point.detach().clone() if bool((zero_point != 0).any()) else None)
        # Where a shift in front follows the scale: the input that keeps its code, ``(1, 1, channels)``.
        self.register_buffer("pivot", None)
        # While quantization is dropped (quantization_dropped): the probability that a token passes as it is, ``()``.
        self.register_buffer("dropped", None)
        if not torch.equal((self.value.detach() / self.divisor).reshape(self.shape), scale.detach()):
            raise ModelError(f"{type(proxy).__name__}: the scale is not its parameter divided by a whole number.")

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.value / self.divisor).reshape(self.shape)
        x32 = x.float()
        if self.pivot is not None:
            # Zero, but gives the scale the gradient of the shift that follows it (scales_turn).
            shift = self.pivot * (1 - self.value / self.value.detach()).reshape(self.shape)
            x32 = x32 - shift
        level = x32 / scale
        if self.zero_point is not None:
            level = level + self.zero_point
        level = self._code(level)
        if self.zero_point is not None:
            level = level - self.zero_point
        output = level * scale
        if self.pivot is not None:
            output = output + shift
        if self.dropped is not None:
            dropped = (torch.rand(x.shape[:-1], device=x.device).unsqueeze(-1) < self.dropped).float()
            output = dropped * x.float() + (1 - dropped) * output  # as torch.where, see _code
        return output.to(x.dtype)

    def _code(self, level: Tensor) -> Tensor:
        """``level`` rounded and clamped, with the gradient of ``level`` where it may pass.

        Without comparisons: compiled code would keep their results for the backward pass, and writes and reads booleans
        several times slower on a CPU than it computes all the rest.
        """
        rounded = level.detach().round()
        code = rounded.clamp(self.low, self.high)
        if not torch.is_grad_enabled():
            return code
        passed = level - level.detach()  # zero
        if not self.clamps_through:
            # Whole numbers, so 0 beyond the range and 1 inside; torch.clamp's own gradient is cut on its ends, too.
            passed = passed * (1 - (rounded - code).abs().clamp(max=1))
        return code + passed


class _TrainableLayer(nn.Module):
    """A quantized Linear or Conv2d that shares its parameters with the Brevitas layer."""

    input_mean: Tensor | None

    def __init__(self, layer: QuantWeightBiasInputOutputLayer):
        super().__init__()
        self.input_quant = _learned(layer.input_quant)
        self.weight_quant = _learned(layer.weight_quant)
        self.weight, self.bias = layer.weight, layer.bias
        mean = getattr(layer, "input_mean", None)
        self.register_buffer("input_mean", mean if mean is not None and bool((mean != 0).any()) else None)
        self.shifted: tuple[Tensor, ...] = ()
        self.is_linear = isinstance(layer, nn.Linear)
        if not self.is_linear:
            self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.input_quant(x), self.weight_quant(self.weight)
        if not self.is_linear:
            return F.conv2d(x, weight, self.bias, *self.geometry)
        bias = self.bias
        if self.input_mean is not None:
            # Worth nothing, but gives the weight the gradient for inputs less their mean, as biases follow it.
            bias = bias - F.linear(self.input_mean, weight - weight.detach())
        return F.linear(x, weight, bias)

    def mean_output(self) -> Tensor:
        """What the mean of the inputs gives with the present weight, ``(out_features,)``."""
        assert self.input_mean is not None  # biases_follow takes no others
        return F.linear(self.input_mean, self.weight_quant(self.weight))


@contextmanager
def biases_follow(twin: nn.Module) -> Iterator[None]:
    """Around an optimiser's step: biases take up what the step of the weights does to the mean output of a layer.

    A shifted input has a large mean. Without this every code that a weight changes would move the output's mean, which
    its bias would have to learn again (on ViT-Tiny at w4a4 rounding fc2's weights alone costs 0.6 nats, 0.1 with the
    mean taken off).
    """
    layers = [part for part in twin.modules() if isinstance(part, _TrainableLayer) and part.input_mean is not None]
    with torch.no_grad():
        before = [layer.mean_output() for layer in layers]
        yield
        for layer, part in zip(layers, before, strict=True):
            layer.bias -= layer.mean_output() - part


def set_pivots(twin: nn.Module, quant_model: nn.Module) -> None:
    """Let the scales of shifted channels turn about a value that matters instead of about the middle of their grid.

    A shifted channel has its grid around the middle of its range, and what most tokens hold there (zero, for a GELU)
    lies seven steps away: a change of the scale would move it by seven times as much, in all channels at once, and what
    comes out of the layer with it. On ViT-Tiny at w4a4 the loss rises after 50 steps if scales learn like that. So a
    shift follows each scale, such that zero keeps its code behind an activation function, and the mean behind a
    LayerNorm.

    :func:`scales_turn` moves the shifts. A place that several layers read is left as it is: their scales differ.

    Args:
        twin: of ``quant_model``, see :func:`training_twin`.
        quant_model: calibrated; tells where channels are shifted.
    """
    for place in channel_places(quant_model):
        layer = twin.get_submodule(place.consumers[0])
        if len(place.consumers) > 1 or not isinstance(layer, _TrainableLayer):
            continue
        quantizer = layer.input_quant
        if not isinstance(quantizer, LearnedQuantize) or quantizer.value.numel() == 1:
            continue
        shifted: Tensor
        point: Tensor | None
        if place.norm is None:
            shifted = point = cast(ChannelAffine, twin.get_submodule(place.slot or "")).offset
        else:
            shifted, point = cast(nn.LayerNorm, twin.get_submodule(place.norm)).bias, layer.input_mean
        if point is not None:
            quantizer.pivot = point.detach().clone().reshape(quantizer.shape)
            layer.shifted = (shifted,)  # in a tuple, or it would become a parameter of the layer


@contextmanager
def scales_turn(twin: nn.Module) -> Iterator[None]:
    """Around a change of scales: the shifts of the channels follow (:func:`set_pivots`), and the biases behind them."""
    layers = [part for part in twin.modules() if isinstance(part, _TrainableLayer) and part.shifted]
    quantizers = [cast(LearnedQuantize, layer.input_quant) for layer in layers]
    before = [quantizer.value.detach().clone() for quantizer in quantizers]
    yield
    with torch.no_grad():
        for layer, quantizer, old in zip(layers, quantizers, before, strict=True):
            assert quantizer.pivot is not None  # set_pivots sets both
            shift = quantizer.pivot.flatten() * (1 - (quantizer.value / old).flatten())
            quantizer.pivot -= shift.reshape(quantizer.shape)
            layer.shifted[0].sub_(shift)
            layer.bias += F.linear(shift, layer.weight_quant(layer.weight))
            if layer.input_mean is not None:
                layer.input_mean -= shift


def training_twin(quant_model: nn.Module) -> nn.Module:
    """A model with the parameters of a calibrated quant model (the same objects), equal to it in evaluation mode.

    Raises:
        ModelError: if a layer or quantizer has a form that is not known here; train the quant model itself then.
    """
    shared = {id(tensor): tensor for tensor in (*quant_model.parameters(), *quant_model.buffers())}
    twin = copy.deepcopy(quant_model, shared)
    for name, module in list(quant_model.named_modules()):
        if isinstance(module, QuantWeightBiasInputOutputLayer):
            check_layer(name, module, (QuantLinear, QuantConv2d))
            part: nn.Module = _TrainableLayer(module)
        elif isinstance(module, QuantIdentity):
            part = _learned(module.act_quant)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, part)
    return twin.eval()


@contextmanager
def quantization_dropped(twin: nn.Module) -> Iterator[Tensor]:
    """A context in which activation quantizers of fewer than 8 bits let tokens pass unrounded, drawn at random.

    QDrop (Wei et al., ICLR 2022) does so with single elements: what is tuned on few images then holds on others better.
    Random numbers are torch's global ones. Inputs of layers other than linear ones are always rounded.

    Args:
        twin: see :func:`training_twin`.

    Yields:
        The probability, ``()``, 0 at first: fill it before a forward pass.
    """
    layers = [part for part in twin.modules() if isinstance(part, _TrainableLayer)]
    kept = {part.weight_quant for part in layers} | {part.input_quant for part in layers if not part.is_linear}
    quantizers = [part for part in twin.modules() if isinstance(part, LearnedQuantize) and part not in kept]
    quantizers = [part for part in quantizers if part.high - part.low < 2**8 - 2]
    share = torch.zeros((), device=next(twin.parameters()).device)
    try:
        for quantizer in quantizers:
            quantizer.dropped = share
        yield share
    finally:
        for quantizer in quantizers:
            quantizer.dropped = None


def compile_blocks(model: nn.Module) -> None:
    """Let ``torch.compile`` fuse each transformer block of ``model``, in place; equal blocks are compiled once.

    Where compilation fails (no C++ compiler on the machine, say) the block runs as before, and a warning says so.
    Hooks on modules *inside* a block would be lost: compile only models that nobody taps there.

    Warns:
        CompilationWarning: at the first call, if compilation fails.
    """
    for name in block_names(model):
        block = model.get_submodule(name)
        block.forward = _Compiled(block.forward)


class _Compiled:
    """A function that is compiled at its first call, and stays as it is if that fails."""

    failed = False

    def __init__(self, function: Callable[..., Any]):
        self.plain = function
        self.compiled = torch.compile(function)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not _Compiled.failed:
            try:
                return self.compiled(*inputs, **named)
            except Exception as error:  # every backend raises its own; an error of the function itself comes again
                result = self.plain(*inputs, **named)
                _Compiled.failed = True
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(
                    f"torch.compile failed, so the blocks run uncompiled, about two times slower: {reason}",
                    CompilationWarning, stacklevel=2,
                )  # fmt: skip
                return result
        return self.plain(*inputs, **named)


def _learned(proxy: QuantProxyFromInjector) -> nn.Module:
    return LearnedQuantize(proxy) if proxy.is_quant_enabled else nn.Identity()
