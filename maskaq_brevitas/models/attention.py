"""Attention written out, with a named module at every place that others want to read or to quantize.

A foreign attention module hides its logits and probabilities inside ``forward`` (or inside a fused kernel). Its
*explicit* form shares the parameters, computes the same function, and calls one module per matmul operand. A tap
hooks these modules; the quantized twin of :mod:`maskaq_brevitas.quant.attention` puts quantizers there.
"""

from __future__ import annotations

from typing import Any
from typing import ClassVar
from typing import cast

import torch
from torch import Tensor
from torch import nn

__all__ = ["ChannelAffine", "ExplicitAttention", "Tap", "additive_mask", "joined_linear", "plain_linear"]


class ChannelAffine(nn.Module):
    """``x * multiplier + offset`` per channel of the last axis; starts as identity.

    It stands where the channels of an activation are brought to one range before a per-tensor quantizer; the linear
    layer behind holds the inverse.
    """

    multiplier: Tensor
    offset: Tensor

    def __init__(self, channels: int, **factory: Any):
        super().__init__()
        self.register_buffer("multiplier", torch.ones(channels, **factory))
        self.register_buffer("offset", torch.zeros(channels, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.multiplier + self.offset


class Tap(nn.Module):
    """Identity that hands on what passes to listeners: lists that a value is appended to.

    A listener is no hook, so a compiled block keeps its taps: only the call that tells them is left out of its graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[list[Tensor]] = []

    @property
    def is_open(self) -> bool:
        """Whether anybody listens."""
        return bool(self.listeners)

    def open(self, listener: list[Tensor]) -> None:
        """Tell ``listener`` of each value from now on."""
        self.listeners.append(listener)

    def close(self, listener: list[Tensor]) -> None:
        """Tell it no more."""
        self.listeners = [kept for kept in self.listeners if kept is not listener]

    def forward(self, x: Tensor) -> Tensor:
        if self.is_open:
            self._tell(x)
        return x

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _tell(self, x: Tensor) -> None:
        for listener in self.listeners:
            listener.append(x)


class ExplicitAttention(nn.Module):
    """What every attention module looks like once it is written out; families derive from it.

    Shapes: ``query`` sees ``(batch, heads, queries, head_dim)``, ``key`` and ``value`` ``(batch, heads, keys,
    head_dim)``; ``logits``, ``attention`` (behind the softmax) and ``probabilities`` see ``(batch, heads, queries,
    keys)``, ``context`` ``(batch, heads, queries, head_dim)``. Where attention stays inside windows, ``batch`` counts
    windows: all of the first image, then all of the second. ``logits``, ``attention`` and ``context`` are taps. The
    logits are ``scale * q k^T``, before any position bias or mask: the scale sits on q.

    Parameters are shared with the source. What the source joins or computes from parameters alone in every pass (biases
    of q and v that it keeps apart, a table of position biases) may be a copy of its own.

    Attributes:
        scale: a number, or one per head, ``(heads, 1, 1)``.
        mixes_probabilities: whether the second operand of the context is a mixture of softmax outputs, of any sign.
        unsigned_layers: names of linear children whose input is a softmax output.
    """

    scale: float | Tensor
    mixes_probabilities: ClassVar[bool] = False
    unsigned_layers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, source: nn.Module, num_heads: int | None = None):
        super().__init__()
        self.num_heads = cast(int, source.num_heads) if num_heads is None else num_heads
        self.training = source.training

    def add_places(self, attn_drop: nn.Module | None = None) -> None:
        """Make the operands and taps; subclasses call it behind the layers that come first in the data flow."""
        self.query = nn.Identity()
        self.key = nn.Identity()
        self.value = nn.Identity()
        self.logits = Tap()
        self.softmax = nn.Softmax(dim=-1)
        self.attention = Tap()
        self.probabilities = nn.Identity()
        self.attn_drop = nn.Identity() if attn_drop is None else attn_drop
        self.context = Tap()
        self.train(self.training)

    def heads(self, x: Tensor, parts: int = 1) -> Tensor:
        """``(batch, tokens, parts * heads * head_dim)`` to ``(parts, batch, heads, tokens, head_dim)``."""
        batch, tokens, _ = x.shape  # unpacked like this, Brevitas' tracer can follow
        return x.reshape(batch, tokens, parts, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention of scaled queries; ``(batch, heads, tokens, head_dim)`` each.

        Args:
            bias: added to the logits, ``(heads or 1, queries, keys)``, or one for each window of an image,
                ``(windows, heads or 1, queries, keys)``.

        Returns:
            ``(batch, queries, heads * head_dim)``.
        """
        q, k, v = self.query(q), self.key(k), self.value(v)
        logits = self.mix_logits(self.logits(q @ k.transpose(-2, -1)))
        if bias is not None and bias.ndim == 4 and bias.shape[0] > 1:
            logits = (logits.unflatten(0, (-1, bias.shape[0])) + bias).flatten(0, 1)
        elif bias is not None:
            logits = logits + bias
        attention = self.mix_probabilities(self.attention(self.softmax(logits)))
        context = self.context(self.attn_drop(self.probabilities(attention)) @ v)
        return context.transpose(1, 2).flatten(2)

    def mix_logits(self, logits: Tensor) -> Tensor:
        """What happens to the logits before biases are added; nothing in most families."""
        return logits

    def mix_probabilities(self, attention: Tensor) -> Tensor:
        """What happens behind the softmax; nothing in most families."""
        return attention


def additive_mask(mask: Tensor | None, is_causal: bool, like: Tensor) -> Tensor | None:
    """timm's two ways to mask, as one addend of the logits, in the dtype of ``like``.

    Args:
        mask: boolean (True = attend) or additive, or None.
        is_causal: a token sees those in front of it only; takes precedence.
        like: of the tokens, ``(batch, tokens, channels)``.
    """
    if is_causal:
        return like.new_full((like.shape[1], like.shape[1]), float("-inf")).triu_(1)
    if mask is None or mask.dtype.is_floating_point:
        return mask
    return like.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))


def joined_linear(weight: Tensor, *biases: Tensor) -> nn.Linear:
    """A linear layer of a shared weight and of biases that its owner keeps apart; these are copied."""
    bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=weight.requires_grad)
    return plain_linear(weight, bias)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of a weight, ``(out_features, in_features)``, and a bias that exist; they are shared."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight, layer.bias = cast(nn.Parameter, weight), cast(nn.Parameter, bias)
    return layer
