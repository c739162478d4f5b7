import dataclasses

import pytest
import torch
from brevitas.nn import QuantConv2d
from brevitas.nn import QuantIdentity
from brevitas.nn import QuantLinear

from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.quant.grid import row_importance
from maskaq_brevitas.quant.observe import collect_rows
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.calibrate import calibrate
from maskaq_brevitas.tuning.ranges import search_ranges
from maskaq_brevitas.tuning.ranges import set_channel_scales
from maskaq_brevitas.tuning.ranges import undo_bias_correction

SCHEME = dataclasses.replace(resolve_scheme("tensor-w8a4"), equalize=False, activation_range="search")


def images(seed=0, batch=3):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def scale_of(quant_model, name):
    module = quant_model.get_submodule(name)
    return float((module.act_quant if isinstance(module, QuantIdentity) else module.input_quant).scale().detach())


@pytest.fixture
def calibrated(tiny_vit):
    quant_model, _ = swap_layers(tiny_vit, SCHEME)
    calibrate(quant_model, [images()])
    return quant_model


def test_factors_multiply_the_calibrated_scales(calibrated):
    names = [
        name
        for name, module in calibrated.named_modules()
        if isinstance(module, (QuantLinear, QuantConv2d, QuantIdentity))
    ]
    before = {name: scale_of(calibrated, name) for name in names}
    factors = search_ranges(calibrated, [images()])
    blocks = [f"blocks.{block}." for block in (0, 1)]
    layers = ("attn.qkv", "attn.query", "attn.key", "attn.value", "attn.probabilities", "attn.proj", "mlp.fc1")
    assert set(factors) == {block + layer for block in blocks for layer in layers} | {"head"}
    assert all(0 < factor <= 1 for factor in factors.values()) and min(factors.values()) < 0.95
    for name in names:  # fc2 has a zero point and the convolution is no linear layer: both keep their range
        assert scale_of(calibrated, name) == pytest.approx(before[name] * factors.get(name, 1.0), rel=1e-5)


def layer_error(quant_model, float_model, name):
    """Squared error of a layer's output, each token weighted as the search weighs it, in numpy."""
    inputs = []
    handle = float_model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        float_model(images())
    handle.remove()
    values = inputs[0].reshape(-1, inputs[0].shape[-1]).double().numpy()
    weight = float_model.get_submodule(name).weight.detach().double().numpy()
    scale = scale_of(quant_model, name)
    rounded = (values / scale).round().clip(-8, 7) * scale
    target = values @ weight.T
    power = (target**2).sum(axis=1)
    median = float(torch.from_numpy(power).median())
    importance = 1 / (power.clip(median, None) ** 0.75 * median**0.25)
    return float((((rounded - values) @ weight.T) ** 2).sum(axis=1) @ importance)


def test_output_error_falls_to_the_best_of_the_grid(calibrated, tiny_vit):
    name = "blocks.1.attn.proj"
    first = scale_of(calibrated, name)
    before = layer_error(calibrated, tiny_vit, name)
    factor = search_ranges(calibrated, [images()])[name]
    after = layer_error(calibrated, tiny_vit, name)
    assert after < before
    value = next(parameter for key, parameter in calibrated.named_parameters()
                 if key.startswith(name + ".input_quant") and key.endswith("value"))  # fmt: skip
    errors = {}
    for index in range(40):
        other = 0.01 ** (index / 39)
        value.data.mul_(first * other / scale_of(calibrated, name))
        errors[other] = layer_error(calibrated, tiny_vit, name)
    assert errors[min(errors, key=errors.get)] == pytest.approx(after, rel=1e-3)
    assert factor == pytest.approx(min(errors, key=errors.get), rel=0.15)


def test_a_range_that_one_token_blows_up_is_cut(tiny_vit):
    """One patch a hundred times as bright: calibration keeps its range, the search gives the codes to the others."""
    spiked = images()
    spiked[0, :, :8, :8] *= 100
    with torch.no_grad():
        tiny_vit.blocks[0].norm1 = torch.nn.Identity()  # the spike reaches qkv as it is
    quant_model, _ = swap_layers(tiny_vit, SCHEME)
    calibrate(quant_model, [spiked])
    assert search_ranges(quant_model, [spiked])["blocks.0.attn.qkv"] < 0.3


def test_same_images_same_factors_and_nothing_left_behind(calibrated, tiny_vit):
    other, _ = swap_layers(tiny_vit, SCHEME)
    calibrate(other, [images()])
    rng = torch.get_rng_state()
    assert search_ranges(calibrated.train(), [images()], rows=20) == search_ranges(other, [images()], rows=20)
    assert torch.equal(rng, torch.get_rng_state())
    assert calibrated.training and not any(module._forward_pre_hooks for module in calibrated.modules())


def test_only_what_is_asked_for_is_searched(tiny_vit):
    quant_model, _ = swap_layers(tiny_vit, "tensor-w3a3")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calibrate(quant_model, [images])
    layer = quant_model.blocks[0].mlp.fc2

    def scales():
        return layer.input_quant.scale().detach().clone(), layer.quant_weight().scale.detach().clone()

    def output_error():
        with torch.no_grad():
            rows = layer.input_quant(torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(1)))
            rows = getattr(rows, "value", rows)
            return float(((layer.quant_weight().value - layer.weight) @ rows.T).square().sum())

    before, error = scales(), output_error()
    assert search_ranges(quant_model, [images], activations=False, weights=False) == {}
    assert all(torch.equal(*pair) for pair in zip(before, scales(), strict=True))
    search_ranges(quant_model, [images], activations=False)
    after = scales()
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    assert output_error() < 1.5 * error
    search_ranges(quant_model, [images], weights=False)
    assert not torch.equal(scales()[0], before[0])
    assert torch.equal(scales()[1], after[1])


def test_no_batch(calibrated):
    with pytest.raises(InputError, match="at least one batch"):
        search_ranges(calibrated, [])


def channel_scaled(tiny_vit):
    quant_model, _ = swap_layers(tiny_vit, "w3a4")
    calibrate(quant_model, [images()])
    return quant_model


def test_scales_of_channels_are_set_and_not_searched(tiny_vit):
    quant_model = channel_scaled(tiny_vit)
    layer = quant_model.blocks[1].mlp.fc2
    wanted = torch.rand(256, generator=torch.Generator().manual_seed(4)) + 0.1
    set_channel_scales(quant_model, {"blocks.1.mlp.fc2": wanted})
    factors = search_ranges(quant_model, [images()])
    torch.testing.assert_close(layer.input_quant.scale().detach(), wanted.reshape(1, 1, 256))
    assert "blocks.1.mlp.fc2" not in factors and "blocks.1.attn.proj" in factors


def test_bias_correction_takes_off_the_mean_error(tiny_vit):
    quant_model = channel_scaled(tiny_vit)
    layer, before = quant_model.blocks[0].mlp.fc2, quant_model.blocks[0].mlp.fc2.bias.detach().clone()
    values = collect_rows(quant_model, ["blocks.0.mlp.fc2"], [images()], rows=4096)["blocks.0.mlp.fc2"]
    search_ranges(quant_model, [images()], biases=True)
    target = values @ layer.weight.detach().T
    importance = row_importance(target)
    with torch.no_grad():
        inputs = layer.input_quant(values).value[0]
        error = inputs @ layer.quant_weight().value.T - inputs @ layer.weight.T

    def mean(rows):
        return (rows * importance).sum(dim=0) / importance.sum()

    torch.testing.assert_close(layer.bias.detach() - before, -mean(error), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(layer.input_mean, mean(inputs), rtol=1e-3, atol=1e-5)
    undo_bias_correction(quant_model)
    torch.testing.assert_close(layer.bias.detach(), before)
    assert not layer.input_mean.any()


def test_bias_correction_is_undone_after_tuning_moved_the_weights(tiny_vit):
    """The bias follows its weight (biases_follow), so what is to come out of it is not what went in."""
    quant_model = channel_scaled(tiny_vit)
    search_ranges(quant_model, [images()], biases=True)
    layer = quant_model.blocks[0].mlp.fc2
    with torch.no_grad():
        mean_output = layer.quant_weight().value @ layer.input_mean + layer.bias
        layer.weight += (
            0.3 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(5)) * layer.weight.std()
        )
        layer.bias += mean_output - (layer.quant_weight().value @ layer.input_mean + layer.bias)
        mean = layer.input_mean.clone()
        undo_bias_correction(quant_model)
    torch.testing.assert_close(layer.weight @ mean + layer.bias, mean_output, rtol=1e-4, atol=1e-5)
