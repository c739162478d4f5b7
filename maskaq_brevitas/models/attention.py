"""Attention written out, with a named module at every place that others want to read or to quantize.

A foreign attention module hides its logits and probabilities inside ``forward`` (or inside a fused kernel). Its
*explicit* form shares the parameters, computes the same function, and calls one module per matmul operand. A tap
hooks these modules; the quantized twin of :mod:`maskaq_brevitas.quant.attention` puts quantizers there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ChannelAffine", "ExplicitAttention", "Tap"]


class ChannelAffine(nn.Module):
    """``x * multiplier + offset`` per channel of the last axis; starts as identity.

    It stands where the channels of an activation are brought to one range before a per-tensor quantizer; the linear
    layer behind holds the inverse.
    """

    multiplier: Tensor
    offset: Tensor

    def __init__(self, channels: int, **factory):
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

    @torch.compiler.disable
    def _tell(self, x: Tensor) -> None:
        for listener in self.listeners:
            listener.append(x)


class ExplicitAttention(nn.Module):
    """timm's ``Attention`` (ViT, DeiT, DINOv2, augreg, SigLIP ...), written out.

    Shapes: input and output ``(batch, tokens, dim)``; ``query``, ``key``, ``value`` and ``context`` see
    ``(batch, heads, tokens, head_dim)``; ``logits``, ``attention`` (behind the softmax) and ``probabilities`` see
    ``(batch, heads, tokens, tokens)``. ``logits``, ``attention`` and ``context`` are taps. The logits are
    q k^T / sqrt(head_dim): the scale sits on q.

    Args:
        source: the foreign module; its sub-modules are shared, not copied.
    """

    def __init__(self, source: nn.Module):
        super().__init__()
        self.num_heads: int = source.num_heads
        self.head_dim: int = source.head_dim
        self.scale: float = source.scale
        self.qkv = source.qkv
        self.q_norm = source.q_norm
        self.k_norm = source.k_norm
        self.query = nn.Identity()
        self.key = nn.Identity()
        self.value = nn.Identity()
        self.logits = Tap()
        self.softmax = nn.Softmax(dim=-1)
        self.attention = Tap()
        self.probabilities = nn.Identity()
        self.attn_drop = source.attn_drop
        self.context = Tap()
        # Both came to timm during 1.0.x.
        self.norm = getattr(source, "norm", None) or nn.Identity()
        self.gate = getattr(source, "gate", None)
        self.proj = source.proj
        self.proj_drop = source.proj_drop
        self.training = source.training

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        # (batch, tokens, 3 * heads * head_dim) -> 3 x (batch, heads, tokens, head_dim)
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = self.query(self.q_norm(q) * self.scale)
        k = self.key(self.k_norm(k))
        v = self.value(v)
        logits = self.logits(q @ k.transpose(-2, -1))
        if is_causal:
            logits = logits + logits.new_full((tokens, tokens), float("-inf")).triu_(1)
        elif attn_mask is not None:
            logits = logits + _additive(attn_mask, logits)
        attention = self.attn_drop(self.probabilities(self.attention(self.softmax(logits))))
        context = self.context(attention @ v)
        # (batch, heads, tokens, head_dim) -> (batch, tokens, heads * head_dim)
        x = self.norm(context.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A boolean mask (True = attend) as an additive one, in the dtype of ``like``."""
    if mask.dtype.is_floating_point:
        return mask
    return like.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
