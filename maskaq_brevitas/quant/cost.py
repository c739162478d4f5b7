"""What a model computes: multiply-accumulates by layer."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from maskaq_brevitas.models.families import is_attention
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.quant.snapshot import float_snapshot

__all__ = ["multiply_accumulates"]


@torch.no_grad()
def multiply_accumulates(float_model: nn.Module) -> dict[str, int]:
    """MACs for one image by module name, its children included; ``""`` is the whole model.

    Counted by ``torch.utils.flop_counter`` on the explicit form of the attention (fused kernels hide their matmuls).
    The two matmuls of an attention module stand under ``<attention>.query`` (q k^T) and ``<attention>.probabilities``
    (probabilities @ v).
    """
    snapshot = float_snapshot(float_model)
    device = next(iter(snapshot.parameters())).device
    image = torch.zeros(1, *read_geometry(float_model).input_size, device=device)
    with FlopCounterMode(display=False) as counter:
        snapshot(image)
    root = type(snapshot).__name__
    macs = {"": counter.get_total_flops() // 2}
    for key, flops in counter.get_flop_counts().items():
        if key.startswith(f"{root}."):
            macs[key.removeprefix(f"{root}.")] = sum(flops.values()) // 2
    for name, module in snapshot.named_modules():
        if is_attention(module):
            children = sum(macs.get(f"{name}.{child}", 0) for child, _ in module.named_children())
            # (tokens x head_dim x tokens) and (tokens x tokens x head_dim): both matmuls take the same.
            matmuls = macs.get(name, 0) - children
            macs[f"{name}.query"] = macs[f"{name}.probabilities"] = matmuls // 2
    return macs
