"""What prepare_for_fx gives computes what the model computes, and Brevitas quantizes it; what cannot be is refused."""

import pytest
import timm
import torch
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas.graph.quantize import quantize
from brevitas.graph.target.flexml import preprocess_for_flexml_quantize
from brevitas.graph.target.flexml import quantize_flexml
from brevitas.nn import QuantConv2d
from brevitas.nn import QuantLinear
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maskaq_brevitas import prepare_for_fx
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.tuning.calibrate import calibrate

SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
DISTILLED = dict(create=timm.create_model, model_name="deit_tiny_distilled_patch16_224", img_size=32, depth=1)


def build(create=VisionTransformer, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create(**options).eval()


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    (
        SMALL, dict(SMALL, qk_norm=True, qkv_bias=False), dict(SMALL, reg_tokens=3), dict(SMALL, init_values=0.1),
        DISTILLED,
    ),  # fmt: skip
)
def test_computes_what_the_model_computes_and_is_quantized(options):
    model = build(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    traced = prepare_for_fx(model)
    nodes = list(traced.graph.nodes)
    assert [node.op for node in nodes].count("placeholder") == 1
    assert not any(node.op == "call_method" and node.target in ("transpose", "unbind") for node in nodes)
    names = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert names <= {node.target for node in nodes if node.op == "call_module"}
    flows = (
        quantize(preprocess_for_quantize(prepare_for_fx(model))),
        quantize_flexml(preprocess_for_flexml_quantize(prepare_for_fx(model), images())),
    )
    with torch.no_grad():
        expected = model(images())
        torch.testing.assert_close(traced(images()), expected, rtol=1e-5, atol=1e-5)
        for quant_model in flows:
            assert names == {
                name for name, module in quant_model.named_modules() if isinstance(module, (QuantLinear, QuantConv2d))
            }
            calibrate(quant_model, [images()])
            # 8 bits: correlated with the float model, and not it
            output = quant_model(images())
            assert not torch.equal(output, expected)
            assert torch.cosine_similarity(output.flatten(), expected.flatten(), dim=0) > 0.8
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        for parameter in traced.parameters():
            parameter.zero_()
        assert torch.equal(model(images()), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(create=timm.create_model, model_name="swin_tiny_patch4_window7_224"), "SwinTransformer cannot be"),
        (dict(create=timm.create_model, model_name="beit_base_patch16_224", depth=1), "Beit cannot be"),
        (dict(create=timm.create_model, model_name="resnet10t"), "it has no attention"),
        (dict(create=timm.create_model, model_name="cait_xxs24_224", depth=1), "Cait cannot be"),
        (dict(SMALL, class_token=False, global_pool="avg"), "pools by global_pool='avg'"),
        (dict(SMALL, global_pool="map"), "cannot be prepared for FX"),
        (dict(SMALL, dynamic_img_size=True), "dynamic_img_size=False and the img_size"),
    ),
)
def test_what_cannot_be_prepared_is_refused(options, message):
    with pytest.raises(ModelError, match=message) as caught:
        prepare_for_fx(build(**options))
    if "resnet" not in str(options):
        assert "Way round: quantize by swapping modules" in str(caught.value)


def test_what_a_tracer_cannot_follow_is_refused():
    class Branching(VisionTransformer):
        def forward_features(self, x, **options):
            return super().forward_features(x if x.sum() > 0 else -x, **options)

    with pytest.raises(ModelError, match="Branching cannot be prepared for FX: its forward pass .* traced .TraceError"):
        prepare_for_fx(build(Branching, **SMALL))
