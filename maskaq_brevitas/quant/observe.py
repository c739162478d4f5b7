"""Samples of what flows into layers and operands of a quant model while its quantizers are switched off."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import torch
from brevitas.graph.calibrate import quantization_status_manager
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import InputError
from maskaq_brevitas.models.families import block_prefix
from maskaq_brevitas.modes import evaluation_mode

__all__ = ["collect_rows"]

_PREFIX_SHARE = 1 / 8


@torch.no_grad()
def collect_rows(
    quant_model: nn.Module, names: Iterable[str], batches: Iterable[Tensor], rows: int
) -> dict[str, Tensor]:
    """Float inputs of the named modules, as rows along the last axis, drawn evenly over the batches.

    Prefix tokens (the class token) get up to an eighth of the rows: their values are of another size than those of
    patches, the output hangs on them, and left to chance there would be five in a thousand rows, or none. The draw is
    fixed: every run sees the same tokens.

    Args:
        quant_model: a model with Brevitas quantizers, which are off for the duration.
        names: of modules, taking one tensor ``(..., channels)`` each.
        batches: normalised images, ``(batch, channels, height, width)`` each.
        rows: number of rows kept per module, at most.

    Returns:
        ``(rows, channels)`` in float32 per name; a module that was not called is missing.

    Raises:
        InputError: if there is no batch.
    """
    batches = list(batches)
    if not batches:
        raise InputError("Expected at least one batch of images, got none.")
    kept: dict[str, list[Tensor]] = {}
    per_batch = max(1, rows // len(batches))

    prefix = block_prefix(quant_model)

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            samples = kept.setdefault(name, [])
            pick = _drawn_rows(inputs[0].shape, prefix, per_batch, torch.Generator().manual_seed(len(samples)))
            flat = inputs[0].reshape(-1, inputs[0].shape[-1])
            samples.append(flat[pick.to(flat.device)].float())

        return hook

    handles = [quant_model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    off = quantization_status_manager(
        quant_model, disable_act_quant=True, disable_weight_quant=True, is_training=False
    )
    try:
        with evaluation_mode(quant_model), off:
            for images in batches:
                quant_model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(samples) for name, samples in kept.items()}


def _drawn_rows(shape: torch.Size, prefix: int, count: int, generator: torch.Generator) -> Tensor:
    """Indices of ``count`` rows of an activation ``(..., tokens, channels)``, drawn at random; all if it has fewer."""
    order = torch.randperm(shape[:-1].numel(), generator=generator)
    if len(shape) < 3 or prefix == 0:
        return order[:count]
    is_prefix = order % shape[-2] < prefix
    first = order[is_prefix][: max(1, round(_PREFIX_SHARE * count))]
    return torch.cat([first, order[~is_prefix]])[:count]
