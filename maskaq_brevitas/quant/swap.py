"""Float model -> quant model, by swapping modules. Nothing is skipped in silence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any
from typing import cast

import torch
from brevitas.nn import QuantConv2d
from brevitas.nn import QuantIdentity
from torch import nn

from maskaq_brevitas.config import LayerBits
from maskaq_brevitas.config import Scheme
from maskaq_brevitas.config import parse_bits
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.errors import SkippedLayerWarning
from maskaq_brevitas.models.attention import ChannelAffine
from maskaq_brevitas.models.families import attention_modules
from maskaq_brevitas.models.families import channel_places
from maskaq_brevitas.models.families import classifier_layers
from maskaq_brevitas.models.families import embedding_pattern
from maskaq_brevitas.models.families import is_table
from maskaq_brevitas.models.families import layers_behind_activation
from maskaq_brevitas.models.families import unknown_attention_modules
from maskaq_brevitas.models.families import write_out
from maskaq_brevitas.models.families import written_out
from maskaq_brevitas.quant.attention import OPERANDS
from maskaq_brevitas.quant.attention import quantize_operands
from maskaq_brevitas.quant.linear import ChannelScaledLinear
from maskaq_brevitas.quant.linear import TokenLinear
from maskaq_brevitas.quant.schemes import ValueKind
from maskaq_brevitas.quant.schemes import activation_quantizer
from maskaq_brevitas.quant.schemes import weight_quantizer

__all__ = ["QuantizedPlace", "SkippedLayer", "SwapRecord", "plan_bits", "swap_layers", "with_layers_outside"]

_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class QuantizedPlace:
    """One quantized layer or matmul operand: its name, kind, and widths in bits (``weight_bits`` None: no weight)."""

    name: str
    kind: str
    weight_bits: int | None
    activation_bits: int


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that computes with weights and stays in float, and why."""

    name: str
    type_name: str
    reason: str


@dataclass(frozen=True)
class SwapRecord:
    """What a swap did: every quantized place in the model's order, and every layer left in float."""

    places: tuple[QuantizedPlace, ...]
    skipped: tuple[SkippedLayer, ...]


def plan_bits(
    model: nn.Module, scheme: Scheme, overrides: Mapping[str, str] | None = None
) -> dict[str, LayerBits]:
    """Widths of every place that can be quantized: layers by module name, operands as ``<attention>.<operand>``.

    Args:
        model: float model.
        scheme: nominal widths.
        overrides: shell pattern -> ``wXaY``; later patterns win. A pattern is compared with the names of layers
            (``blocks.0.mlp.fc2``), of attention modules (``blocks.0.attn``: all four operands) and of operands
            (``blocks.0.attn.probabilities``).

    Raises:
        ConfigurationError: if a pattern matches nothing, or a width is malformed.
        ModelError: if the model has no known attention.
    """
    head, embedding = _classifier_names(model), embedding_pattern(model)
    bits: dict[str, LayerBits] = {}
    for name, module in written_out(model):
        if type(module) in (nn.Linear, nn.Conv2d):
            if isinstance(module, nn.Conv2d) and fnmatchcase(name, embedding):
                bits[name] = scheme.patch_embed
            else:
                bits[name] = scheme.head if name in head else scheme.bits
    attentions = attention_modules(model)
    for name in attentions:
        for operand in OPERANDS:
            width = scheme.resolved_probability_bits if operand == "probabilities" else scheme.bits.activation
            bits[f"{name}.{operand}"] = LayerBits(scheme.bits.weight, width)

    if scheme.patch_tokens is not None:
        bits[_patch_tokens(model)] = LayerBits(scheme.patch_embed.weight, scheme.patch_tokens)

    for pattern, text in (overrides or {}).items():
        chosen = parse_bits(text)
        matched = [
            place
            for place in bits
            if fnmatchcase(place, pattern)
            or (place.rpartition(".")[0] in attentions and place.rpartition(".")[2] in OPERANDS
                and fnmatchcase(place.rpartition(".")[0], pattern))
        ]  # fmt: skip
        if not matched:
            examples = ", ".join(list(bits)[:4])
            raise ConfigurationError(
                f"The layer pattern {pattern!r} matches nothing in {type(model).__name__}. "
                f"Names look like: {examples} ... {next(reversed(bits))}."
            )
        bits.update(dict.fromkeys(matched, chosen))
    return bits


def swap_layers(
    model: nn.Module, scheme: str | Scheme = "w4a8", overrides: Mapping[str, str] | None = None
) -> tuple[nn.Module, SwapRecord]:
    """A quantized copy of ``model``: Linear and Conv2d layers, and both attention matmuls, on Brevitas quantizers.

    LayerNorm, softmax, activation functions and residual additions stay in float by design (METHOD.md, section 3).
    The model given is not changed, and its weights are not shared. Scales of activations are not set yet: calibrate.

    Args:
        model: float model of a registered family.
        scheme: a name or a :class:`~maskaq_brevitas.config.Scheme`.
        overrides: shell pattern -> ``wXaY``, see :func:`plan_bits`.

    Returns:
        The quant model in evaluation mode, and the record of what was swapped.

    Raises:
        ConfigurationError: unknown scheme, or a pattern that matches nothing.
        ModelError: if the model has no known attention, its family is refused, or there is no place for the scheme's
            quantizer of patch tokens.

    Warns:
        SkippedLayerWarning: names layers with weights that stay in float.
    """
    scheme = resolve_scheme(scheme)
    plan = plan_bits(model, scheme, overrides)
    skipped = tuple(_skipped_layers(model))
    quant_model = copy.deepcopy(model)
    attention_modules(quant_model)  # refuses a model without
    write_out(quant_model)
    attentions, names = attention_modules(quant_model), _names(quant_model)
    asymmetric = layers_behind_activation(quant_model) if scheme.gelu == "asymmetric" else set()
    unsigned = set()
    uneven = {name for place in channel_places(quant_model) for name in place.consumers}
    if scheme.equalize:
        # Equalised channels are centred: a signed quantizer without zero point fits them.
        asymmetric -= uneven
        _fill_slots(quant_model, names)
    places: list[QuantizedPlace] = []
    for name, module in attentions.items():
        widths = {operand: plan[f"{name}.{operand}"].activation for operand in OPERANDS}
        twin = quantize_operands(module, widths, scheme)
        unsigned |= {f"{name}.{child}" for child in twin.unsigned_layers}
    for name, bits in plan.items():
        if name.rpartition(".")[2] in OPERANDS and name.rpartition(".")[0] in attentions:
            places.append(QuantizedPlace(name, "operand", None, bits.activation))
            continue
        layer = quant_model.get_submodule(name)
        if isinstance(layer, nn.Identity):
            quantizer = activation_quantizer("signed", bits.activation, scheme)
            tokens = QuantIdentity(act_quant=quantizer, return_quant_tensor=False).train(layer.training)
            _replace(quant_model, names[layer], tokens)
            places.append(QuantizedPlace(name, "tokens", None, bits.activation))
            continue
        kind: ValueKind = "asymmetric" if name in asymmetric else scheme.softmax if name in unsigned else "signed"
        channels = None
        if isinstance(layer, nn.Linear) and name in uneven - asymmetric and scheme.input_scales == "channel":
            channels = layer.in_features
        _replace(quant_model, names[layer], _quantized_layer(layer, bits, kind, scheme, channels))
        title = "linear" if isinstance(layer, nn.Linear) else "convolution"
        places.append(QuantizedPlace(name, title, bits.weight, bits.activation))
    order = {name: index for index, (name, _) in enumerate(quant_model.named_modules())}
    places.sort(key=lambda place: order[place.name])
    if skipped:
        listed = "; ".join(f"{layer.name} ({layer.type_name}: {layer.reason})" for layer in skipped)
        warnings.warn(f"Left in float: {listed}.", SkippedLayerWarning, stacklevel=2)
    return quant_model.eval(), SwapRecord(tuple(places), skipped)


def with_layers_outside(record: SwapRecord, layers: Iterable[tuple[str, nn.Module]], backbone: str) -> SwapRecord:
    """The record of a backbone's swap, with the layers of the larger model that stay in float.

    Args:
        layers: by their names in the larger model.
        backbone: its name in the larger model.

    Warns:
        SkippedLayerWarning: names these layers.
    """
    reason = f"outside of the backbone {backbone!r}"
    outside = tuple(SkippedLayer(name, type(layer).__name__, reason) for name, layer in layers)
    if outside:
        names = ", ".join(f"{layer.name} ({layer.type_name})" for layer in outside)
        warnings.warn(f"Left in float, {reason}: {names}.", SkippedLayerWarning, stacklevel=3)
    return replace(record, skipped=(*record.skipped, *outside))


def _quantized_layer(
    layer: nn.Module, bits: LayerBits, kind: ValueKind, scheme: Scheme, channels: int | None
) -> nn.Module:
    """The Brevitas twin of a Linear or Conv2d; it takes over the parameters of ``layer``."""
    quantizers: dict[str, Any] = dict(
        weight_quant=weight_quantizer(bits.weight, scheme),
        input_quant=activation_quantizer(kind, bits.activation, scheme, channels),
        bias_quant=None,
        return_quant_tensor=False,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    # The constructors draw weights, which are thrown away: the caller's random state must not notice.
    device = layer.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if isinstance(layer, nn.Linear):
            kind_of_layer = TokenLinear if channels is None else ChannelScaledLinear
            twin: nn.Module = kind_of_layer(layer.in_features, layer.out_features, **quantizers)
        else:
            twin = QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding,
                dilation=layer.dilation, groups=layer.groups, padding_mode=layer.padding_mode, **quantizers,
            )  # fmt: skip
    for name, buffer in layer.named_buffers(recurse=False):
        twin.register_buffer(name, buffer)
    twin.weight = layer.weight
    if layer.bias is not None:
        twin.bias = layer.bias
    return twin.train(layer.training)


def _patch_tokens(model: nn.Module) -> str:
    """Name of the idle module between the patch embedding and the tokens, where these are quantized."""
    name = "patch_embed.norm"
    if not isinstance(getattr(getattr(model, "patch_embed", None), "norm", None), nn.Identity):
        raise ModelError(
            f"{type(model).__name__}: patch tokens cannot be quantized: expected an idle {name}, as a timm ViT has. "
            "Use a scheme without patch_tokens."
        )
    return name


def _fill_slots(model: nn.Module, names: dict[nn.Module, list[str]]) -> None:
    """Make room for equalisation: an identity :class:`ChannelAffine` in every slot, a bias in every consumer.

    Each consumer also gets two buffers that bias correction fills: ``input_mean``, ``(in_features,)``, the mean of its
    quantized input, and ``bias_correction``, ``(out_features,)``, what is in its bias for the rounding of the weight.
    """
    for place in channel_places(model):
        for name in place.consumers:
            layer = cast(nn.Linear, model.get_submodule(name))
            layer.register_buffer("input_mean", layer.weight.new_zeros(layer.in_features))
            layer.register_buffer("bias_correction", layer.weight.new_zeros(layer.out_features))
            if layer.bias is None:
                layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))
        if place.slot is not None:
            weight = cast(nn.Linear, model.get_submodule(place.consumers[0])).weight
            slot = names[model.get_submodule(place.slot)]
            _replace(model, slot, ChannelAffine(weight.shape[1], device=weight.device, dtype=weight.dtype))


def _classifier_names(model: nn.Module) -> set[str]:
    """Names of the final classifier layers (two for a distilled DeiT)."""
    heads = classifier_layers(model)
    return {name for name, module in model.named_modules() if any(module is head for head in heads)}


def _skipped_layers(model: nn.Module) -> Iterator[SkippedLayer]:
    """Layers that compute with a weight matrix, or attention matmuls, for which no twin is registered."""
    for name, module in unknown_attention_modules(model):
        yield SkippedLayer(name, type(module).__name__, "attention of an unregistered family, its matmuls stay float")
    for name, module in written_out(model):
        has_matrix = any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
        # Models hold tokens and position tables themselves; a layer with children (an adapter) is still a layer.
        is_layer = has_matrix and (isinstance(module, _LAYERS) or not any(True for _ in module.children()))
        if is_layer and type(module) not in (nn.Linear, nn.Conv2d) and not is_table(module):
            yield SkippedLayer(name, type(module).__name__, "no quantized twin for this type")


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of every module: layers may be shared."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _replace(model: nn.Module, names: list[str], module: nn.Module) -> None:
    """Put ``module`` in the place that has these names."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
