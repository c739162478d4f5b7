"""timm ViTs with random weights of a fixed seed, which other processes can build as well."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer


def random_vit(**options: Any) -> VisionTransformer:
    """A ViT in eval mode, whose pixels are normalised by mean and deviation 0.5; the caller's random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(**options)
    model.pretrained_cfg = model.default_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return model.eval()
