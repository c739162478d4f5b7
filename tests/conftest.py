"""Shared fixtures: small models, and one CPU thread (their operations are too small to share out)."""

import pytest
import torch
from random_vit import random_vit
from torch import nn

from maskaq_brevitas.models.zoo import load_model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Runs the suite, and what it starts, on one CPU thread and puts the caller's number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # two workers with two threads each wait for each other
        yield
    torch.set_num_threads(before)


@pytest.fixture
def digits_vit() -> nn.Module:
    """The shipped model with its trained weights, in eval mode; a fresh one for each test."""
    return load_model("digits_vit")


@pytest.fixture
def tiny_vit() -> nn.Module:
    """A timm VisionTransformer with random weights from a fixed seed, in eval mode.

    32 x 32 input, 4 x 4 patches of 8 pixels, one class token, 2 blocks, 2 heads, width 64, 10 classes.
    """
    model = random_vit(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10)
    model.pretrained_cfg = model.default_cfg = {
        "architecture": "tiny_vit", "num_classes": 10, "input_size": (3, 32, 32), "interpolation": "bicubic",
        "crop_pct": 1.0, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "classifier": "head",
        "first_conv": "patch_embed.proj",
    }
    return model
