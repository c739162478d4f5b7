"""Taps in FX graphs see what taps in the module see, and leave the graph as it was."""

import pytest
import torch
from borrowed import hooks
from brevitas.fx import symbolic_trace
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas.graph.quantize import quantize
from brevitas.graph.standardize import TorchFunctionalToModule
from brevitas.nn.quant_sdpa import QuantScaledDotProductAttention
from brevitas.nn.quant_sdpa import ScaledDotProductAttention
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas import prepare_for_fx
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.attention_tap import attention_tap
from maskaq_brevitas.models.graph_attention import is_graph_module
from maskaq_brevitas.quant.snapshot import frozen_snapshot
from maskaq_brevitas.tuning.calibrate import calibrate

POINTS = ("logits", "probabilities", "context")


class OneArgument(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def brevitas_fused(model):
    return symbolic_trace(OneArgument(model))


def torch_fused(model):
    return torch.fx.symbolic_trace(OneArgument(model))


def as_modules(model):
    fused = ((F.scaled_dot_product_attention, ScaledDotProductAttention),)
    return TorchFunctionalToModule(fn_to_module_map=fused).apply(symbolic_trace(OneArgument(model)))


@pytest.mark.parametrize("trace", (prepare_for_fx, brevitas_fused, torch_fused, as_modules))
def test_sees_what_the_module_sees(tiny_vit, trace):
    traced = trace(tiny_vit)
    assert is_graph_module(traced) and not is_graph_module(tiny_vit)
    code, names = traced.code, [name for name, _ in traced.named_modules()]
    with torch.no_grad():
        expected = traced(images())
        with attention_tap(tiny_vit, *POINTS) as wanted, attention_tap(traced, *POINTS) as found:
            tiny_vit(images())
            torch.testing.assert_close(traced(images()), expected, rtol=1e-5, atol=1e-5)
            for point in POINTS:
                assert len(getattr(found, point)) == 2
                torch.testing.assert_close(getattr(found, point), getattr(wanted, point), rtol=1e-4, atol=1e-5)
            traced(images(1))
            assert [maps.shape[0] for maps in found.logits] == [1, 1]
        assert traced.code == code and [name for name, _ in traced.named_modules()] == names and hooks(traced) == 0
        assert torch.equal(traced(images()), expected)


def test_is_put_back_after_an_error_and_when_nested(tiny_vit):
    traced = prepare_for_fx(tiny_vit)
    code = traced.code
    with pytest.raises(KeyError):
        with attention_tap(traced, "logits", "values"):
            pass
    assert traced.code == code and hooks(traced) == 0
    with attention_tap(traced, "logits") as outer, torch.no_grad():
        with attention_tap(traced, "probabilities") as inner:
            traced(images())
            torch.testing.assert_close([logits.softmax(-1) for logits in outer.logits], inner.probabilities)
        traced(images(1))
        assert len(outer.logits[0]) == 1 and len(inner.probabilities[0]) == 2
    assert traced.code == code and hooks(traced) == 0 and not hasattr(traced, "attention_taps")


def test_quantized_attention_is_written_out(tiny_vit):
    traced = as_modules(tiny_vit)
    for name, module in list(traced.named_modules()):
        if isinstance(module, ScaledDotProductAttention):
            traced.set_submodule(name, QuantScaledDotProductAttention(attn_output_weights_bit_width=3))
    calibrate(traced, [images()])
    snapshot = frozen_snapshot(traced)
    with torch.no_grad():
        expected = traced(images())
        with attention_tap(traced, *POINTS) as seen, attention_tap(snapshot, *POINTS) as frozen:
            assert torch.equal(traced(images()), expected) and torch.equal(snapshot(images()), expected)
            for point in POINTS:
                assert len(getattr(seen, point)) == 2
                torch.testing.assert_close(getattr(seen, point), getattr(frozen, point), rtol=0, atol=0)
    probabilities = seen.probabilities[0]  # behind the softmax, before its quantizer: rows sum to one, many values
    torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities[..., 0]))
    assert len(probabilities.unique()) > 8


def test_quantizers_beside_the_softmax_are_passed_over(tiny_vit):
    from brevitas.nn import QuantIdentity

    traced = prepare_for_fx(tiny_vit)
    for name in ("blocks.0.attn.probabilities", "blocks.1.attn.probabilities"):
        traced.set_submodule(name, QuantIdentity(bit_width=2))
    calibrate(traced, [images()])
    with attention_tap(traced, "probabilities", "context") as found, torch.no_grad():
        traced(images())
    assert len(found.context) == 2
    torch.testing.assert_close(found.probabilities[1].sum(-1), torch.ones(2, 2, 17))


def test_gradient_of_a_quantized_trace_reaches_the_image(tiny_vit):
    quant_model = quantize(preprocess_for_quantize(prepare_for_fx(tiny_vit)))
    calibrate(quant_model, [images()])
    batch = images().requires_grad_(True)
    with attention_tap(quant_model, "logits") as record:
        quant_model(batch)
        (gradient,) = torch.autograd.grad(record.logits[1].square().sum(), batch)
    assert torch.isfinite(gradient).all() and gradient.any()


class Classifier(nn.Module):
    """A softmax that is no attention: its input is a matmul, and nothing multiplies what it gives."""

    def forward(self, x):
        return torch.softmax(x @ x.transpose(-2, -1), dim=-1).sum()


class Masked(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_what_is_no_attention_is_refused():
    with pytest.raises(ModelError, match="No attention found in the graph of Classifier"):
        with attention_tap(torch.fx.symbolic_trace(Classifier()), "logits"):
            pass
    masked = torch.fx.symbolic_trace(Masked())
    with pytest.raises(ModelError, match="with a mask, dropout or grouped queries is not known"):
        with attention_tap(masked, "logits"):
            masked(torch.zeros(1, 1, 2, 4))
    assert "attention_taps" not in masked.code
    for name in ("pre_process_q", "pre_process_v"):
        model = torch.nn.Sequential(ScaledDotProductAttention(**{name: torch.relu}))
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_module("0", (x, x, x)))
        with pytest.raises(ModelError, match=f"with {name} cannot be tapped"):
            with attention_tap(torch.fx.GraphModule(model, graph), "logits"):
                pass
