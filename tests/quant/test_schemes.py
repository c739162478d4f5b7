"""Facts about the Brevitas quantizers that a scheme asks for."""

import dataclasses

import pytest
import torch
from brevitas.nn import QuantIdentity

from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.quant.schemes import activation_quantizer
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.calibrate import calibrate

PLAIN = dataclasses.replace(
    resolve_scheme("strict-w4a4"), equalize=False, activation_range="minmax", weight_range="minmax"
)


def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def swapped(model, **changes):
    quant_model, _ = swap_layers(model, dataclasses.replace(PLAIN, **changes))
    calibrate(quant_model, [images()])
    return quant_model


@pytest.mark.parametrize("weight_levels", ("all", "symmetric"))
@pytest.mark.parametrize("weight_range", ("minmax", "mse"))
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_use_all_levels_they_should(tiny_vit, bits, weight_range, weight_levels):
    from maskaq_brevitas.config import LayerBits

    quant_model = swapped(tiny_vit, bits=LayerBits(bits, 8), weight_range=weight_range, weight_levels=weight_levels)
    layer = quant_model.blocks[0].mlp.fc1
    quantized = layer.quant_weight()
    scale = quantized.scale
    assert scale.shape == (256, 1) and len(scale.unique()) > 200  # one per output channel
    codes = (quantized.value / scale).round()
    torch.testing.assert_close(codes * scale, quantized.value)
    narrow = bits == 8 or (bits > 2 and (weight_range, weight_levels) != ("mse", "all"))
    low = -(2 ** (bits - 1)) + int(narrow)
    assert (codes.min(), codes.max()) == (low, 2 ** (bits - 1) - 1)
    if bits == 2:
        assert codes.unique().tolist() == [-2, -1, 0, 1]
    if weight_range == "minmax" and bits > 2:
        expected = tiny_vit.blocks[0].mlp.fc1.weight.detach().abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        torch.testing.assert_close(scale.detach(), expected)


def codes_at(module, quant_model):
    seen = []
    handle = module.register_forward_hook(lambda _m, _i, output: seen.append(output.detach()))
    with torch.no_grad():
        quant_model(images())
    handle.remove()
    return (seen[0] / module.act_quant.scale()).round()


def test_softmax_is_unsigned_or_signed_as_said(tiny_vit):
    unsigned, signed = swapped(tiny_vit), swapped(tiny_vit, softmax="signed")
    places = [model.blocks[0].attn.probabilities for model in (unsigned, signed)]
    assert not places[0].act_quant.is_signed and places[1].act_quant.is_signed
    assert codes_at(places[0], unsigned).max() == 15 and codes_at(places[1], signed).max() == 7
    assert codes_at(places[0], unsigned).min() >= 0


def test_operands_are_signed_around_zero(tiny_vit):
    quant_model = swapped(tiny_vit)
    for operand in ("query", "key", "value"):
        place = quant_model.blocks[1].attn.get_submodule(operand)
        codes = codes_at(place, quant_model)
        assert place.act_quant.is_signed and float(place.act_quant.zero_point()) == 0
        assert codes.min() in (-8, -7) and codes.max() in (7, 8) and codes.min() >= -8


def test_gelu_has_a_zero_point_unless_signed_or_equalized(tiny_vit):
    def quantizer(**changes):
        return swapped(tiny_vit, **changes).blocks[0].mlp.fc2.input_quant

    asymmetric = quantizer()
    assert not asymmetric.is_signed and 0 < float(asymmetric.zero_point()) < 15
    assert float(asymmetric.zero_point()) == round(float(asymmetric.zero_point()))
    for changes in ({"gelu": "signed"}, {"equalize": True}):
        assert quantizer(**changes).is_signed and float(quantizer(**changes).zero_point()) == 0
    others = swapped(tiny_vit).blocks[0]
    for layer in (others.mlp.fc1, others.attn.qkv, others.attn.proj):
        assert layer.input_quant.is_signed and float(layer.input_quant.zero_point()) == 0


@pytest.mark.parametrize("rule", ("percentile", "minmax", "mse", "search"))
def test_range_rules(rule):
    """One outlier in 200,000 values: min-max keeps it, the others do not."""
    values = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    values[0, 5] = 100.0
    scheme = dataclasses.replace(PLAIN, activation_range=rule)
    module = QuantIdentity(act_quant=activation_quantizer("signed", 4, scheme))
    calibrate(module, [values])
    top = float(module.act_quant.scale()) * 8
    assert top == pytest.approx(100) if rule in ("minmax", "search") else top < 50
