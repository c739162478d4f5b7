"""The terms of tuning objectives, as pure functions of tensors (METHOD.md, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from maskaq_brevitas.errors import InputError
from maskaq_brevitas.quant.grid import row_importance
from maskaq_brevitas.synthesis.objectives import feature_alignment_loss

__all__ = [
    "block_error", "centred_error", "context_distance", "output_divergence", "temperature_divergence", "token_weights"
]  # fmt: skip

_SSIM_C2 = 0.03**2


def temperature_divergence(float_logits: Tensor, quant_logits: Tensor, temperature: float = 5.0) -> Tensor:
    """``T^2 KL(softmax(P / T) || softmax(Q / T))``, mean over the batch (METHOD.md, L_Q).

    Args:
        float_logits: P, ``(batch, classes)``; the target.
        quant_logits: Q, of the same shape.
        temperature: T, above 0.

    Returns:
        A scalar, in nats times T^2.

    Raises:
        InputError: if the shapes differ.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> round(float(temperature_divergence(logits, logits.flip(-1), temperature=1.0)), 4)
        1.1504
    """
    if float_logits.shape != quant_logits.shape or float_logits.ndim != 2:
        raise InputError(
            f"Expected logits of one shape (batch, classes), got {tuple(float_logits.shape)} and "
            f"{tuple(quant_logits.shape)}. Pass the outputs of both models for the same images."
        )
    target = F.log_softmax(float_logits.float() / temperature, dim=-1)
    found = F.log_softmax(quant_logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(found, target, reduction="batchmean", log_target=True)


def output_divergence(float_output: Tensor, quant_output: Tensor, classes: bool, temperature: float = 5.0) -> Tensor:
    """How far the outputs of two networks lie apart: :func:`temperature_divergence` of logits, or of features their
    squared distance by the power of P's.

    Args:
        float_output, quant_output: ``(batch, outputs)``; features may have more dimensions.
        classes: whether they are logits.
        temperature: of the divergence of logits.
    """
    if classes:
        return temperature_divergence(float_output, quant_output, temperature)
    return feature_alignment_loss(float_output, quant_output).mean()


def token_weights(float_context: Tensor, share: float = 0.1, weight: float = 2.0) -> Tensor:
    """Weight of each token in the context distance: ``weight`` for the most active ``share``, else 1; normalised.

    Active means a large mean absolute context of P over heads and channels (METHOD.md, L_dist: the top 10 % count
    twice). ``round(share * tokens)`` tokens, at least one, are chosen per image.

    Args:
        float_context: ``(batch, heads, tokens, head_dim)``.
        share: of the tokens, in (0, 1].
        weight: of a chosen token.

    Returns:
        ``(batch, tokens)``; each row sums to 1.
    """
    activity = float_context.float().abs().mean(dim=(1, 3))  # (batch, tokens)
    count = max(1, round(share * activity.shape[-1]))
    weights = torch.ones_like(activity).scatter_(-1, activity.topk(count, dim=-1).indices, weight)
    return weights / weights.sum(dim=-1, keepdim=True)


def context_distance(
    float_context: Sequence[Tensor], quant_context: Sequence[Tensor], *, prefix: int = 1, include_prefix: bool = False
) -> Tensor:
    """Head-wise structural distance of attn@v between both networks (METHOD.md, L_dist).

    For each layer, image, head and channel, over the tokens with the weights of :func:`token_weights`:
    ``SSIM = (2 cov(p, q) + C2) / (var(p) + var(q) + C2)`` with C2 = 0.03^2 and no luminance term. The distance is the
    mean of ``1 - SSIM`` over all of them: 0 for equal contexts, 2 for opposite ones.

    Args:
        float_context: P, one ``(batch, heads, tokens, head_dim)`` per layer; the target.
        quant_context: Q, likewise.
        prefix: tokens before the patch tokens (class, distillation, registers).
        include_prefix: whether these count as well.

    Returns:
        A scalar in [0, 2].

    Raises:
        InputError: if the numbers of layers or the shapes differ, or there is no layer.
    """
    shapes = [[tuple(layer.shape) for layer in context] for context in (float_context, quant_context)]
    if not shapes[0] or shapes[0] != shapes[1]:
        raise InputError(
            f"Expected one context (batch, heads, tokens, head_dim) per layer, of the same shapes for both networks; "
            f"got {shapes[0]} and {shapes[1]}. Record both in the same forward pass of the same images."
        )
    distances = []
    for p, q in zip(float_context, quant_context, strict=True):
        # Attention pooling has queries that are no tokens: all count.
        first = 0 if include_prefix or p.shape[2] <= prefix else prefix
        p, q = p[:, :, first:].float(), q[:, :, first:].float()
        weights = token_weights(p.detach())[:, None, :, None]  # (batch, 1, tokens, 1)
        p = p - (weights * p).sum(dim=2, keepdim=True)
        q = q - (weights * q).sum(dim=2, keepdim=True)
        # Each (batch, heads, head_dim).
        covariance = (weights * p * q).sum(dim=2)
        variances = (weights * (p.square() + q.square())).sum(dim=2)
        distances.append((1 - (2 * covariance + _SSIM_C2) / (variances + _SSIM_C2)).mean())
    return torch.stack(distances).mean()


def block_error(output: Tensor, target: Tensor, token_weights: Tensor | None = None) -> Tensor:
    """Squared error of a block's output, each token by the power of its target.

    See :func:`maskaq_brevitas.quant.grid.row_importance` for the weight of a token.

    Args:
        output, target: ``(images, tokens, channels)``.
        token_weights: further weight per token, ``(images, tokens)``, or on a grid ``(images, rows, columns)`` of
            another size than that of outputs ``(images, rows, columns, channels)``: a token then gets the mean of what
            it covers.

    Returns:
        A scalar; about 1 if the error is as large as the target.
    """
    rows = target.reshape(-1, target.shape[-1])
    importance = row_importance(rows)
    if token_weights is not None:
        if token_weights.ndim == 3:
            grid = target.shape[1], target.shape[2]
            token_weights = F.adaptive_avg_pool2d(token_weights.float(), grid)
        weights = token_weights.reshape(-1, 1).to(importance)
        importance = importance * weights / weights.mean()
    return ((output.reshape_as(rows) - rows).square() * importance).sum()


def centred_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of one vector per image, by how much the targets differ between images.

    A large part of a class token is the same for every image: by their power, its features could be matched to a tenth
    without telling two images apart (ViT-Tiny at w3a3). A tenth of the power is added, for a batch of like images.

    Args:
        output, target: ``(batch, features)``.

    Returns:
        A scalar; about 1 if the error is as large as what tells images apart.
    """
    output, target = output.float(), target.float()
    spread = (target - target.mean(dim=0)).square().sum() + 0.1 * target.square().sum()
    return (output - target).square().sum() / spread.clamp_min(1e-12)
