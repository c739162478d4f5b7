"""The layer swap: what is quantized, at which bits, and that the float function stays."""

import dataclasses

import pytest
import timm
import torch
from brevitas.graph.calibrate import quantization_status_manager
from brevitas.nn import QuantConv2d
from brevitas.nn import QuantIdentity
from brevitas.nn import QuantLinear
from timm.layers import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.errors import SkippedLayerWarning
from maskaq_brevitas.quant.equalize import equalize
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.calibrate import calibrate

SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
OPERANDS = ("query", "key", "value", "probabilities")


def build(create=VisionTransformer, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create(**options).eval()
        for parameter in model.parameters():  # biases and LayerScales start at constants that would hide mistakes
            nn.init.normal_(parameter, std=0.2) if parameter.ndim == 1 else None
    return model


def vit(**changes):
    return build(**{**SMALL, **changes})


def images(model, batch=2):
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def unquantized(model):
    return quantization_status_manager(model, disable_act_quant=True, disable_weight_quant=True, is_training=False)


MODELS = {
    "plain": SMALL,
    "qk_norm": dict(SMALL, qk_norm=True),
    "no_bias": dict(SMALL, qkv_bias=False, proj_bias=False),
    "layer_scale": dict(SMALL, init_values=0.1),
    "registers": dict(SMALL, reg_tokens=4),
    "average_pool": dict(SMALL, global_pool="avg"),
    "no_class_token": dict(SMALL, class_token=False, global_pool="avg"),
    "patch_4": dict(SMALL, patch_size=4, img_size=16),
    "patch_16": dict(SMALL, patch_size=16),
    "not_square": dict(SMALL, img_size=(16, 40)),
    "no_classifier": dict(SMALL, num_classes=0),
    "gated_scaled": dict(SMALL, attn_layer="gated"),
    "distilled": dict(create=timm.create_model, model_name="deit_tiny_distilled_patch16_224", img_size=32, depth=2),
    "dinov2": dict(create=timm.create_model, model_name="vit_small_patch14_reg4_dinov2", img_size=28, depth=1),
}


def build_named(name):
    options = dict(MODELS[name])
    gated = options.pop("attn_layer", None)
    model = build(**options)
    if gated:
        attention = type(model.blocks[0].attn)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for block in model.blocks:
                try:
                    block.attn = attention(16, num_heads=2, gated=True, scale_norm=True, norm_layer=nn.LayerNorm).eval()
                except TypeError:
                    pytest.skip("this timm has no gated attention")
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", ("w4a4", dataclasses.replace(resolve_scheme("w4a8"), equalize=False)))
def test_every_layer_and_operand_is_swapped_and_the_float_function_stays(name, scheme):
    model = build_named(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images(model))
    quant_model, record = swap_layers(model, scheme)
    assert record.skipped == ()
    wanted = {key for key, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    blocks = [key for key, module in model.named_modules() if hasattr(module, "qkv")]
    wanted |= {f"{block}.{operand}" for block in blocks for operand in OPERANDS}
    assert {place.name for place in record.places} == wanted and len(record.places) == len(wanted)
    order = [key for key, _ in quant_model.named_modules()]
    assert [order.index(place.name) for place in record.places] == sorted(
        order.index(place.name) for place in record.places
    )
    kinds = {"linear": QuantLinear, "convolution": QuantConv2d, "operand": QuantIdentity}
    for place in record.places:
        assert isinstance(quant_model.get_submodule(place.name), kinds[place.kind])
        assert (place.weight_bits is None) == (place.kind == "operand")
    assert not any(type(module) in (nn.Linear, nn.Conv2d) for module in quant_model.modules())
    with unquantized(quant_model), torch.no_grad():
        torch.testing.assert_close(quant_model(images(model)), expected, rtol=1e-5, atol=1e-5)
    ours = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not ours & {tensor.data_ptr() for tensor in quant_model.state_dict().values()}
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module.training for module in quant_model.modules())


@pytest.mark.parametrize("name", ("plain", "registers", "gated_scaled"))
def test_more_bits_come_closer(name):
    model = build_named(name)
    errors = []
    for scheme in ("strict-w3a3", "strict-w6a6", "w8a8"):
        quant_model, _ = swap_layers(model, scheme)
        equalize(quant_model, [images(model)])
        calibrate(quant_model, [images(model)])
        with torch.no_grad():
            errors.append(float((quant_model(images(model)) - model(images(model))).norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def bits_of(record):
    return {place.name: (place.weight_bits, place.activation_bits) for place in record.places}


def test_bits_of_the_default_scheme():
    bits = bits_of(swap_layers(vit(), "w4a5")[1])
    assert bits["patch_embed.proj"] == bits["head"] == (8, 8)
    for block in ("blocks.0", "blocks.1"):
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            assert bits[f"{block}.{layer}"] == (4, 5)
        assert [bits[f"{block}.attn.{operand}"] for operand in OPERANDS] == [(None, 5)] * 3 + [(None, 8)]


def test_the_finn_scheme_is_signed_per_tensor_and_quantizes_patch_tokens():
    quant_model, record = swap_layers(vit(), "finn-w4a4")
    calibrate(quant_model, [torch.randn(4, 3, 32, 32)])
    proxies = [module.act_quant for module in quant_model.modules() if isinstance(module, QuantIdentity)]
    proxies += [
        module.input_quant for module in quant_model.modules() if isinstance(module, (QuantLinear, QuantConv2d))
    ]
    assert len(proxies) == 2 * (4 + 4) + 2 + 1
    assert all(proxy.is_signed and proxy.scale().numel() == 1 and not proxy.zero_point().any() for proxy in proxies)
    tokens = quant_model.patch_embed.norm
    assert int(tokens.act_quant.bit_width()) == 8
    assert [(place.name, place.kind, place.weight_bits, place.activation_bits) for place in record.places][1] == (
        "patch_embed.norm", "tokens", None, 8
    )  # fmt: skip
    patches = quant_model.patch_embed(torch.randn(1, 3, 32, 32))
    codes = patches / tokens.act_quant.scale()
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    wider, _ = swap_layers(vit(), "finn-w4a4", {"patch_embed.norm": "w8a5"})
    assert int(wider.patch_embed.norm.act_quant.bit_width()) == 5


def test_a_place_for_patch_tokens_is_needed():
    model = vit()
    model.patch_embed.norm = nn.LayerNorm(16)
    with pytest.raises(ModelError, match="patch tokens cannot be quantized: expected an idle patch_embed.norm"):
        swap_layers(model, "finn-w4a4")


def test_bits_of_the_strict_scheme():
    assert set(bits_of(swap_layers(vit(), "strict-w3a5")[1]).values()) == {(3, 5), (None, 5)}


def test_both_heads_of_a_distilled_model_are_heads():
    bits = bits_of(swap_layers(build_named("distilled"), "w4a4")[1])
    assert bits["head"] == bits["head_dist"] == (8, 8)


def test_the_record_is_what_the_quantizers_do():
    quant_model, record = swap_layers(vit(), "strict-w3a5", {"blocks.1.attn.probabilities": "w4a7", "head": "w6a4"})
    for place in record.places:
        module = quant_model.get_submodule(place.name)
        if place.kind == "operand":
            assert int(module.act_quant.bit_width()) == place.activation_bits
        else:
            assert int(module.weight_quant.bit_width()) == place.weight_bits
            assert int(module.input_quant.bit_width()) == place.activation_bits


def test_overrides_by_glob_and_the_later_one_wins():
    overrides = {"blocks.*.mlp.*": "w5a6", "blocks.1.mlp.fc2": "w7a7", "blocks.0.attn": "w2a3", "head": "w4a4"}
    bits = bits_of(swap_layers(vit(), "w8a8", overrides)[1])
    assert bits["blocks.0.mlp.fc1"] == bits["blocks.0.mlp.fc2"] == bits["blocks.1.mlp.fc1"] == (5, 6)
    assert bits["blocks.1.mlp.fc2"] == (7, 7) and bits["head"] == (4, 4)
    assert all(bits[f"blocks.0.attn.{operand}"] == (None, 3) for operand in OPERANDS)
    assert bits["blocks.0.attn.qkv"] == (8, 8) and bits["blocks.1.attn.query"] == (None, 8)
    reverse = bits_of(swap_layers(vit(), "w8a8", {"blocks.1.mlp.fc2": "w7a7", "blocks.*.mlp.*": "w5a6"})[1])
    assert reverse["blocks.1.mlp.fc2"] == (5, 6)


def test_bad_overrides():
    message = r"The layer pattern 'blocks.7.\*' matches nothing in VisionTransformer. Names look like: patch_embed.proj"
    with pytest.raises(ConfigurationError, match=message):
        swap_layers(vit(), "w4a4", {"blocks.7.*": "w8a8"})
    with pytest.raises(ConfigurationError, match="wXaY with 2 <= X, Y <= 8 .*got '8'"):
        swap_layers(vit(), "w4a4", {"head": "8"})
    with pytest.raises(ConfigurationError, match="Unknown scheme"):
        swap_layers(vit(), "four bits")


def test_models_that_are_not_vision_transformers():
    with pytest.raises(ModelError, match="ResNet cannot be quantized: it has no attention"):
        swap_layers(timm.create_model("resnet10t"))


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class AdaptedLinear(nn.Linear):
    """A Linear with a child, as low-rank adapters make them."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.adapter = nn.Linear(inputs, outputs)

    def forward(self, x):
        return super().forward(x) + self.adapter(x)


@pytest.mark.parametrize("kind", (ScaledLinear, AdaptedLinear))
@pytest.mark.parametrize(("place", "inputs", "outputs"), (("blocks.1.mlp.fc2", 64, 16), ("blocks.0.attn.qkv", 16, 48)))
def test_a_layer_without_a_twin_is_named_and_stays_in_float(kind, place, inputs, outputs):
    model = vit()
    parent = model.get_submodule(place.rpartition(".")[0])
    setattr(parent, place.rpartition(".")[2], kind(inputs, outputs))
    model.eval()
    with pytest.warns(SkippedLayerWarning, match=rf"Left in float: {place} \({kind.__name__}: no quantized twin"):
        quant_model, record = swap_layers(model, "w4a4")
    assert [(layer.name, layer.type_name) for layer in record.skipped] == [(place, kind.__name__)]
    assert type(quant_model.get_submodule(place)) is kind
    assert place not in bits_of(record)
    with unquantized(quant_model), torch.no_grad():
        torch.testing.assert_close(quant_model(images(model)), model(images(model)), rtol=1e-5, atol=1e-5)
    # The stages behind cope with it.
    equalize(quant_model, [images(model)])
    calibrate(quant_model, [images(model)])
    with unquantized(quant_model), torch.no_grad():
        torch.testing.assert_close(quant_model(images(model)), model(images(model)), rtol=1e-4, atol=1e-4)


def test_a_convolution_and_an_attention_without_a_twin_are_named():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv1d(17, 17, 1)

        def forward(self, x):
            return self.mix(x)

    class StrangeAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

    model = vit()
    model.blocks[0].ls1 = Mixed()
    model.extra = StrangeAttention()
    with pytest.warns(SkippedLayerWarning):
        _, record = swap_layers(model, "w4a4")
    reasons = {layer.name: (layer.type_name, layer.reason) for layer in record.skipped}
    assert reasons["blocks.0.ls1.mix"] == ("Conv1d", "no quantized twin for this type")
    assert reasons["extra"] == ("StrangeAttention", "attention of an unregistered family, its matmuls stay float")


def test_layer_scale_is_not_reported_as_a_layer(recwarn):
    model = build_named("layer_scale")
    assert any(isinstance(module, LayerScale) for module in model.modules())
    swap_layers(model, "w4a4")
    assert not [warning for warning in recwarn if issubclass(warning.category, SkippedLayerWarning)]


def test_training_flag_and_gradients_of_the_float_model_stay():
    model = vit().train()
    model.head.requires_grad_(False)
    swap_layers(model, "w4a4")
    assert all(module.training for module in model.modules())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "head.weight",
        "head.bias",
    ]


def test_a_layer_with_two_names_is_quantized_under_both(tiny_vit):
    tiny_vit.blocks[1].mlp.fc1 = tiny_vit.blocks[0].mlp.fc1
    quant_model, _ = swap_layers(tiny_vit, "w4a4")
    assert isinstance(quant_model.blocks[0].mlp.fc1, QuantLinear)
    assert quant_model.blocks[1].mlp.fc1 is quant_model.blocks[0].mlp.fc1
