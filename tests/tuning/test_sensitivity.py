"""Sensitivity: each switch quantizes exactly its place, and the figures are those of the models in between."""

import pytest
import torch
from torch.nn import functional as F

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.quant.snapshot import frozen_snapshot
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.calibrate import calibrate
from maskaq_brevitas.tuning.ranges import mean_weight_error
from maskaq_brevitas.tuning.sensitivity import Switches
from maskaq_brevitas.tuning.sensitivity import place_blocks
from maskaq_brevitas.tuning.sensitivity import place_kinds
from maskaq_brevitas.tuning.sensitivity import place_layers
from maskaq_brevitas.tuning.sensitivity import sensitivity


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)


@pytest.fixture
def quant_model(tiny_vit, images):
    model, _ = swap_layers(tiny_vit, "w3a3")
    calibrate(model, [images])
    return model


@torch.no_grad()
def test_all_off_is_the_float_model_and_all_on_the_quant_model(quant_model, tiny_vit, images):
    switches = Switches(quant_model)
    assert torch.allclose(switches.model(images), tiny_vit(images), atol=1e-5)
    switches.set(switches.names)
    assert torch.equal(switches.model(images), frozen_snapshot(quant_model)(images))


@torch.no_grad()
def test_what_a_bias_holds_for_a_rounded_weight_goes_with_the_weight(tiny_vit, images):
    calibrator = DataFreeCalibrator(tiny_vit, scheme="w3a3", num_images=4, steps=1, progress=False)
    with torch.no_grad():
        calibrator.pool.put(
            torch.arange(4), images, torch.zeros(4, dtype=torch.long), torch.ones(4, 16, dtype=torch.bool)
        )
    calibrator.pool.version = 1
    quant_model = calibrator.calibrate()
    layer = quant_model.blocks[1].mlp.fc2
    assert mean_weight_error(layer).abs().max() > 1e-3
    switches = Switches(quant_model)
    torch.testing.assert_close(switches.model(images), tiny_vit(images), atol=1e-4, rtol=0)
    switches.set(["blocks.1.mlp.fc2.weight"])
    frozen = switches.model.blocks[1].mlp.fc2
    assert torch.equal(frozen.bias, layer.bias) and torch.equal(frozen.weight, layer.quant_weight().value)


@torch.no_grad()
def test_one_switch_quantizes_one_weight(quant_model, tiny_vit, images):
    switches = Switches(quant_model)
    switches.set(["blocks.1.mlp.fc1.weight"])
    expected = float_snapshot(tiny_vit)
    # Without equalisation beforehand the weights of both models are the same.
    expected.blocks[1].mlp.fc1.weight.copy_(quant_model.blocks[1].mlp.fc1.quant_weight().value)
    assert torch.allclose(switches.model(images), expected(images), atol=1e-5)
    with pytest.raises(InputError, match="Unknown switches: blocks.9"):
        switches.set(["blocks.9.mlp.fc1.weight"])


def test_groups_hold_every_switch_once(quant_model):
    names = Switches(quant_model).names
    assert len(names) == 2 * (2 * 4 + 2) + 2 * 4  # weight and input of 4 layers per block, stem, head; 4 operands
    for group in (place_kinds, place_layers, place_blocks):
        members = [name for found in group(names).values() for name in found]
        assert sorted(members) == sorted(names)
    assert place_kinds(names)["mlp.fc2 input"] == ["blocks.0.mlp.fc2.input", "blocks.1.mlp.fc2.input"]
    assert len(place_layers(names)["blocks.1.attn"]) == 4
    assert set(place_blocks(names)) == {"patch_embed.proj", "blocks.0", "blocks.1", "head"}


@torch.no_grad()
def test_figures(quant_model, tiny_vit, images):
    plain = float_snapshot(tiny_vit)
    seen = []
    found = sensitivity(quant_model, plain, images.split(3), on_group=seen.append)
    assert seen == found
    target, output = plain(images).log_softmax(-1), frozen_snapshot(quant_model)(images).log_softmax(-1)
    assert found[-1].name == "all"
    expected = F.kl_div(output, target, reduction="batchmean", log_target=True)
    assert found[-1].divergence == pytest.approx(expected.item(), rel=1e-4)
    assert found[-1].agreement == pytest.approx((output.argmax(-1) == target.argmax(-1)).float().mean().item())
    (without,) = sensitivity(quant_model, plain, [images], {"all": Switches(quant_model).names}, inverted=True)
    assert without.divergence == pytest.approx(0, abs=1e-5)
    with pytest.raises(InputError, match="at least one batch"):
        sensitivity(quant_model, plain, [])
