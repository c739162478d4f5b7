import copy
import os
import sys

import numpy as np
import onnx
import pytest
import torch
from small_quant_vit import build_quant_vit
from small_quant_vit import random_images
from torch import nn

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import MissingExtraError
from maskaq_brevitas.export import export_qonnx
from maskaq_brevitas.export import verify_qonnx
from maskaq_brevitas.export.capture import capture_calls
from maskaq_brevitas.export.compare import _compare_values
from maskaq_brevitas.export.scopes import module_scopes
from maskaq_brevitas.export.scopes import record_scopes


def corrupted(exported, folder, scope, op_type, slot, change):
    """Copy of a file in which one parameter is changed: of the node of this type that came from module ``scope``."""
    model = onnx.load(exported.path)
    node = next(n for n in model.graph.node if n.op_type == op_type and scope in module_scopes(n))
    parameter = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[slot])
    value = onnx.numpy_helper.to_array(parameter).copy()
    parameter.CopyFrom(onnx.numpy_helper.from_array(change(value).astype(value.dtype), parameter.name))
    onnx.save(model, folder / "corrupted.onnx")
    return folder / "corrupted.onnx", node.name


def one_value(value):
    value.reshape(-1)[7] += 10 * np.abs(value).max()
    return value


def test_exported_file_passes(quant_vit, exported, images):
    check = verify_qonnx(exported.path, quant_vit, images)
    with torch.no_grad():
        logits = quant_vit(images)
    assert check.passed and check.images == 3 and check.top1_agreement == 1.0
    assert check.max_abs_difference < 1e-6
    assert check.relative_difference == pytest.approx(check.max_abs_difference / float(logits.abs().max()))
    assert check.first_diverging_node is None and check.in_step_difference < 1e-6 and check.rounding_flips == 0
    assert "28 quantizers" in check.note


@pytest.mark.parametrize(
    ("scope", "op_type", "slot", "change"),
    [
        ("blocks.1.mlp.fc1.weight_quant", "Quant", 0, one_value),  # does not reach the logits of this image
        ("blocks.1.mlp.fc1.weight_quant", "Quant", 1, lambda scale: scale * 1.5),
        ("blocks.1.attn.proj.weight_quant", "Quant", 0, one_value),  # square: its transpose has the same shape
        ("blocks.0.mlp.fc2.input_quant", "Quant", 1, lambda scale: scale * 2),
        ("blocks.0.mlp.fc2.input_quant", "Quant", 1, lambda scale: scale * 1.01),
        ("blocks.1.attn.probabilities_quant.act_quant", "Quant", 3, lambda bits: bits - 4),
        ("blocks.1.norm2", "LayerNormalization", 1, one_value),
        ("patch_embed.proj", "Conv", 2, one_value),
        ("blocks.0.attn.qkv", "Add", 1, one_value),
        ("head", "Gemm", 2, one_value),  # after the last quantizer
    ],
)
def test_corrupted_parameter_is_found_at_its_node(quant_vit, exported, images, tmp_path, scope, op_type, slot, change):
    path, node = corrupted(exported, tmp_path, scope, op_type, slot, change)
    check = verify_qonnx(path, quant_vit, images[:1], raise_on_mismatch=False)
    assert not check.passed and check.first_diverging_node == node
    assert f"first diverging node is {node} ({op_type}, from module '{scope}')" in check.note


def test_other_weights_are_refused(quant_vit, exported, images):
    other = copy.deepcopy(quant_vit)
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight.mul_(-1)
    with pytest.raises(ExportError, match="from module 'blocks.0.attn.qkv.weight_quant'"):
        verify_qonnx(exported.path, other, images)


@pytest.mark.heavy
def test_rounding_flips_pass_although_the_logits_differ(tmp_path):
    """A change below the tolerance, which moves some activations over a rounding tie and so the logits."""
    model, images = build_quant_vit(4, 6, depth=2), random_images(8)
    file = export_qonnx(model, tmp_path / "vit.onnx", input_shape=(3, 32, 32), dynamic_batch=True)
    path, _ = corrupted(file, tmp_path, "blocks.0.norm1", "LayerNormalization", 1, lambda weight: weight * (1 + 5e-5))
    check = verify_qonnx(path, model, images)
    assert check.relative_difference > 1e-4
    assert check.passed and check.rounding_flips > 0 and check.in_step_difference < 1e-4
    assert "rounding ties alone" in check.note


@pytest.mark.parametrize(
    ("taken", "given", "source", "result", "wrong", "flips"),
    [
        (0.8, 1.0, 0.8, 1.0, False, 0),
        (0.75, 1.0, 0.7499999, 0.5, False, 1),  # exactly on the tie between 0.5 and 1.0
        (0.9, 1.0, 0.9, 0.5, True, 0),  # one step, and no tie near
        (0.75, 1.0, 0.7499999, 0.0, True, 0),  # two steps on a tie
        (0.9, 1.0, 0.9, 1.01, True, 0),  # no multiple of the scale
        (0.9, 1.0, 0.5, 0.5, True, 0),  # another input
        (0.9, 1.0, 0.9, float("nan"), True, 0),
    ],
)
def test_quantizer_may_deviate_by_one_step_on_ties_only(taken, given, source, result, wrong, flips):
    values = (np.float32([value]) for value in (source, result, 0.5, 0, taken, given))
    problem, synchronised, flipped = _compare_values(*values, 1e-4)
    assert (problem is not None, flipped) == (wrong, flips)
    assert synchronised == np.float32([given])


def test_model_is_untouched(quant_vit, exported, images):
    model = copy.deepcopy(quant_vit).train()
    verify_qonnx(exported.path, model, images)
    assert all(child.training for child in model.blocks)
    assert not any(child._forward_hooks for child in model.modules())


def test_capture_removes_its_hooks_when_the_model_raises():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        capture_calls(model, torch.zeros(1, 2), lambda module: True)
    assert not any(child._forward_hooks for child in model.modules())


def test_bad_images(quant_vit, exported):
    with pytest.raises(InputError, match=r"expected \(images, channels, height, width\), at least one, got \(3, 32"):
        verify_qonnx(exported.path, quant_vit, torch.zeros(3, 32, 32))
    with pytest.raises(InputError, match=r"expected \(channels, height, width\) \(3, 32, 32\) .* got \(3, 16, 16\)"):
        verify_qonnx(exported.path, quant_vit, torch.zeros(1, 3, 16, 16))


def test_bad_files(quant_vit, images, tmp_path):
    with pytest.raises(ExportError, match="Expected a QONNX file .* got FileNotFoundError"):
        verify_qonnx(tmp_path / "none.onnx", quant_vit, images)
    (tmp_path / "text.onnx").write_text("no protobuf")
    with pytest.raises(ExportError, match="Expected a QONNX file"):
        verify_qonnx(tmp_path / "text.onnx", quant_vit, images)
    assert os.listdir(tmp_path) == ["text.onnx"]


def test_file_of_another_model(quant_vit, exported, images):
    other = copy.deepcopy(quant_vit)
    other.head = nn.Linear(64, 4)
    with pytest.raises(ExportError, match=r"Expected logits \(3, 4\).* got \(3, 10\)"):
        verify_qonnx(exported.path, other, images)


def test_missing_extra(quant_vit, exported, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"'onnxruntime'"):
        verify_qonnx(exported.path, quant_vit, images)


def test_scopes_from_torchscript_names():
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"], name="/blocks/blocks.0/attn/qkv/MatMul"),
         onnx.helper.make_node("Relu", ["y"], ["z"], name="Relu_7")],
        "g", [], [],
    )
    model = onnx.helper.make_model(graph)
    record_scopes(model, ["", "blocks", "blocks.0", "blocks.0.attn", "blocks.0.attn.qkv"])
    assert module_scopes(model.graph.node[0]) == ("blocks", "blocks.0", "blocks.0.attn", "blocks.0.attn.qkv")
    assert module_scopes(model.graph.node[1]) == ()
