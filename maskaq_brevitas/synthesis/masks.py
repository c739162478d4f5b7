"""Informative regions: which patches an image's meaning sits in, by the attention they receive (METHOD.md, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskaq_brevitas.errors import InputError

__all__ = ["drop_at_random", "informative_mask", "mask_share", "received_attention"]


def received_attention(attention: Sequence[Tensor], prefix: int, class_token: bool) -> Tensor:
    """Head-mean attention that each patch receives: the class token's row, or the column mean without one.

    Args:
        attention: one ``(batch, heads, tokens, tokens)`` per layer.
        prefix: tokens before the patches.
        class_token: whether token 0 is a class token.

    Returns:
        ``(layers, batch, patches)`` in float32.
    """
    if class_token:
        rows = [layer[:, :, 0, prefix:] for layer in attention]
    else:
        rows = [layer[:, :, prefix:, prefix:].mean(dim=2) for layer in attention]
    return torch.stack([row.float().mean(dim=1) for row in rows])


def informative_mask(received: Tensor, share: float) -> Tensor:
    """The patches that receive most attention.

    Args:
        received: ``(..., patches)``.
        share: of the patches that count as informative, in (0, 1]; at least one patch is selected.

    Returns:
        Boolean mask of the same shape with ``max(1, round(share * patches))`` patches set per row.

    Raises:
        InputError: if ``share`` is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"share: expected a number in (0, 1], got {share}.")
    count = max(1, round(share * received.shape[-1]))
    top = received.topk(count, dim=-1).indices
    return torch.zeros_like(received, dtype=torch.bool).scatter_(-1, top, True)


def mask_share(progress: float, start: float, end: float) -> float:
    """Share of informative patches at ``progress`` (0 at the first iteration, 1 at the last): linear in between."""
    return start + (end - start) * progress


def drop_at_random(mask: Tensor, share: float, drawn: Tensor) -> Tensor:
    """``mask`` with about ``share`` of its selected patches dropped, each by its own draw.

    A row that would lose all its patches keeps them.

    Args:
        mask: boolean, ``(..., patches)``.
        share: probability of dropping a patch, in [0, 1).
        drawn: uniform random numbers in [0, 1), of the shape of ``mask``.
    """
    kept = mask & (drawn >= share).to(mask.device)
    return torch.where(kept.any(dim=-1, keepdim=True), kept, mask)
