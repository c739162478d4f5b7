"""Equalisation keeps the float function, never makes the measured error larger, and its grid search is right."""

import dataclasses

import numpy as np
import pytest
import torch
from brevitas.graph.calibrate import quantization_status_manager

from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.quant import channel_ratios
from maskaq_brevitas.quant.channel_ratios import _outlier_channels
from maskaq_brevitas.quant.channel_ratios import best_ratios
from maskaq_brevitas.quant.equalize import equalize
from maskaq_brevitas.quant.grid import quantize_symmetric
from maskaq_brevitas.quant.grid import row_importance
from maskaq_brevitas.quant.observe import collect_rows
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.calibrate import calibrate


def images(seed=0, batch=4):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def uneven(model):
    """Give the channels of a model ranges that differ by a factor of a hundred, as trained ViTs have them."""
    generator = torch.Generator().manual_seed(5)
    for block in model.blocks:
        for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            gain = torch.exp(torch.randn(64, generator=generator))
            norm.weight.data.mul_(gain)
            norm.bias.data.add_(torch.randn(64, generator=generator))
            layer.weight.data.div_(gain)
    return model


def float_output(quant_model):
    off = quantization_status_manager(quant_model, disable_act_quant=True, disable_weight_quant=True, is_training=False)
    with off, torch.no_grad():
        return quant_model(images())


@pytest.mark.parametrize("bits", ("tensor-w4a4", "tensor-w8a8"))
def test_float_function_stays_also_when_repeated(tiny_vit, bits):
    quant_model, _ = swap_layers(uneven(tiny_vit), bits)
    expected = float_output(quant_model)
    torch.testing.assert_close(expected, tiny_vit(images()).detach(), rtol=1e-5, atol=1e-5)
    weights = quant_model.blocks[0].mlp.fc2.weight.clone()
    for seed in range(3):
        places = equalize(quant_model, [images(seed), images(seed + 10, batch=2)])
        assert (float_output(quant_model) - expected).norm() < 1e-4 * expected.norm()
        assert [place.name for place in places] == [
            f"blocks.{block}.{name}" for block in (0, 1) for name in ("norm1", "norm2", "mlp.norm")
        ]
        for place in places:
            assert 0 < place.error <= place.error_before
            if place.error == place.error_before:
                assert (place.alpha, place.tails, place.outliers, place.refined) == (0.0, (0.0, 0.0), (), False)
    assert any(place.error < 0.9 * place.error_before for place in equalize(swap_layers(tiny_vit, bits)[0], [images()]))
    assert not torch.equal(weights, quant_model.blocks[0].mlp.fc2.weight)


def test_quantized_model_comes_closer(tiny_vit):
    model = uneven(tiny_vit)
    expected = model(images()).detach()
    errors = []
    for equalized in (False, True):
        scheme = dataclasses.replace(
            resolve_scheme("tensor-w8a4"), equalize=equalized, gelu="signed", activation_range="minmax"
        )
        quant_model, _ = swap_layers(model, scheme)
        if equalized:
            equalize(quant_model, [images()])
        calibrate(quant_model, [images()])
        with torch.no_grad():
            errors.append(float((quant_model(images()) - expected).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_an_outlier_channel_is_taken_in(tiny_vit):
    """One hidden unit a hundred times as large as the rest, for one output only (as in blocks.7 of ViT-Tiny)."""
    fc1, fc2 = tiny_vit.blocks[0].mlp.fc1, tiny_vit.blocks[0].mlp.fc2
    with torch.no_grad():
        fc1.weight[3], fc1.bias[3] = 0, 0
        fc1.weight[3, 0] = 100.0
        fc2.weight[1:, 3] = 0
        fc2.weight[0, 3] = 1.0
    quant_model, _ = swap_layers(tiny_vit, "tensor-w4a4")
    place = next(p for p in equalize(quant_model, [images()]) if p.name == "blocks.0.mlp.norm")
    assert place.error < 0.5 * place.error_before


@torch.no_grad()
def test_a_channel_of_rare_spikes_gets_a_range_of_its_own(tiny_vit, monkeypatch):
    """Too rare for the ranges of channels, which leave out what one row in a thousand has."""
    rows = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    rows[:5, 3] = 500.0
    found = []
    for is_searched in (True, False):
        if not is_searched:
            monkeypatch.setattr(channel_ratios, "_outlier_channels", lambda rows: [])
        found.append(best_ratios(rows, tiny_vit.blocks[0].mlp.fc1.weight, 4, 4))
    assert [place.outliers for place in found] == [(3,), ()]
    assert found[0].error < 0.5 * found[1].error


def test_outlier_channels_are_the_few_far_beyond_the_rest():
    rows = torch.ones(4, 20)
    rows[1, [2, 7]] = torch.tensor([-30.0, 11.0])
    rows[2, 5] = 9.0
    assert _outlier_channels(rows) == [2, 7]
    assert _outlier_channels(torch.ones(4, 20)) == []


def test_weight_scales_follow(tiny_vit):
    """Weight scales are parameters: a change of the weight has to set them again."""
    quant_model, _ = swap_layers(uneven(tiny_vit), "w8a8")
    calibrate(quant_model, [images()])
    equalize(quant_model, [images()])
    calibrate(quant_model, [images()])
    layer = quant_model.blocks[0].attn.qkv
    error = (layer.quant_weight().value - layer.weight).abs().amax(dim=1)
    assert (error <= layer.weight.abs().amax(dim=1) / 127).all()


@pytest.mark.parametrize("bits", ("w4a4", "w8a8"))
def test_channels_with_their_own_scales_are_only_shifted(tiny_vit, bits):
    model = uneven(tiny_vit)
    quant_model, _ = swap_layers(model, bits)
    expected = float_output(quant_model)
    before = {name: parameter.clone() for name, parameter in quant_model.named_parameters() if parameter.ndim > 1}
    places = equalize(quant_model, [images(), images(1)])
    assert (float_output(quant_model) - expected).norm() < 1e-4 * expected.norm()
    assert all(torch.equal(before[name], value) for name, value in quant_model.named_parameters() if value.ndim > 1)
    uniform = equalize(swap_layers(model, f"tensor-{bits}")[0], [images(), images(1)])
    for place, other in zip(places, uniform, strict=True):
        assert place.per_channel and place.scales.shape == (256 if "mlp.norm" in place.name else 64,)
        assert place.error < (0.8 if bits == "w4a4" else 1.5) * other.error


def test_ranges_of_channels_have_a_margin(tiny_vit):
    """The lowest value of a channel falls on the lowest code behind GELU, and 0.075 ranges inside behind a LayerNorm.
    """
    quant_model, _ = swap_layers(tiny_vit, "w8a8")
    places = {place.name: place for place in equalize(quant_model, [images()])}
    rows = collect_rows(quant_model, ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"], [images()], rows=10_000)
    for name, layer, inside in (
        ("blocks.0.norm2", "blocks.0.mlp.fc1", 0.075),
        ("blocks.0.mlp.norm", "blocks.0.mlp.fc2", 0),
    ):
        codes = rows[layer] / places[name].scales
        width = 255 / 1.15
        # Eight bits: no end of a range is worth clipping.
        lowest, highest = (torch.kthvalue(codes, k, dim=0).values for k in (1, len(codes)))
        whole = (highest - lowest - width).abs() < 1.0
        assert whole.float().mean() > 0.5
        assert torch.allclose(lowest[whole], torch.tensor(-128 + inside * width), atol=1.5)


def test_a_dead_channel_keeps_some_range(tiny_vit):
    with torch.no_grad():
        tiny_vit.blocks[0].norm1.weight[5], tiny_vit.blocks[0].norm1.bias[5] = 0.0, 0.0
    place = equalize(swap_layers(tiny_vit, "w4a4")[0], [images()])[0]
    assert place.scales[5] == pytest.approx(1e-3 * float(place.scales.median()), rel=0.3)


def test_same_images_same_bytes_and_nothing_left_behind(tiny_vit):
    one = swap_layers(tiny_vit, "w4a4")[0].train()
    two = swap_layers(tiny_vit, "w4a4")[0]
    rng = torch.get_rng_state()
    equalize(one, [images()]), equalize(two, [images()])
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert one.blocks[0].training and not any(module._forward_pre_hooks for module in one.modules())


def test_no_batch(tiny_vit):
    with pytest.raises(InputError, match="at least one batch of images, got none"):
        equalize(swap_layers(tiny_vit, "w4a4")[0], [])


def test_row_importance():
    target = torch.tensor([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]])  # powers 25, 0.25, 2500; median 25
    expected = [1 / (3 * max(power, 25) ** 0.75 * 25**0.25) for power in (25, 0.25, 2500)]
    assert row_importance(target).flatten().tolist() == pytest.approx(expected)
    same = torch.ones(5, 4)
    assert float((same.square() * row_importance(same)).sum()) == pytest.approx(1)
    assert torch.isfinite(row_importance(torch.zeros(3, 2))).all()


def brute_force(values, bits, weights, lowest):
    """Least weighted squared error over a grid of scales, in numpy."""
    top = 2 ** (bits - 1) - 1
    best, best_error = None, np.inf
    for index in range(20):
        scale = np.float32(abs(values).max() * lowest ** (index / 19) / top)
        rounded = np.clip(np.round(values / scale), -top - 1, top) * scale
        error = (weights * (rounded - values) ** 2).sum()
        if error < best_error:
            best, best_error = rounded, error
    return best, best_error


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_quantize_symmetric_against_brute_force(bits):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 40, generator=generator) * torch.tensor([[1.0], [1], [1], [1], [1], [20]])
    importance = torch.rand(6, 1, generator=generator) / torch.tensor([[1.0], [1], [1], [1], [1], [400]])
    for weights in (torch.ones(6, 1), importance):
        found = quantize_symmetric(values, bits, None if weights is not importance else importance)
        _, expected = brute_force(values.numpy(), bits, weights.numpy(), 0.03)
        assert float((weights * (found - values).square()).sum()) == pytest.approx(float(expected), rel=1e-4)
    rows = quantize_symmetric(values, bits, per_row=True)
    for row, original in zip(rows.numpy(), values.numpy(), strict=True):
        _, expected = brute_force(original[None], bits, 1.0, 0.3)
        assert float(((row - original) ** 2).sum()) == pytest.approx(float(expected), rel=1e-4)
        assert len(np.unique(row)) <= 2**bits
    assert torch.equal(quantize_symmetric(torch.zeros(2, 3), bits), torch.zeros(2, 3))


def test_collect_rows_sees_float_values_and_every_batch(tiny_vit):
    quant_model, _ = swap_layers(tiny_vit, "strict-w2a2")
    calibrate(quant_model, [images()])
    found = collect_rows(quant_model, ["blocks.1.mlp.fc1"], [images(0), images(1)], rows=10_000)["blocks.1.mlp.fc1"]
    expected = []
    handle = tiny_vit.blocks[1].mlp.fc1.register_forward_pre_hook(
        lambda _, args: expected.append(args[0].reshape(-1, 64))
    )
    with torch.no_grad():
        tiny_vit(images(0)), tiny_vit(images(1))
    handle.remove()
    assert found.shape == (2 * 4 * 17, 64)
    distance = torch.cdist(found, torch.cat(expected).detach(), compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(dim=1).values.max() < 1e-4
    assert len(distance.argmin(dim=1).unique()) == len(found)
    few = collect_rows(quant_model, ["blocks.1.mlp.fc1"], [images(0), images(1)], rows=6)["blocks.1.mlp.fc1"]
    assert few.shape == (6, 64)


def test_collect_rows_gives_prefix_tokens_an_eighth(tiny_vit):
    quant_model, _ = swap_layers(tiny_vit, "w4a4")
    places = ["blocks.1.mlp.fc1", "blocks.1.attn.probabilities", "head"]
    prefix = []
    handle = tiny_vit.blocks[1].mlp.fc1.register_forward_pre_hook(lambda _, args: prefix.append(args[0][:, 0]))
    batches = [torch.cat([images(seed), images(seed + 10)]) for seed in range(4)]
    with torch.no_grad():
        for batch in batches:
            tiny_vit(batch)
    handle.remove()
    found = collect_rows(quant_model, places, batches, rows=4 * 48)
    rows = found["blocks.1.mlp.fc1"]
    distance = torch.cdist(rows, torch.cat(prefix).detach(), compute_mode="donot_use_mm_for_euclid_dist")
    assert rows.shape == (4 * 48, 64)
    assert (distance.min(dim=1).values < 1e-4).sum() == 4 * 6
    assert found["blocks.1.attn.probabilities"].shape == (4 * 48, 17)
    assert found["head"].shape == (len(torch.cat(batches)), 64)


def test_a_silent_hidden_unit_gets_most_of_the_usual_range(tiny_vit):
    with torch.no_grad():
        tiny_vit.blocks[0].mlp.fc1.bias[5] = -30.0  # never fires here
        tiny_vit.blocks[0].mlp.fc1.weight[7] *= 1e-3
    quant_model, _ = swap_layers(tiny_vit, "w4a4")
    (place,) = [place for place in equalize(quant_model, [images()]) if place.name == "blocks.0.mlp.norm"]
    for unit in (5, 7):
        assert float(place.scales[unit]) == pytest.approx(0.75 * float(place.scales.median()), rel=0.15)
    assert float(place.scales.min()) > 0.5 * float(place.scales.median())
