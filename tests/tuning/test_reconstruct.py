"""Block-by-block reconstruction: the error, what is trained, and that everything borrowed is put back."""

import numpy as np
import pytest
import torch

from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.errors import ConfigurationError, InputError
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.calibrate import calibrate
from maskaq_brevitas.tuning.reconstruct import block_error, reconstruct, trainable_parts


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)


@pytest.fixture
def quant_model(tiny_vit, images):
    model, _ = swap_layers(tiny_vit, "w3a3")
    calibrate(model, [images])
    return model


def run(quant_model, tiny_vit, images, **options):
    options = {"steps": 12, "batch_size": 4, **options}
    return reconstruct(
        quant_model, float_snapshot(tiny_vit), images, ReconstructConfig(**options),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_block_error_equals_numpy():
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(2, 5, 3, generator=generator) for _ in range(2))
    target[0, 0] *= 30  # a token that a plain squared error would follow alone
    weights = torch.rand(2, 5, generator=generator)
    error = (output - target).numpy().reshape(10, 3) ** 2
    power = (target.numpy().reshape(10, 3) ** 2).sum(axis=1)
    median = np.sort(power)[4]  # torch takes the lower of the two middle values
    importance = 1 / (10 * np.maximum(power, median) ** 0.75 * median**0.25)
    tokens = weights.numpy().reshape(10) / weights.mean().item()
    assert block_error(output, target).item() == pytest.approx((error.sum(axis=1) * importance).sum(), rel=1e-5)
    expected = (error.sum(axis=1) * importance * tokens).sum()
    assert block_error(output, target, weights).item() == pytest.approx(expected, rel=1e-5)


def test_every_block_comes_closer_to_the_float_model(quant_model, tiny_vit, images):
    with torch.no_grad():
        before = (quant_model(images) - tiny_vit(images)).square().mean()
    figures = run(quant_model, tiny_vit, images, steps=40, weight_learning_rate=1e-3)
    assert [figure["after"] < figure["before"] for figure in figures] == [True, True]
    with torch.no_grad():
        after = (quant_model(images) - tiny_vit(images)).square().mean()
    assert after < before


def test_a_block_that_gets_worse_is_put_back(quant_model, tiny_vit, images):
    before = {name: value.clone() for name, value in quant_model.state_dict().items()}
    figures = run(quant_model, tiny_vit, images, steps=3, weight_learning_rate=10.0, scale_learning_rate=0.0, drop=0.0)
    assert all(figure["after"] == figure["before"] for figure in figures)
    assert all(torch.equal(before[name], value) for name, value in quant_model.state_dict().items())


def test_same_seed_same_bytes_and_nothing_stays_borrowed(tiny_vit, images):
    results = []
    for _ in range(2):
        model, _ = swap_layers(tiny_vit, "w3a3")
        calibrate(model, [images])
        flags = [parameter.requires_grad for parameter in model.parameters()]
        state = torch.get_rng_state()
        run(model, tiny_vit, images)
        assert torch.equal(state, torch.get_rng_state())
        assert flags == [parameter.requires_grad for parameter in model.parameters()]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_an_error_inside_a_block_leaves_no_hook(quant_model, tiny_vit, images):
    def fail(*_):
        raise RuntimeError("inside")

    handle = quant_model.blocks[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        run(quant_model, tiny_vit, images)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in quant_model.modules())


def test_first_block_skips_what_is_done(quant_model, tiny_vit, images):
    before = quant_model.blocks[0].attn.qkv.weight.clone()
    figures = reconstruct(
        quant_model, float_snapshot(tiny_vit), images, ReconstructConfig(steps=4, batch_size=4),
        generator=torch.Generator().manual_seed(0), first_block=1,
    )  # fmt: skip
    assert len(figures) == 1
    assert torch.equal(before, quant_model.blocks[0].attn.qkv.weight)


def test_trainable_parts_are_all_of_a_block_that_is_quantized(quant_model):
    layers, weight_scales, activation_scales = trainable_parts(quant_model.blocks[0])
    assert len(layers) == 8  # weight and bias of qkv, proj, fc1, fc2
    assert len(weight_scales) == 4
    assert len(activation_scales) == 8  # four layer inputs, four operands


def test_bad_input_is_refused(quant_model, tiny_vit, images):
    with pytest.raises(InputError, match="at least one image"):
        run(quant_model, tiny_vit, images[:0])
    with pytest.raises(ConfigurationError, match="drop"):
        ReconstructConfig(drop=1.0)
    with pytest.raises(ConfigurationError, match="steps"):
        ReconstructConfig(steps=0)
