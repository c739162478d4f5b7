"""Weights, activations and bit widths at the edge: handled, or refused by name."""

import math
import warnings

import pytest
import torch
from torch import nn

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.errors import SilentLayerWarning
from maskaq_brevitas.errors import SynthesisError

SMALL = dict(num_images=8, held_back=2, batch_size=4, progress=False, synthesis=SynthesisConfig(steps=2, batch_size=4))


def dead_channels(block: nn.Module) -> None:
    block.mlp.fc1.weight[:8] = 0
    block.mlp.fc1.bias[:8] = 0
    block.attn.qkv.weight[3] = 0


def dead_layer(block: nn.Module) -> None:
    block.mlp.fc1.weight.zero_()
    block.mlp.fc1.bias.zero_()


def silent_activation(block: nn.Module) -> None:
    block.mlp.fc1.bias.fill_(-1000.0)  # GELU gives zeros only


def no_values(block: nn.Module) -> None:
    block.attn.qkv.weight[128:] = 0
    block.attn.qkv.bias[128:] = 0


def constant_norm(block: nn.Module) -> None:
    block.norm1.weight.zero_()
    block.norm1.bias.fill_(0.5)


def zero_norm(block: nn.Module) -> None:
    block.norm1.weight.zero_()
    block.norm1.bias.zero_()


def weights_below_bfloat16_steps(block: nn.Module) -> None:
    block.mlp.fc1.weight.mul_(1e-30)
    block.mlp.fc1.bias.zero_()


def subnormal_weights(block: nn.Module) -> None:
    block.mlp.fc2.weight.mul_(1e-38)


#: Damage -> inputs that are nothing but zeros after it.
DAMAGES = {
    dead_channels: [], dead_layer: ["mlp.fc2"], silent_activation: ["mlp.fc2"], no_values: ["attn.value", "attn.proj"],
    constant_norm: ["attn.qkv"], zero_norm: ["attn.qkv", "attn.proj"], weights_below_bfloat16_steps: ["mlp.fc2"],
    subnormal_weights: [],
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "precision"), (("w8a8", "float32"), ("w2a2", "bfloat16")))
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_constant_dead_and_tiny_values_are_quantized(damage, scheme, precision, tiny_vit):
    with torch.no_grad():
        damage(tiny_vit.blocks[0])
    options = {**SMALL, "synthesis": SynthesisConfig(steps=2, batch_size=4, precision=precision)}
    calibrator = DataFreeCalibrator(tiny_vit, scheme=scheme, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quant_model = calibrator.calibrate()
    told = [str(entry.message) for entry in caught if entry.category is SilentLayerWarning]
    assert len(told) == bool(DAMAGES[damage])
    assert all(f"blocks.0.{name}" in told[0] for name in DAMAGES[damage])
    images, _ = next(iter(calibrator))
    with torch.no_grad():
        expected, found = tiny_vit(images), quant_model(images)
    for name, tensor in quant_model.state_dict().items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
    assert torch.equal(calibrator.freeze()(images), found)
    error = float((found - expected).norm() / expected.norm())
    assert error < (0.1 if scheme == "w8a8" else 1.2)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_model_that_is_not_finite_is_refused_by_name(value, tiny_vit):
    with torch.no_grad():
        tiny_vit.blocks[1].mlp.fc1.weight[2, 3] = value
        tiny_vit.head.bias[:2] = value
    with pytest.raises(
        ModelError, match=r"NaN or infinity in blocks.1.mlp.fc1.weight \(1 of 16384 values\), head.bias \(2"
    ):
        DataFreeCalibrator(tiny_vit, **SMALL)


def test_a_model_that_overflows_says_so(tiny_vit):
    with torch.no_grad():
        tiny_vit.blocks[0].mlp.fc1.weight.mul_(1e30)
    calibrator = DataFreeCalibrator(tiny_vit, scheme="w4a4", **SMALL)
    with pytest.raises(SynthesisError, match="gives NaN or infinity: check its weights"):
        calibrator.calibrate()
