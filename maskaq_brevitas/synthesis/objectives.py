"""The five terms of the synthesis objective, as pure functions of tensors (METHOD.md, section 2).

Attention maps are ``(batch, heads, tokens, tokens)`` per layer; ``prefix`` counts the tokens before the patch tokens.
Layers may differ in size; where attention stays inside windows, all windows of the first image come first, and an image
gets their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "class_loss",
    "entropy_loss",
    "feature_alignment_loss",
    "head_coherence_loss",
    "masked_alignment_loss",
    "similarity_entropy",
    "total_variation",
    "total_variation_l1",
]

Rows = Tensor | Sequence[Tensor | None] | None

_SSIM_C1 = 0.01**2
_SSIM_C2 = 0.03**2


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the drawn labels, per image (METHOD.md, L_class).

    Args:
        logits: ``(batch, classes)``.
        labels: ``(batch,)``, class indices.

    Returns:
        ``(batch,)``, in nats.
    """
    return F.cross_entropy(logits, labels, reduction="none")


def total_variation(images: Tensor) -> Tensor:
    """Sum of the 2-norms of horizontal, vertical and both diagonal differences, per image (METHOD.md, L_tv).

    The diagonals count with 1/sqrt(2). The published norm spans the batch; ours is per image, so that an image does not
    depend on its neighbours.

    Args:
        images: ``(batch, channels, height, width)``.

    Returns:
        ``(batch,)``, in units of the images.
    """
    horizontal = images[..., :, 1:] - images[..., :, :-1]
    vertical = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    straight = _norm(horizontal) + _norm(vertical)
    return straight + (_norm(falling) + _norm(rising)) / math.sqrt(2)


def total_variation_l1(images: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical neighbours, per image: acts on small differences as well.

    Args:
        images: ``(batch, channels, height, width)``.

    Returns:
        ``(batch,)``, in units of the images.
    """
    horizontal = (images[..., :, 1:] - images[..., :, :-1]).abs().mean(dim=(1, 2, 3))
    vertical = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return horizontal + vertical


def head_coherence_loss(
    attention: Sequence[Tensor], prefix: int, rows: Rows = None, *, images: int | None = None
) -> Tensor:
    """Disagreement of the heads on where each patch looks: mean of 1 - SSIM^2 over pairs of heads (MimiQ; L_head).

    For each layer, image and query patch, the attention over patches is min-max normalised per head; global SSIM with
    C1 = 0.01^2, C2 = 0.03^2 between all unordered pairs of heads, as one matrix product.

    Args:
        attention: one ``(batch, heads, tokens, tokens)`` per layer.
        prefix: tokens before the patches.
        rows: indices of the query patches to use in each layer, ``(rows,)``, or such indices for each layer; all if
            None. Patches count alike, so a random sample gives the same loss on average.
        images: in the batch; None: as many as its first dimension, so without windows.

    Returns:
        ``(images,)``, between 0 (all heads agree) and 1; zero for a model with one head.
    """
    per_layer = []
    for layer, chosen in zip(attention, _of_each_layer(rows, attention), strict=True):
        heads = layer.shape[1]
        if heads < 2:
            per_layer.append(_per_image(layer.new_zeros(layer.shape[0], dtype=torch.float32), images))
            continue
        # (batch, heads, queries, keys) -> (batch, queries, heads, keys)
        maps = _among_patches(layer, prefix, chosen).float().transpose(1, 2)
        low = maps.amin(dim=-1, keepdim=True)
        maps = (maps - low) / (maps.amax(dim=-1, keepdim=True) - low + 1e-8)
        mean = maps.mean(dim=-1, keepdim=True)
        centred = maps - mean
        covariance = centred @ centred.transpose(-2, -1) / maps.shape[-1]  # (batch, queries, heads, heads)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        luminance = mean * mean.transpose(-2, -1)
        squares = mean.square().squeeze(-1)
        ssim = ((2 * luminance + _SSIM_C1) * (2 * covariance + _SSIM_C2)) / (
            (squares.unsqueeze(-1) + squares.unsqueeze(-2) + _SSIM_C1)
            * (variance.unsqueeze(-1) + variance.unsqueeze(-2) + _SSIM_C2)
        )
        first, second = torch.triu_indices(heads, heads, offset=1, device=layer.device)
        per_layer.append(_per_image((1 - ssim[..., first, second].square()).mean(dim=(1, 2)), images))
    return torch.stack(per_layer).mean(dim=0)


def similarity_entropy(attention: Tensor, prefix: int, rows: Tensor | None = None) -> Tensor:
    """Differential entropy of patch similarity under a Gaussian proxy (MaskAQ, H of METHOD.md).

    The head-mean attention among patches has its rows normalised to unit length; S holds their inner products, and
    ``H = 1/2 log(2 pi e (Var S + 1e-8))``.

    Args:
        attention: ``(batch, heads, tokens, tokens)``.
        prefix: tokens before the patches.
        rows: indices of the rows to use, ``(rows,)``; all if None.

    Returns:
        ``(batch,)``, in nats.
    """
    maps = _among_patches(attention, prefix, rows).float().mean(dim=1)  # (batch, queries, keys)
    maps = F.normalize(maps, dim=-1)
    similarity = maps @ maps.transpose(-2, -1)
    variance = similarity.flatten(1).var(dim=1, unbiased=False)
    return 0.5 * torch.log(2 * math.pi * math.e * (variance + 1e-8))


def entropy_loss(
    attention: Sequence[Tensor], prefix: int, rows: Rows = None, *, images: int | None = None
) -> Tensor:
    """Negative mean over layers of :func:`similarity_entropy` (MaskAQ, L_entropy).

    A layer with one query (attention pooling, a window of one patch) has no similarity of patches, and is left out.

    Args:
        attention: one ``(batch, heads, tokens, tokens)`` per layer.
        prefix: tokens before the patches.
        rows: indices of the rows to use in each layer, ``(rows,)``, or such indices for each layer; all if None.
        images: in the batch; None: as many as its first dimension, so without windows.

    Returns:
        ``(images,)``, in nats.
    """
    per_layer = [
        _per_image(similarity_entropy(layer, prefix, chosen), images)
        for layer, chosen in zip(attention, _of_each_layer(rows, attention), strict=True)
        if layer.shape[2] - prefix > 1
    ]
    if not per_layer:
        return attention[0].new_zeros(len(attention[0]) if images is None else images, dtype=torch.float32)
    return -torch.stack(per_layer).mean(dim=0)


def feature_alignment_loss(float_features: Tensor, quant_features: Tensor) -> Tensor:
    """Squared distance of both networks' features, by the power of P's: in place of classes where there are none.

    Args:
        float_features, quant_features: outputs of P and Q, ``(batch, ...)``.

    Returns:
        ``(batch,)``; 0 for equal features, 1 if the distance is as large as P's features.
    """
    p, q = float_features.flatten(1).float(), quant_features.flatten(1).float()
    return (p - q).square().sum(dim=1) / p.detach().square().sum(dim=1).clamp_min(1e-12)


def masked_alignment_loss(float_rows: Tensor, quant_rows: Tensor, mask: Tensor) -> Tensor:
    """Masked attention alignment (MaskAQ, L_align): mean |A^P - A^Q| over the informative patches, mean over layers.

    Args:
        float_rows, quant_rows: attention that the patches receive in the float and quant model,
            ``(layers, batch, patches)``, see :func:`maskaq_brevitas.synthesis.masks.received_attention`.
        mask: informative patches, ``(batch, patches)``, or ``(layers, batch, patches)`` for one mask per layer.

    Returns:
        ``(batch,)``, in units of the attention. Zero where a mask selects nothing.
    """
    weights = mask.to(float_rows.dtype)
    distance = ((float_rows - quant_rows).abs() * weights).sum(dim=-1) / weights.sum(dim=-1).clamp_min(1)
    return distance.mean(dim=0)


def _among_patches(attention: Tensor, prefix: int, rows: Tensor | None) -> Tensor:
    """Attention of the patches ``rows`` (all if None) to all patches, ``(batch, heads, rows, patches)``."""
    if rows is None:
        return attention[..., prefix:, prefix:]
    # Rows first: the gradient of a slice fills a tensor of the whole attention.
    return attention.index_select(2, rows + prefix)[..., prefix:]


def _of_each_layer(rows: Rows, attention: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return [rows] * len(attention) if rows is None or isinstance(rows, Tensor) else rows


def _per_image(values: Tensor, images: int | None) -> Tensor:
    """Mean over the windows of each image: ``(images * windows,)`` to ``(images,)``."""
    return values if images is None else values.reshape(images, -1).mean(dim=1)


def _norm(differences: Tensor) -> Tensor:
    # The epsilon keeps the gradient finite on a constant image.
    return differences.flatten(1).square().sum(dim=1).add(1e-12).sqrt()
