"""Snapshots compute what Brevitas computes, bit for bit, and hand the same gradient to the image."""

import copy
import dataclasses

import pytest
import torch
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas.graph.quantize import quantize
from brevitas.graph.target.flexml import preprocess_for_flexml_quantize
from brevitas.graph.target.flexml import quantize_flexml
from brevitas.nn import QuantConv2d
from brevitas.nn import QuantIdentity
from brevitas.nn import QuantLinear
from brevitas.quant import Int8ActPerTensorFloat

from maskaq_brevitas import prepare_for_fx
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.quant.equalize import equalize
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.quant.snapshot import frozen_snapshot
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.calibrate import calibrate
from maskaq_brevitas.tuning.ranges import search_ranges


def images(batch=3, seed=0):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def calibrated(model, scheme):
    scheme = resolve_scheme(scheme)
    quant_model, _ = swap_layers(model, scheme)
    if scheme.equalize:
        equalize(quant_model, [images(seed=1)])
    calibrate(quant_model, [images(seed=1)])
    if scheme.activation_range == "search":
        search_ranges(quant_model, [images(seed=1)])
    return quant_model


SCHEMES = (
    "w8a8", "w4a4", "tensor-w4a4", "strict-w3a3", "w2a2",
    dataclasses.replace(resolve_scheme("strict-w4a4"), equalize=False),
    dataclasses.replace(resolve_scheme("w3a4"), equalize=False, activation_range="percentile", softmax="signed"),
)  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_brevitas_bit_for_bit(tiny_vit, scheme):
    quant_model = calibrated(tiny_vit, scheme)
    snapshot = frozen_snapshot(quant_model)
    for batch in (images(), images(seed=2) * 5, torch.zeros(1, 3, 32, 32)):
        with torch.no_grad():
            expected = quant_model(batch)
            assert torch.equal(snapshot(batch), expected)
        mine, theirs = (batch.clone().requires_grad_(True) for _ in range(2))
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
        (ours,) = torch.autograd.grad((snapshot(mine) * weight).sum(), mine)
        (brevitas,) = torch.autograd.grad((quant_model(theirs) * weight).sum(), theirs)
        assert brevitas.any() or not batch.any()
        torch.testing.assert_close(ours, brevitas, rtol=1e-6, atol=1e-6)


def test_asymmetric_quantizer_is_covered(tiny_vit):
    quant_model = calibrated(tiny_vit, SCHEMES[5])
    assert float(quant_model.blocks[0].mlp.fc2.input_quant.zero_point()) != 0
    assert frozen_snapshot(quant_model).blocks[0].mlp.fc2.input_quant.shifted


def test_snapshot_is_a_frozen_copy(tiny_vit):
    quant_model = calibrated(tiny_vit, "w4a4").train()
    before = {name: tensor.clone() for name, tensor in quant_model.state_dict().items()}
    snapshot = frozen_snapshot(quant_model)
    assert not any(parameter.requires_grad for parameter in snapshot.parameters())
    assert not any(module.training for module in snapshot.modules())
    assert not any(isinstance(module, (QuantLinear, QuantConv2d, QuantIdentity)) for module in snapshot.modules())
    with torch.no_grad():
        expected = snapshot(images())
        for parameter in quant_model.parameters():
            parameter.add_(1.0)
        assert torch.equal(snapshot(images()), expected)
        for parameter in quant_model.parameters():
            parameter.sub_(1.0)
    assert all(module.training for module in quant_model.modules() if isinstance(module, QuantLinear))
    assert before.keys() == quant_model.state_dict().keys()


def test_float_snapshot(digits_vit):
    snapshot = float_snapshot(digits_vit.train())
    assert all(isinstance(block.attn, ExplicitAttention) for block in snapshot.blocks)
    assert not any(isinstance(block.attn, ExplicitAttention) for block in digits_vit.blocks)
    assert digits_vit.training and not snapshot.training
    assert all(parameter.requires_grad for parameter in digits_vit.parameters())
    assert not any(parameter.requires_grad for parameter in snapshot.parameters())
    with torch.no_grad():
        torch.testing.assert_close(snapshot(images()), digits_vit.eval()(images()), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_frozen_is_refused(tiny_vit):
    def refused(module, message):
        model = copy.deepcopy(tiny_vit)
        model.head = module
        with pytest.raises(ModelError, match=message):
            frozen_snapshot(model)

    from brevitas.nn import QuantConv1d

    refused(QuantLinear(64, 10, bias=True, output_quant=Int8ActPerTensorFloat), "head: output or bias quantizers")
    refused(QuantConv1d(4, 4, 1), "head: QuantConv1d cannot be frozen; expected QuantLinear, or QuantConv2d")
    refused(QuantConv2d(4, 4, 3, padding=1, padding_mode="reflect"), "head: QuantConv2d cannot be frozen")
    per_channel = Int8ActPerTensorFloat.let(scaling_per_output_channel=True, per_channel_broadcastable_shape=(1, 5, 1),
                                           scaling_stats_permute_dims=(1, 0, 2))  # fmt: skip
    refused(QuantIdentity(act_quant=per_channel), "expected one static scale, or one per channel of the last axis")


def traced(model, flow):
    if flow == "flexml":
        return quantize_flexml(preprocess_for_flexml_quantize(prepare_for_fx(model), images()))
    return quantize(preprocess_for_quantize(prepare_for_fx(model)))


@pytest.mark.parametrize("flow", ("quantize", "flexml"))
def test_traced_model_equals_brevitas_bit_for_bit(tiny_vit, flow):
    """Biases are quantized in both flows, and neighbouring residual additions share quantizers."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in tiny_vit.named_parameters():
        if name.endswith("bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    quant_model = traced(tiny_vit, flow)
    calibrate(quant_model, [images(seed=1)])
    snapshot = frozen_snapshot(quant_model, (3, 32, 32))
    assert not any(isinstance(module, (QuantLinear, QuantConv2d, QuantIdentity)) for module in snapshot.modules())
    head, frozen = quant_model.get_submodule("head"), snapshot.get_submodule("head")
    assert head.bias.shape == frozen.bias.shape and not torch.equal(head.bias, frozen.bias)
    for batch in (images(), images(seed=2) * 5):
        mine, theirs = (batch.clone().requires_grad_(True) for _ in range(2))
        expected = quant_model(theirs)
        found = snapshot(mine)
        assert torch.equal(found, expected)
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
        (ours,) = torch.autograd.grad((found * weight).sum(), mine)
        (brevitas,) = torch.autograd.grad((expected * weight).sum(), theirs)
        torch.testing.assert_close(ours, brevitas, rtol=1e-5, atol=1e-6)


def test_quantized_biases_need_the_input_size(tiny_vit):
    quant_model = traced(tiny_vit, "quantize")
    calibrate(quant_model, [images(seed=1)])
    with pytest.raises(ModelError, match="can freeze biases, if it is told the input_size"):
        frozen_snapshot(quant_model)
