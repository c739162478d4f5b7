"""Training twins compute what Brevitas computes and hand the same gradients to the same parameters, bit for bit."""

import warnings

import pytest
import torch
from brevitas.nn import QuantIdentity
from brevitas.quant import Int8ActPerTensorFloat

from maskaq_brevitas.errors import CompilationWarning, ModelError
from maskaq_brevitas.quant import trainable
from maskaq_brevitas.quant.trainable import compile_blocks, training_twin
from tests.quant.test_snapshot import SCHEMES, calibrated, images


def gradients(model, parameters):
    for parameter in parameters.values():
        parameter.grad = None
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(3))
    (model(images(seed=2) * 2) * weight).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


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
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-5 * float(theirs[name].abs().max()), msg=name)


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
        torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-3 * float(plain[name].abs().max()), msg=name)
