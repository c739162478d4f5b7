"""Training twins compute what Brevitas computes, bit for bit, and hand the same gradients to the same parameters."""

import dataclasses
import warnings

import pytest
import torch
from brevitas.core.function_wrapper import TensorClampSte
from brevitas.graph.calibrate import quantization_status_manager
from brevitas.nn import QuantIdentity
from brevitas.quant import Int8ActPerTensorFloat

from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import CompilationWarning
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.modes import seeded
from maskaq_brevitas.quant import trainable
from maskaq_brevitas.quant.equalize import equalize
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.quant.trainable import biases_follow
from maskaq_brevitas.quant.trainable import compile_blocks
from maskaq_brevitas.quant.trainable import quantization_dropped
from maskaq_brevitas.quant.trainable import scales_turn
from maskaq_brevitas.quant.trainable import set_pivots
from maskaq_brevitas.quant.trainable import training_twin
from maskaq_brevitas.tuning.calibrate import calibrate
from maskaq_brevitas.tuning.ranges import search_ranges
from maskaq_brevitas.tuning.ranges import set_channel_scales
from tests.quant.test_snapshot import SCHEMES
from tests.quant.test_snapshot import calibrated
from tests.quant.test_snapshot import images


def gradients(model, parameters):
    for parameter in parameters.values():
        parameter.grad = None
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(3))
    (model(images(seed=2) * 2) * weight).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


def assert_close_gradients(ours, theirs):
    """That of a single scale is a sum over a whole tensor, in another order: it may be off by a part of the largest."""
    largest = max(float(gradient.abs().max()) for gradient in theirs.values() if gradient.numel() == 1)
    for name, gradient in ours.items():
        size = largest if gradient.numel() == 1 else float(theirs[name].abs().max())
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-5 * size, msg=name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_and_gradients_equal_brevitas(tiny_vit, scheme):
    quant_model = calibrated(tiny_vit, scheme).requires_grad_(True)
    twin = training_twin(quant_model)
    parameters = dict(quant_model.named_parameters())
    assert {id(parameter) for parameter in twin.parameters()} <= {id(parameter) for parameter in parameters.values()}
    for batch in (images(), images(seed=2) * 5, torch.zeros(1, 3, 32, 32)):
        assert torch.equal(twin(batch), quant_model(batch))
    ours, theirs = gradients(twin, parameters), gradients(quant_model, parameters)
    zero_points = {name for name in theirs if "zero_point" in name}  # the twin keeps them fixed
    assert set(ours) == set(theirs) - zero_points and len(ours) > 30
    assert_close_gradients(ours, theirs)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_activation_scales_equal_brevitas_bit_for_bit(tiny_vit, scheme):
    """In the whole model the two sum over tensors that lie in memory in other orders; here over the same ones."""
    quant_model = calibrated(tiny_vit, scheme).requires_grad_(True)
    twin = training_twin(quant_model)
    source = torch.Generator().manual_seed(5)
    checked = 0
    for name, module in quant_model.named_modules():
        if not isinstance(module, QuantIdentity) or not module.act_quant.is_quant_enabled:
            continue
        ours = twin.get_submodule(name)
        x, weight = torch.randn(2, 2, 2, 17, 17, generator=source)
        x = x * ours.value.detach() * 0.7  # some within the range, some beyond
        found = []
        for quantizer in (ours, module):
            x, ours.value.grad = x.detach().requires_grad_(True), None
            (quantizer(x) * weight).sum().backward()
            found.append((x.grad, ours.value.grad))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1]), name
        checked += 1
        assert 0.02 < (found[0][0] == 0).float().mean() < 0.9 or ours.clamps_through, name
    assert checked >= 4


def test_tokens_pass_unrounded_where_quantization_is_dropped(tiny_vit):
    quant_model = calibrated(tiny_vit, "w3a3")
    twin = training_twin(quant_model)
    query, fc2 = twin.blocks[0].attn.query, twin.blocks[1].mlp.fc2.input_quant
    source = torch.Generator().manual_seed(4)
    tokens = torch.randn(2, 2, 17, 32, generator=source), torch.randn(2, 17, 256, generator=source)
    rounded = [quantizer(x) for quantizer, x in zip((query, fc2), tokens, strict=True)]
    weight, output = twin.head.weight_quant(twin.head.weight), twin(images())
    with seeded(0), quantization_dropped(twin) as share:
        assert torch.equal(twin(images()), output)  # nothing, while the share is 0
        share.fill_(0.3)
        for quantizer, x, wanted in zip((query, fc2), tokens, rounded, strict=True):
            x.requires_grad_(True)
            found = quantizer(x)
            is_float = (found == x).all(dim=-1)
            assert torch.equal(found[~is_float], wanted[~is_float]) and 0.05 < is_float.float().mean() < 0.6
            found.sum().backward()
            assert (x.grad[is_float] == 1).all()
        assert not torch.equal(query(tokens[0]), query(tokens[0]))  # others in each call
        share.fill_(1.0)
        off = quantization_status_manager(
            quant_model, disable_act_quant=True, disable_weight_quant=False, is_training=False
        )
        with off, torch.no_grad():
            torch.testing.assert_close(twin(images()), quant_model(images()), rtol=0.05, atol=0.05)
        # 8 bits, weights and images are rounded all the same.
        assert torch.equal(twin.head.weight_quant(twin.head.weight), weight)
        for quantizer in (twin.head.input_quant, twin.patch_embed.proj.input_quant, twin.blocks[0].attn.probabilities):
            assert quantizer.dropped is None
    assert torch.equal(twin(images()), output) and query.dropped is None


def test_images_are_rounded_at_low_bits_too(tiny_vit):
    twin = training_twin(calibrated(tiny_vit, "strict-w4a4"))
    with quantization_dropped(twin):
        assert twin.patch_embed.proj.input_quant.dropped is None
        assert twin.blocks[0].attn.probabilities.dropped is not None


def test_what_is_trained_in_the_twin_is_trained_in_the_model(tiny_vit):
    quant_model = calibrated(tiny_vit, "w4a4").requires_grad_(True)
    twin = training_twin(quant_model)
    before = quant_model(images()).detach()
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
    twin(images()).square().sum().backward()
    optimizer.step()
    assert torch.equal(twin(images()), quant_model(images()))
    assert not torch.equal(quant_model(images()), before)


def test_a_quantizer_without_a_scale_of_its_own_is_refused(tiny_vit):
    quant_model = calibrated(tiny_vit, "w4a4")
    quant_model.blocks[0].attn.query = QuantIdentity(
        act_quant=Int8ActPerTensorFloat.let(scaling_impl_type="const", scaling_init=1.0), return_quant_tensor=False
    ).eval()
    with pytest.raises(ModelError, match="expected a scale that is one learned parameter"):
        training_twin(quant_model)


def test_a_quantizer_that_hands_gradients_on_beyond_its_range(tiny_vit):
    quant_model, _ = swap_layers(tiny_vit, dataclasses.replace(resolve_scheme("w4a4"), equalize=False))
    quant_model.blocks[0].attn.query = QuantIdentity(
        act_quant=Int8ActPerTensorFloat.let(tensor_clamp_impl=TensorClampSte), return_quant_tensor=False
    ).eval()
    calibrate(quant_model, [images(seed=1)])
    quant_model.requires_grad_(True)
    twin = training_twin(quant_model)
    assert twin.blocks[0].attn.query.clamps_through and not twin.blocks[0].attn.key.clamps_through
    parameters = dict(quant_model.named_parameters())
    beyond = images(seed=2) * 5
    assert torch.equal(twin(beyond), quant_model(beyond))
    ours, theirs = gradients(twin, parameters), gradients(quant_model, parameters)
    assert_close_gradients(ours, theirs)


def test_a_scale_that_is_more_than_its_parameter_is_refused(tiny_vit, monkeypatch):
    quant_model = calibrated(tiny_vit, "w4a4")
    proxy = quant_model.blocks[0].attn.query.act_quant
    scale = proxy.scale()
    monkeypatch.setattr(proxy, "scale", lambda: scale * 1.01)
    with pytest.raises(ModelError, match="the scale is not its parameter divided by a whole number"):
        training_twin(quant_model)


def test_blocks_run_uncompiled_where_compilation_fails(tiny_vit, monkeypatch):
    def no_compiler(function):
        def fail(*inputs):
            raise RuntimeError("no C++ compiler found\nmore lines")

        return fail

    monkeypatch.setattr(trainable._Compiled, "failed", False)
    monkeypatch.setattr(torch, "compile", no_compiler)
    twin = training_twin(calibrated(tiny_vit, "w4a4"))
    expected = twin(images())
    compile_blocks(twin)
    with pytest.warns(CompilationWarning, match="run uncompiled, about two times slower: no C.. compiler found$"):
        assert torch.equal(twin(images()), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin(images())


def shifted_model(tiny_vit):
    """A quant model whose channels are shifted, and whose layers know the mean of their input."""
    quant_model, _ = swap_layers(tiny_vit, "w4a4")
    places = equalize(quant_model, [images()])
    calibrate(quant_model, [images()])
    set_channel_scales(quant_model, {name: place.scales for place in places for name in place.consumers})
    search_ranges(quant_model, [images()], biases=True)
    return quant_model.requires_grad_(True)


def shifted_places(twin):
    """Layer and what shifts its input, for every place whose channels have scales of their own."""
    for block in twin.blocks:
        yield block.attn.qkv, block.norm1.bias
        yield block.mlp.fc1, block.norm2.bias
        yield block.mlp.fc2, block.mlp.norm.offset


def test_pivots_change_no_output_and_give_scales_the_gradient_of_their_shift(tiny_vit):
    quant_model = shifted_model(tiny_vit)
    twin = training_twin(quant_model)
    expected = twin(images())
    set_pivots(twin, quant_model)
    assert torch.equal(twin(images()), expected)
    quantizer = twin.blocks[0].mlp.fc2.input_quant
    x = torch.randn(7, 5, quantizer.value.numel(), generator=torch.Generator().manual_seed(0))
    (ours,) = torch.autograd.grad(quantizer(x).square().sum(), quantizer.value)
    before, pivot = quantizer.value.detach().clone(), quantizer.pivot.clone()
    quantizer.pivot = None
    shift = pivot * (1 - (quantizer.value / before).reshape(quantizer.shape))
    (wanted,) = torch.autograd.grad((quantizer(x - shift) + shift).square().sum(), quantizer.value)
    torch.testing.assert_close(ours, wanted)
    (plain,) = torch.autograd.grad(quantizer(x).square().sum(), quantizer.value)
    assert (ours - plain).norm() > 0.05 * plain.norm()


def test_turned_scales_keep_the_code_of_zero_behind_a_gelu_and_of_the_mean_behind_a_norm(tiny_vit):
    quant_model = shifted_model(tiny_vit)
    twin = training_twin(quant_model)
    set_pivots(twin, quant_model)
    places = list(shifted_places(twin))
    assert len(places) == 6

    def points():
        """Zero behind GELUs and the mean behind LayerNorms, as the quantizers see them, and in steps of the scale."""
        values = [
            shifted.detach() if shifted.numel() == 256 else quant_model.get_submodule(name).input_mean
            for (_, shifted), name in zip(places, names, strict=True)
        ]
        scales = [layer.input_quant.value.detach().flatten() for layer, _ in places]
        return values, [value / scale for value, scale in zip(values, scales, strict=True)]

    names = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    for value, (layer, _) in zip(points()[0], places, strict=True):
        assert torch.equal(layer.input_quant.pivot.flatten(), value)
    before, positions = points()[1], [shifted.detach().clone() for _, shifted in places]
    for factor in (1.2, 0.9):
        with torch.no_grad(), scales_turn(twin), biases_follow(twin):
            for layer, _ in places:
                layer.input_quant.value.mul_(factor)
    for old, new, position, (_, shifted) in zip(before, points()[1], positions, places, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
        assert not torch.equal(shifted, position)
    assert torch.equal(twin(images()), quant_model(images()))


def test_what_lies_at_a_pivot_is_off_by_its_rounding_alone(tiny_vit):
    quant_model = shifted_model(tiny_vit)
    twin = training_twin(quant_model)
    set_pivots(twin, quant_model)
    for layer, _ in shifted_places(twin):
        with torch.no_grad():
            pivot = layer.input_quant.pivot.clone()
            before, rounded = layer(pivot), layer.input_quant(pivot)
            with scales_turn(twin), biases_follow(twin):
                layer.input_quant.value.mul_(1.1)
            after = layer(layer.input_quant.pivot)
            expected = before + torch.nn.functional.linear(0.1 * (rounded - pivot), layer.weight_quant(layer.weight))
        torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.heavy
def test_compiled_blocks_compute_the_same(tiny_vit):
    quant_model = calibrated(tiny_vit, "w4a4").requires_grad_(True)
    twin = training_twin(quant_model)
    parameters = dict(quant_model.named_parameters())
    plain_output, plain = twin(images()).detach(), gradients(twin, parameters)
    compile_blocks(twin)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompilationWarning)
        torch.testing.assert_close(twin(images()).detach(), plain_output, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients(twin, parameters).items():
        # Fused arithmetic rounds a tie the other way now and then, and a scale's gradient is a sum that cancels.
        torch.testing.assert_close(
            gradient, plain[name], rtol=1e-2, atol=1e-2 * float(plain[name].abs().max()), msg=name
        )
