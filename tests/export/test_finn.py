"""The form for FINN: it computes what the model computes, and refuses what FINN would."""

import copy
import dataclasses

import numpy as np
import onnx
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.export.finn import FINN_OPSET
from maskaq_brevitas.export.finn import export_finn
from maskaq_brevitas.export.finn import sample_path
from maskaq_brevitas.export.finn import verify_finn
from maskaq_brevitas.export.finn import write_finn_sample
from maskaq_brevitas.export.finn_form import finn_form
from maskaq_brevitas.quant.equalize import equalize
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.calibrate import calibrate

SHAPE = (3, 16, 16)


def images(count, seed=1):
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(seed))


def quant_vit(scheme="finn-w4a4", equalized=False, **model_args):
    """Width 32, two heads, one block, four patches, random norms and biases; calibrated on noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"depth": 1, **model_args}
        model = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=32, num_heads=2, num_classes=10, **options
        ).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                nn.init.normal_(parameter, mean=float("weight" in name), std=0.2)
        for token in (model.cls_token, model.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.5)
    quant_model, _ = swap_layers(model, scheme)
    if equalized:
        equalize(quant_model, [images(16)])
    calibrate(quant_model, [images(16)])
    return quant_model


@pytest.fixture(scope="module")
def quant_model():
    return quant_vit(equalized=True, depth=2)


def difference(quant_model):
    """Largest difference of a logit on the image where it is least: a rounding tie may part the two on some image."""
    form, batch = finn_form(quant_model), images(4, seed=2)
    with torch.no_grad():
        found = torch.cat([form(image[None]) for image in batch])
        return float((found - quant_model(batch)).abs().amax(dim=1).min())


@pytest.mark.parametrize("model_args", (
    {},
    {"qkv_bias": False},
    {"init_values": 0.3},
    {"reg_tokens": 2, "no_embed_class": True},
    {"reg_tokens": 1},
    {"act_layer": nn.ReLU},
    {"fc_norm": True},
    {"class_token": True, "pos_embed": "none"},
), ids=str)  # fmt: skip
def test_the_form_computes_what_the_model_computes(model_args):
    assert difference(quant_vit(**model_args)) < 1e-5


def test_the_form_of_an_equalised_model(quant_model):
    assert difference(quant_model) < 1e-5
    affine = quant_model.blocks[0].mlp.norm
    assert bool((affine.offset != 0).any())  # there was something to carry over


def test_codes_are_those_of_the_model(quant_model):
    """Each weight code, those of the split qkv included."""
    form = finn_form(quant_model)
    source, found = quant_model.blocks[1].attn.qkv, form.encoder.blocks[1].attn
    codes = (source.quant_weight().value / source.weight_quant.scale()).round()
    split = torch.cat([
        (part.quant_weight().value / part.weight_quant.scale()).round() for part in (found.q, found.k, found.v)
    ])  # fmt: skip
    assert torch.equal(codes, split) and codes.abs().max() == 7


def test_cuts_follow_each_other(quant_model):
    full, encoder = finn_form(quant_model), finn_form(quant_model, "encoder")
    with torch.no_grad():
        tokens = full.stem(images(1))
        assert tokens.shape == (1, 5, 32)
        assert torch.equal(full.head(full.norms(encoder(tokens)[:, 0])), full(images(1)))


def test_the_file(quant_model, tmp_path):
    state = {name: tensor.clone() for name, tensor in quant_model.state_dict().items()}
    path = tmp_path / "model.onnx"
    file = export_finn(quant_model, path, input_shape=SHAPE)
    graph = onnx.load(path)
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == FINN_OPSET
    assert file.input_shape == (1, *SHAPE) and file.cut == "full" and file.bytes == path.stat().st_size
    assert file.quant_nodes == sum(node.op_type == "Quant" for node in graph.graph.node) == 34
    assert sum(node.op_type == "Gelu" for node in graph.graph.node) == 2
    assert not any(node.op_type in ("Slice", "Split", "Squeeze", "Unsqueeze", "Erf") for node in graph.graph.node)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in quant_model.state_dict().items())
    check = verify_finn(path, quant_model, images(2))
    assert check.passed and check.in_step_difference < 1e-5

    assert write_finn_sample(quant_model, path, images(1)) == sample_path(path) == tmp_path / "model.sample.npz"
    with np.load(sample_path(path)) as sample, torch.no_grad():
        assert np.array_equal(sample["input"], images(1).numpy())
        assert np.array_equal(sample["output"], finn_form(quant_model)(images(1)).numpy())


def test_the_encoder_as_a_file(quant_model, tmp_path):
    file = export_finn(quant_model, tmp_path / "encoder.onnx", input_shape=SHAPE, cut="encoder")
    assert file.input_shape == (1, 5, 32) and file.quant_nodes == 28


def test_a_wrong_weight_in_the_file_is_found(quant_model, tmp_path):
    path = tmp_path / "model.onnx"
    export_finn(quant_model, path, input_shape=SHAPE)
    graph = onnx.load(path)
    shapes = ([128, 32], [32, 128])
    weight = next(tensor for tensor in graph.graph.initializer if list(tensor.dims) in shapes)
    changed = onnx.numpy_helper.to_array(weight).copy()
    changed[:, :4] = -changed[:, :4]
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(graph, path)
    with pytest.raises(ExportError, match="Expected .* to compute what the PyTorch model computes"):
        verify_finn(path, quant_model, images(2))


@pytest.mark.parametrize(("scheme", "model_args", "cut", "text"), (
    ("w4a4", {}, "full", "blocks.0.attn.qkv input: expected one static scale, got one per channel"),
    ("tensor-w4a4", {}, "encoder", "blocks.0.attn.probabilities: unsigned"),
    ("tensor-w4a4", {}, "full", "patch_embed.norm: patch tokens are not quantized"),
    (dataclasses.replace(resolve_scheme("finn-w4a4"), equalize=False, gelu="asymmetric"), {}, "encoder",
     "blocks.0.mlp.fc2 input: unsigned"),
    ("finn-w4a4", {"global_pool": "avg"}, "full", "pooling 'avg' has no operator"),
    ("finn-w4a4", {"qk_norm": True}, "encoder", "blocks.0.attn.q_norm: a norm inside attention"),
    ("finn-w4a4", {"act_layer": nn.SiLU}, "encoder", r"mlp.act: SiLU\(\) has no operator"),
))  # fmt: skip
def test_what_finn_does_not_take_is_named(scheme, model_args, cut, text):
    with pytest.raises(ExportError, match=f"(?s){text}.*Quantize with a scheme finn-wXaY"):
        finn_form(quant_vit(scheme, **model_args), cut)


def test_many_problems_are_counted():
    with pytest.raises(ExportError, match="; and [0-9]+ more. Quantize with a scheme"):
        finn_form(quant_vit("w4a4", depth=3))


def test_bad_requests(quant_model, tmp_path):
    with pytest.raises(ConfigurationError, match="static batch of 1 image"):
        export_finn(quant_model, tmp_path / "x.onnx", input_shape=SHAPE, dynamic_batch=True)
    with pytest.raises(ConfigurationError, match="cut: expected 'full' or 'encoder', got 'head'"):
        export_finn(quant_model, tmp_path / "x.onnx", input_shape=SHAPE, cut="head")
    other = copy.deepcopy(quant_model).blocks
    with pytest.raises(ExportError, match="Sequential is no timm VisionTransformer"):
        finn_form(other)
    assert list(tmp_path.iterdir()) == []
