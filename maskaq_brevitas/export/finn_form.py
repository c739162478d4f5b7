"""A quant model written out as FINN wants it: the same codes everywhere, in a graph that maps to hardware operators.

FINN takes less than Brevitas computes. The restrictions that cost accuracy (signed quantizers without zero point, one
scale per tensor, patch tokens on an integer grid) belong to the schemes ``finn-wXaY``, so that calibration and tuning
see them. What is left is a matter of form, and is done here, on a copy:

- the fused qkv becomes three linear layers behind one quantizer, and 1/sqrt(head_dim) goes into those of q;
- that quantizer has scale 1, and its own scale goes into the three weights: FINN moves scales past matmuls, not forks;
- the batch is 1, and the heads are the leading dimension of the attention matmuls;
- the affine part of a LayerNorm follows it as a multiplication and an addition: in one node with it, FINN drops the
  bias;
- prefix tokens are inserted as zeros on the integer grid of the patch tokens; their values sit in the position
  embedding;
- each weight is the value that it is quantized to.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any
from typing import Literal
from typing import Protocol
from typing import cast

import torch
from brevitas.inject.enum import ScalingImplType
from brevitas.nn import QuantConv2d
from brevitas.nn import QuantIdentity
from brevitas.nn import QuantLinear
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from brevitas.quant import Int8ActPerTensorFloat
from brevitas.quant import Int8WeightPerChannelFloat
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.export.brevitas_onnx import export_copy
from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.families import EXPLICIT_FORMS
from maskaq_brevitas.quant.attention import OPERANDS
from maskaq_brevitas.quant.snapshot import integer_bounds

__all__ = ["Cut", "finn_form"]

#: The part of the model that is exported: from the image to the logits, or from the embedded tokens to those behind the
#: last block.
Cut = Literal["full", "encoder"]

_SHOWN = 5


@torch.no_grad()
def finn_form(quant_model: nn.Module, cut: Cut = "full") -> nn.Module:
    """A module that computes what a quant model computes for one image, in the form that FINN maps.

    Args:
        quant_model: a timm ``VisionTransformer``, quantized by a scheme ``finn-wXaY`` and calibrated; it is copied.
        cut: ``"full"`` takes ``(1, channels, height, width)`` and gives logits ``(1, classes)``; ``"encoder"`` takes
            tokens ``(1, tokens, dim)`` and gives those behind the last block (in front of the last norm).

    Returns:
        The module in evaluation mode, on the CPU, in float32.

    Raises:
        ExportError: the model has parts without a form for FINN, or quantizers that FINN does not take; they are named.
    """
    model = export_copy(quant_model)
    problems = list(_problems(model, cut))
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ExportError(
            f"Expected a model that FINN takes, got one it does not: {'; '.join(problems[:_SHOWN])}{more}. "
            "Quantize with a scheme finn-wXaY (--target finn)."
        )
    known = cast(VisionTransformer, model)
    return (_Full(known) if cut == "full" else _Encoder(known)).eval()


class _Norm(nn.Module):
    """A LayerNorm over the last axis whose affine part follows it."""

    ones: Tensor
    zeros: Tensor

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        # FINN takes a node only with both.
        self.register_buffer("ones", torch.ones(self.shape))
        self.register_buffer("zeros", torch.zeros(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, self.shape, self.ones, self.zeros, self.eps)
        if self.weight is not None:
            x = x * self.weight
        return x if self.bias is None else x + self.bias


class _Attention(nn.Module):
    """Self-attention on ``(1, tokens, dim)`` with three linear layers."""

    input_scale: Tensor
    q: QuantLinear
    k: QuantLinear
    v: QuantLinear
    query: QuantIdentity
    key: QuantIdentity
    value: QuantIdentity
    probabilities: QuantIdentity

    def __init__(self, source: ExplicitAttention):
        super().__init__()
        qkv: QuantLinear = source.qkv
        self.heads, self.head_dim = source.num_heads, qkv.out_features // (3 * source.num_heads)
        self.register_buffer("input_scale", qkv.input_quant.scale().detach().reshape(()))
        self.input = _activation(qkv.input_quant, scale=1.0)
        codes, scale = _codes(qkv)
        width, bias = self.heads * self.head_dim, qkv.bias
        for index, (name, factor) in enumerate((("q", source.scale), ("k", 1.0), ("v", 1.0))):
            rows = slice(index * width, (index + 1) * width)
            part = None if bias is None else bias[rows] * factor
            setattr(self, name, _linear(qkv, codes[rows], scale[rows] * factor * self.input_scale, part))
        for name in OPERANDS:
            setattr(self, name, _activation(getattr(source, name).act_quant))
        self.softmax = nn.Softmax(dim=-1)
        self.proj = _layer(source.proj)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        x = self.input(x / self.input_scale)
        split = (tokens, self.heads, self.head_dim)
        q = self.query(self.q(x)).reshape(split).permute(1, 0, 2)  # (heads, tokens, head_dim)
        k = self.key(self.k(x)).reshape(split).permute(1, 2, 0)  # (heads, head_dim, tokens)
        v = self.value(self.v(x)).reshape(split).permute(1, 0, 2)
        context = self.probabilities(self.softmax(q @ k)) @ v
        return self.proj(context.permute(1, 0, 2).reshape(1, tokens, self.heads * self.head_dim))


class _KnownBlock(Protocol):
    """What :func:`_block_problems` lets through: timm's ``Block``, its attention written out and its layers quantized.
    """

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    attn: ExplicitAttention
    mlp: Mlp
    ls1: nn.Module
    ls2: nn.Module


class _Block(nn.Module):
    """A transformer block on ``(1, tokens, dim)``."""

    def __init__(self, block: _KnownBlock):
        super().__init__()
        self.norm1, self.attn, self.ls1 = _Norm(block.norm1), _Attention(block.attn), block.ls1
        self.norm2, self.ls2 = _Norm(block.norm2), block.ls2
        self.fc1, self.act, self.norm, self.fc2 = (
            _layer(block.mlp.fc1),
            block.mlp.act,
            block.mlp.norm,
            _layer(block.mlp.fc2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.fc2(self.norm(self.act(self.fc1(self.norm2(x))))))


class _Stem(nn.Module):
    """Image ``(1, channels, height, width)`` -> embedded tokens ``(1, tokens, dim)``."""

    scale: Tensor
    zeros: Tensor
    position: Tensor

    def __init__(self, model: VisionTransformer):
        super().__init__()
        self.proj = _layer(model.patch_embed.proj)
        grid: QuantProxyFromInjector = model.patch_embed.norm.act_quant
        self.register_buffer("scale", grid.scale().detach().reshape(()))
        self.register_buffer("zeros", torch.zeros(1, model.num_prefix_tokens, model.embed_dim))
        # FINN joins streams of one integer type only, so both operands get a quantizer of scale 1.
        self.prefix_codes, self.patch_codes = (_activation(grid, scale=1.0) for _ in range(2))
        self.register_buffer("position", _position(model))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_codes(self.proj(x).flatten(2).transpose(1, 2) / self.scale)
        if self.zeros.shape[1]:
            x = torch.cat([self.prefix_codes(self.zeros), x], dim=1)
        return x * self.scale + self.position


class _Encoder(nn.Module):
    """Embedded tokens ``(1, tokens, dim)`` -> tokens behind the last block, ``(1, tokens, dim)``."""

    def __init__(self, model: VisionTransformer):
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(block) for block in cast(Iterable[_KnownBlock], model.blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class _Full(nn.Module):
    """Image ``(1, channels, height, width)`` -> logits ``(1, classes)``."""

    def __init__(self, model: VisionTransformer):
        super().__init__()
        self.stem, self.encoder = _Stem(model), _Encoder(model)
        # Both norms work token by token, so the one token that is read is picked in front of them.
        norms = [norm for norm in (model.norm, model.fc_norm) if isinstance(norm, nn.LayerNorm)]
        self.norms = nn.Sequential(*(_Norm(norm) for norm in norms))
        self.head = _layer(model.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norms(self.encoder(self.stem(x))[:, 0]))


def _position(model: VisionTransformer) -> Tensor:
    """What is added to the tokens once zeros stand for the prefix tokens, ``(1, tokens, dim)``."""
    prefix = [token for token in (model.cls_token, model.reg_token) if token is not None]
    tokens = torch.cat([*prefix, torch.zeros(1, model.patch_embed.num_patches, model.embed_dim)], dim=1)
    if model.pos_embed is None:
        return tokens
    # Some models add it to the patch tokens only.
    missing = tokens.shape[1] - model.pos_embed.shape[1]
    return tokens + F.pad(model.pos_embed, (0, 0, missing, 0))


def _codes(layer: QuantLinear | QuantConv2d) -> tuple[Tensor, Tensor]:
    """Integer codes of a weight, and the scale of each output channel, ``(channels, 1 ...)``."""
    weight, scale = layer.quant_weight(), layer.weight_quant.scale()
    weight = getattr(weight, "value", weight).detach()
    scale = scale.detach().expand(len(weight), *(1,) * (weight.ndim - 1))
    return (weight / scale).round(), scale


def _layer(layer: QuantLinear | QuantConv2d) -> nn.Module:
    """A quantized layer with its input quantizer in front."""
    return nn.Sequential(_activation(layer.input_quant), _linear(layer, *_codes(layer), layer.bias))


def _linear(
    source: QuantLinear | QuantConv2d, codes: Tensor, scale: Tensor, bias: Tensor | None
) -> QuantLinear | QuantConv2d:
    """A Brevitas layer like ``source``, without input quantizer, whose weight is ``codes * scale``, on that very grid.
    """
    quantizers: dict[str, Any] = dict(
        weight_quant=Int8WeightPerChannelFloat.let(**_grid(source.weight_quant, scale)),
        input_quant=None, bias_quant=None, return_quant_tensor=False, bias=bias is not None,
    )  # fmt: skip
    if isinstance(source, nn.Linear):
        layer = QuantLinear(codes.shape[1], codes.shape[0], **quantizers)
    else:
        layer = QuantConv2d(
            source.in_channels, source.out_channels, source.kernel_size, stride=source.stride, padding=source.padding,
            dilation=source.dilation, groups=source.groups, **quantizers,
        )  # fmt: skip
    layer.weight.data = codes * scale
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer


def _activation(proxy: QuantProxyFromInjector, scale: float | None = None) -> QuantIdentity:
    """A quantizer with the codes of ``proxy``, and its scale or another."""
    grid = _grid(proxy, float(proxy.scale()) if scale is None else scale)
    return QuantIdentity(act_quant=Int8ActPerTensorFloat.let(**grid), return_quant_tensor=False)


def _grid(proxy: QuantProxyFromInjector, scale: Tensor | float) -> dict[str, Any]:
    """Arguments of a Brevitas quantizer with the integers of ``proxy`` and a fixed scale."""
    low, high = integer_bounds(proxy)
    narrow = low == -high
    # Brevitas divides what it is given by the largest code's absolute value.
    return dict(
        bit_width=int(proxy.bit_width()), narrow_range=narrow, scaling_impl_type=ScalingImplType.CONST,
        scaling_init=scale * (high if narrow else -low),
    )  # fmt: skip


def _problems(model: nn.Module, cut: Cut) -> Iterator[str]:
    """What FINN, or this form, does not take: one text each, with the way round where there is one."""
    if type(model) is not VisionTransformer:  # a subclass computes something else
        yield f"{type(model).__name__} is no timm VisionTransformer"
        return
    for name, block in model.blocks.named_children():
        yield from (f"blocks.{name}.{text}" for text in _block_problems(block))
    if cut == "full":
        if model.global_pool != "token" or model.attn_pool is not None:
            yield f"pooling {model.global_pool!r} has no operator (take the cut 'encoder')"
        if not isinstance(model.norm_pre, nn.Identity) or model.patch_embed.proj.padding_mode != "zeros":
            yield "a norm in front of the blocks or a padded patch embedding has no form here (take the cut 'encoder')"
        grid = getattr(model.patch_embed.norm, "act_quant", None)
        if grid is None:
            yield "patch_embed.norm: patch tokens are not quantized, so the class token cannot be joined to them"
        else:
            yield from _quantizer_problems("patch_embed.norm", grid)
        for name in ("patch_embed.proj", "head"):
            yield from _layer_problems(name, model.get_submodule(name))


def _block_problems(block: nn.Module) -> Iterator[str]:
    if type(block) is not Block or type(block.attn) is not EXPLICIT_FORMS[Attention] or type(block.mlp) is not Mlp:
        yield f": {type(block).__name__} with {type(block.attn).__name__} has no form for FINN"
        return
    for part in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(block.attn, part, None), (nn.Identity, type(None))):
            yield f"attn.{part}: a norm inside attention has no form for FINN"
    if getattr(block.attn, "gate", None) is not None:
        yield "attn.gate: gated attention has no form for FINN"
    if not isinstance(block.mlp.act, (nn.ReLU, nn.GELU)) or getattr(block.mlp.act, "approximate", "none") != "none":
        yield f"mlp.act: {block.mlp.act} has no operator (GELU without approximation and ReLU have)"
    for part in ("norm1", "norm2"):
        if not isinstance(getattr(block, part), nn.LayerNorm):
            yield f"{part}: {type(getattr(block, part)).__name__} has no operator (LayerNorm has)"
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        yield from _layer_problems(part, block.get_submodule(part))
    for part in OPERANDS:
        yield from _quantizer_problems(f"attn.{part}", getattr(getattr(block.attn, part), "act_quant", None))


def _layer_problems(name: str, layer: nn.Module) -> Iterator[str]:
    if not isinstance(layer, (QuantLinear, QuantConv2d)):
        yield f"{name}: {type(layer).__name__} is not quantized"
        return
    yield from _quantizer_problems(f"{name} input", layer.input_quant)
    weight = layer.weight_quant
    if not weight.is_quant_enabled or not weight.is_signed or bool((layer.quant_weight().zero_point != 0).any()):
        yield f"{name} weight: expected signed integers without zero point"


def _quantizer_problems(name: str, proxy: QuantProxyFromInjector | None) -> Iterator[str]:
    if proxy is None or not proxy.is_quant_enabled:
        yield f"{name}: not quantized"
    elif not proxy.is_signed:
        yield f"{name}: unsigned"
    elif proxy.scale() is None or proxy.scale().numel() != 1:
        yield f"{name}: expected one static scale, got one per channel or token"
    elif bool((proxy.zero_point() != 0).any()):
        yield f"{name}: zero point {round(float(proxy.zero_point().flatten()[0]))}"
