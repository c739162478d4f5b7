import copy
import os
import sys
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from brevitas.graph.calibrate import calibration_mode
from small_quant_vit import QUANTIZERS
from small_quant_vit import build_quant_vit
from test_qonnx import TwoLinears
from test_qonnx import assert_untouched
from test_qonnx import state
from test_verify import corrupted
from test_verify import one_value
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import maskaq_brevitas.export.qcdq as module
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import MissingExtraError
from maskaq_brevitas.export import QcdqModel
from maskaq_brevitas.export import export_qcdq
from maskaq_brevitas.export import verify_qcdq
from maskaq_brevitas.export.scopes import module_scopes
from maskaq_brevitas.quant.swap import swap_layers

SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def exported(quant_vit, tmp_path_factory):
    """Exported in silence; the fixture checks that the model and the process are as before."""
    images = torch.zeros(1, *SHAPE)
    with torch.no_grad():
        logits = quant_vit(images)
    before = state(quant_vit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = export_qcdq(
            quant_vit, tmp_path_factory.mktemp("qcdq") / "vit.onnx", input_shape=SHAPE, dynamic_batch=True
        )
    assert not caught
    assert_untouched(quant_vit, before, images, logits)
    return file


def initializers(graph):
    return {tensor.name: tensor for tensor in graph.initializer}


def test_file_says_what_was_asked_for(exported):
    graph = onnx.load(exported.path).graph
    kinds = [node.op_type for node in graph.node]
    assert exported.quantizers == kinds.count("DequantizeLinear") == QUANTIZERS
    assert kinds.count("QuantizeLinear") == QUANTIZERS - 10  # weights are integers already
    assert exported.opset == onnx.load(exported.path).opset_import[0].version == 21
    assert (exported.int8_weights, exported.int4_weights) == (0, 10)
    assert exported.bytes == exported.path.stat().st_size and exported.input_shape == SHAPE
    assert [graph.input[0].type.tensor_type.shape.dim[0].dim_param, exported.dynamic_batch] == ["batch", True]
    assert os.listdir(exported.path.parent) == ["vit.onnx"]
    assert b"stack_trace" not in exported.path.read_bytes()


def test_file_is_small(quant_vit, exported):
    floats = sum(4 * parameter.numel() for name, parameter in quant_vit.named_parameters() if "quant" not in name)
    assert exported.bytes < 0.3 * floats


def test_stored_integers_are_brevitas_own(quant_vit, exported):
    graph = onnx.load(exported.path).graph
    stored = initializers(graph)
    layers = {name: layer for name, layer in quant_vit.named_modules() if hasattr(layer, "quant_weight")}
    found = 0
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            continue
        name = next(name for name in layers if f"{name}.weight_quant" in module_scopes(node))
        codes = onnx.numpy_helper.to_array(stored[node.input[0]]).astype(np.int32)
        expected = layers[name].quant_weight().int().numpy()
        assert stored[node.input[0]].data_type == onnx.TensorProto.INT4
        assert any(expected.shape == turned.shape and np.array_equal(expected, turned) for turned in (codes, codes.T))
        found += 1
    assert found == len(layers) == 10


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
def test_onnx_runtime_agrees_with_its_default_options_too(quant_vit, exported, images, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(os.fspath(exported.path), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert np.abs(found - quant_vit(images).numpy()).max() < 1e-5


def test_file_passes_for_any_number_of_images(quant_vit, exported, images):
    for count in (1, 3):
        check = verify_qcdq(exported.path, quant_vit, images[:count])
        assert check.passed and check.images == count and check.top1_agreement == 1
        assert check.max_abs_difference < 1e-5 and check.in_step_difference < 1e-5
        assert "28 quantizers" in check.note
    with torch.no_grad():
        assert torch.allclose(QcdqModel(exported.path, SHAPE)(images), quant_vit(images), atol=1e-5)


@pytest.mark.parametrize(
    ("scope", "op_type", "slot", "change"),
    [
        ("blocks.1.mlp.fc1.weight_quant", "DequantizeLinear", 1, lambda scale: scale * 1.5),
        ("blocks.0.mlp.fc2.input_quant", "QuantizeLinear", 1, lambda scale: scale * 2),
        ("blocks.1.norm2", "LayerNormalization", 1, one_value),
        ("blocks.0.attn.qkv", "Add", 1, one_value),
        ("head", "Gemm", 2, one_value),  # after the last quantizer
    ],
)
def test_corrupted_parameter_is_found_at_its_node(quant_vit, exported, images, tmp_path, scope, op_type, slot, change):
    path, _ = corrupted(exported, tmp_path, scope, op_type, slot, change)
    check = verify_qcdq(path, quant_vit, images[:1], raise_on_mismatch=False)
    node = next(node for node in onnx.load(path).graph.node if node.name == check.first_diverging_node)
    assert not check.passed and scope in module_scopes(node)
    assert f"from module '{scope}')" in check.note
    with pytest.raises(ExportError, match="to compute what the PyTorch model computes"):
        verify_qcdq(path, quant_vit, images[:1])


def test_one_wrong_integer_of_a_weight_is_found(quant_vit, exported, images, tmp_path):
    model = onnx.load(exported.path)
    node = next(n for n in model.graph.node if "blocks.0.attn.proj.weight_quant" in module_scopes(n))
    weight = initializers(model.graph)[node.input[0]]
    weight.raw_data = bytes([weight.raw_data[0] ^ 1]) + weight.raw_data[1:]
    onnx.save(model, tmp_path / "wrong.onnx")
    check = verify_qcdq(tmp_path / "wrong.onnx", quant_vit, images[:1], raise_on_mismatch=False)
    assert check.first_diverging_node == node.name and "1 steps" in check.note


def swapped_vit(scheme):
    """Our own twins: scales per channel, shifted zero points."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=10).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        images = torch.randn(8, 3, 16, 16)
    quant_model, _ = swap_layers(model, scheme)
    with torch.no_grad(), calibration_mode(quant_model):
        quant_model(images)
    with torch.no_grad():
        quant_model(images)
    return quant_model, images


@pytest.mark.parametrize(
    ("scheme", "changes", "weights"),
    [("w8a8", {}, (6, 0)), ("w3a4", {}, (2, 4)), ("w4a4", {"equalize": False, "input_scales": "tensor"}, (2, 4))],
)
def test_own_schemes(tmp_path, scheme, changes, weights):
    from dataclasses import replace

    model, images = swapped_vit(replace(resolve_scheme(scheme), **changes))
    file = export_qcdq(model, tmp_path / "vit.onnx", input_shape=(3, 16, 16))
    check = verify_qcdq(file.path, model, images[:4])
    assert check.passed and check.relative_difference < 1e-5
    assert (file.int8_weights, file.int4_weights) == weights and file.quantizers == 16
    axes = [any(entry.name == "axis" for entry in node.attribute)
            for node in onnx.load(file.path).graph.node if node.op_type == "QuantizeLinear"]  # fmt: skip
    assert sum(axes) == (0 if "input_scales" in changes else 3)
    if not changes.get("equalize", True):
        kept = initializers(onnx.load(file.path).graph)
        points = [onnx.numpy_helper.to_array(kept[node.input[2]]) for node in onnx.load(file.path).graph.node
                  if node.op_type == "QuantizeLinear"]  # fmt: skip
        assert any(point.any() for point in points)


def test_torchscript_exporter_of_older_torch(quant_vit, images, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "has_dynamo", lambda: False)
    file = export_qcdq(quant_vit, tmp_path / "old.onnx", input_shape=SHAPE, dynamic_batch=True)
    assert (file.opset, file.quantizers, file.int8_weights, file.int4_weights) == (17, QUANTIZERS, 10, 0)
    assert verify_qcdq(file.path, quant_vit, images).max_abs_difference < 1e-5


def test_failed_export_leaves_model_and_folder_alone(quant_vit, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the exporter broke half way")

    quant_vit = copy.deepcopy(quant_vit).train()
    before = state(quant_vit)
    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"QCDQ export of VisionTransformer with input \(1, 3, 32, 32\) failed"):
        export_qcdq(quant_vit, tmp_path / "x.onnx", input_shape=SHAPE)
    assert os.listdir(tmp_path) == []
    tensors, flags = state(quant_vit)
    assert flags == before[1] and all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())


def test_bypassed_layer_is_named(tmp_path):
    from small_quant_vit import calibrated
    from small_quant_vit import quantize_layers

    model = calibrated(quantize_layers(TwoLinears(bypass=True), 4, 8), torch.randn(4, 2, 2, 2))
    with pytest.raises(ExportError, match="4 quantizers, got 2 nodes, none for: two.*never calls them"):
        export_qcdq(model, tmp_path / "x.onnx", input_shape=(2, 2, 2))
    assert os.listdir(tmp_path) == []


def test_bad_input(quant_vit, exported, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="three positive integers"):
        export_qcdq(quant_vit, tmp_path / "x.onnx", input_shape=(1, *SHAPE))
    with pytest.raises(ExportError, match="got Linear with none switched on"):
        export_qcdq(nn.Linear(2, 2), tmp_path / "x.onnx", input_shape=SHAPE)
    with pytest.raises(ExportError, match="Expected a QCDQ file .* got FileNotFoundError"):
        verify_qcdq(tmp_path / "none.onnx", quant_vit, torch.zeros(1, *SHAPE))
    with pytest.raises(InputError, match=r"\(3, 32, 32\) .* got \(3, 16, 16\)"):
        QcdqModel(exported.path, (3, 16, 16))
    with pytest.raises(InputError, match="at least one, got"):
        verify_qcdq(exported.path, quant_vit, torch.zeros(SHAPE))
    monkeypatch.setitem(sys.modules, "onnxoptimizer", None)
    with pytest.raises(MissingExtraError, match=r"'onnxoptimizer'"):
        export_qcdq(quant_vit, tmp_path / "x.onnx", input_shape=SHAPE)


def test_a_file_that_onnx_runtime_refuses(quant_vit, exported, tmp_path):
    model = onnx.load(exported.path)
    model.graph.node[3].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ExportError, match="ONNX Runtime .* refuses the file"):
        verify_qcdq(tmp_path / "x.onnx", quant_vit, torch.zeros(1, *SHAPE))


def test_other_model_is_refused(exported, images):
    other = build_quant_vit(weight_bits=5)
    with pytest.raises(ExportError, match="equal top-1 on"):
        verify_qcdq(exported.path, other, images)
