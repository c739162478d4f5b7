"""Calibration sets the scales that a hand computation gives, and nothing else."""

import dataclasses

import pytest
import torch
from brevitas.graph.calibrate import calibration_mode
from brevitas.nn import QuantIdentity
from brevitas.nn import QuantLinear
from torch.nn import functional as F

from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.calibrate import calibrate
from maskaq_brevitas.tuning.calibrate import is_calibrated
from maskaq_brevitas.tuning.calibrate import provisional_calibration

SCHEME = dataclasses.replace(resolve_scheme("strict-w4a5"), equalize=False, activation_range="minmax")


def images(seed=0, batch=3):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def proxies(quant_model):
    return {name: module.input_quant if isinstance(module, QuantLinear) else module.act_quant
            for name,
            module in quant_model.named_modules() if isinstance(module, (QuantLinear, QuantIdentity))}  # fmt: skip


def scales(quant_model):
    return {name: float(proxy.scale().detach()) for name, proxy in proxies(quant_model).items()}


def float_inputs(model, batches):
    """What flows into every Linear of the float model, by batch."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            hook = lambda _m, args, name=name: seen.setdefault(name, []).append(args[0].double().numpy())  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return seen


def test_scales_are_those_of_a_hand_computation(tiny_vit):
    quant_model, _ = swap_layers(tiny_vit, SCHEME)
    assert not is_calibrated(quant_model)
    batches = [images(0), images(1) * 3, images(2, batch=1)]
    calibrate(quant_model, iter(batches))
    assert is_calibrated(quant_model)
    found = scales(quant_model)
    checked = 0
    for name, values in float_inputs(tiny_vit, batches).items():
        if name.endswith("mlp.fc2"):  # min-max with a zero point: the range of 32 codes, averaged over the batches
            width = sum(value.max() - value.min() for value in values) / 3 / 31
            assert found[name] == pytest.approx(width, rel=1e-4), name
            lowest = sum(value.min() for value in values) / 3
            assert float(proxies(quant_model)[name].zero_point()) == pytest.approx(-lowest / width, abs=0.51)
        else:
            expected = sum(abs(value).max() for value in values) / 3 / 2**4
            assert found[name] == pytest.approx(expected, rel=1e-4), name
        checked += 1
    assert checked == 9


def test_second_calibration_forgets_the_first(tiny_vit):
    once, _ = swap_layers(tiny_vit, SCHEME)
    calibrate(once, [images(1)])
    twice, _ = swap_layers(tiny_vit, SCHEME)
    calibrate(twice, [images(0) * 10])
    assert scales(twice) != scales(once)
    calibrate(twice, [images(1)])
    assert scales(twice) == scales(once)
    zero_points = [[float(proxy.zero_point()) for proxy in proxies(model).values()] for model in (once, twice)]
    assert zero_points[0] == zero_points[1] and any(zero_points[0])


def test_statistics_come_from_the_float_model(tiny_vit):
    """Two-bit weights and activations in front of a layer do not change what it is calibrated on."""
    low, _ = swap_layers(tiny_vit, SCHEME, {"blocks.0.*": "w2a2"})
    high, _ = swap_layers(tiny_vit, SCHEME)
    calibrate(low, [images()]), calibrate(high, [images()])
    assert scales(low)["blocks.1.attn.proj"] == pytest.approx(scales(high)["blocks.1.attn.proj"], rel=1e-5)


def test_flags_and_random_state_are_given_back(tiny_vit):
    quant_model, _ = swap_layers(tiny_vit, SCHEME)
    quant_model.train()
    quant_model.blocks[1].eval()
    before = {name: module.training for name, module in quant_model.named_modules()}
    rng = torch.get_rng_state()
    calibrate(quant_model, [images()])
    assert before == {name: module.training for name, module in quant_model.named_modules()}
    assert torch.equal(rng, torch.get_rng_state()) and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in quant_model.parameters())
    assert all(proxy.is_quant_enabled for proxy in proxies(quant_model).values())


def test_no_batch(tiny_vit):
    quant_model, _ = swap_layers(tiny_vit, SCHEME)
    quant_model.train()
    with pytest.raises(InputError, match="at least one batch of images, got none"):
        calibrate(quant_model, [])
    assert quant_model.training and all(proxy.is_quant_enabled for proxy in proxies(quant_model).values())


class Bypass(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.unused = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.model(x) + self.unused.bias[0]


def test_a_bypassed_layer_is_named(tiny_vit):
    quant_model, _ = swap_layers(Bypass(tiny_vit), SCHEME)
    with pytest.raises(ModelError, match="No data reached the quantizers of unused: the model bypasses these layers"):
        calibrate(quant_model, [images()])
    assert all(proxy.is_quant_enabled for proxy in proxies(quant_model).values())


def test_a_bypassed_layer_of_a_block_is_named_after_equalisation_too(tiny_vit):
    from maskaq_brevitas.quant.equalize import equalize

    quant_model, _ = swap_layers(tiny_vit, "w4a4")
    mlp = quant_model.blocks[1].mlp
    mlp.forward = lambda x: mlp.fc2(mlp.norm(mlp.act(F.linear(x, mlp.fc1.weight, mlp.fc1.bias))))
    assert "blocks.1.norm2" not in {place.name for place in equalize(quant_model, [images()])}
    with pytest.raises(ModelError, match=r"No data reached the quantizers of blocks\.1\.mlp\.fc1:"):
        calibrate(quant_model, [images()])


def test_an_error_inside_the_model_leaves_the_quantizers_on(tiny_vit):
    quant_model, _ = swap_layers(tiny_vit, SCHEME)
    with pytest.raises(AssertionError):
        calibrate(quant_model, [images(), torch.zeros(1, 3, 8, 8)])
    assert all(proxy.is_quant_enabled for proxy in proxies(quant_model).values())
    calibrate(quant_model, [images()])
    fresh, _ = swap_layers(tiny_vit, SCHEME)
    calibrate(fresh, [images()])
    assert scales(fresh) == scales(quant_model)


def test_a_provisional_calibration_leaves_no_trace(tiny_vit):
    quant_model, _ = swap_layers(tiny_vit, SCHEME)
    other, _ = swap_layers(tiny_vit, SCHEME)
    with provisional_calibration(quant_model, [images(5)]):
        assert is_calibrated(quant_model)
        calibrate(other, [images(5)])
        assert scales(quant_model) == scales(other)
    assert not is_calibrated(quant_model) and quant_model.state_dict().keys() != other.state_dict().keys()
    calibrate(quant_model, [images(1)]), calibrate(other, [images(1)])
    assert scales(quant_model) == scales(other)
    with torch.no_grad():
        assert torch.equal(quant_model(images()), other(images()))


def test_a_provisional_calibration_in_the_middle_of_another(tiny_vit):
    found = []
    for interrupted in (False, True):
        quant_model, _ = swap_layers(tiny_vit, SCHEME)
        with torch.no_grad(), calibration_mode(quant_model):
            quant_model(images(0))
            if interrupted:
                with provisional_calibration(quant_model, [images(7) * 50]):
                    assert all(proxy.is_quant_enabled for proxy in proxies(quant_model).values())
            quant_model(images(1))
        found.append(scales(quant_model))
    assert found[0] == found[1]
