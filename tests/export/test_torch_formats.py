import copy
import os

import pytest
import torch
from small_quant_vit import QUANTIZERS
from small_quant_vit import calibrated
from small_quant_vit import quantize_layers
from test_qonnx import TwoLinears
from test_qonnx import assert_untouched
from test_qonnx import state

import maskaq_brevitas.export.torch_formats as module
from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.export import export_torch_program
from maskaq_brevitas.export import export_torch_qcdq
from maskaq_brevitas.export import verify_torch_file

SHAPE = (3, 32, 32)
EXPORTS = {"torch-qcdq": export_torch_qcdq, "torch-export": export_torch_program}


@pytest.fixture(scope="module", params=list(EXPORTS))
def exported(request, quant_vit, tmp_path_factory):
    """A file of each kind, with the logits of the model it came from."""
    images = torch.zeros(1, *SHAPE)
    with torch.no_grad():
        logits = quant_vit(images)
    before = state(quant_vit)
    path = tmp_path_factory.mktemp(request.param) / "vit"
    file = EXPORTS[request.param](quant_vit, path, input_shape=SHAPE)
    assert_untouched(quant_vit, before, images, logits)
    return request.param, file


def test_file_gives_the_models_logits_for_any_number_of_images(quant_vit, exported, images):
    kind, file = exported
    assert os.listdir(file.path.parent) == ["vit"] and file.bytes == file.path.stat().st_size
    assert file.quantizers == QUANTIZERS and file.dynamic_batch and file.input_shape == SHAPE
    for count in (1, 3):
        check = verify_torch_file(file.path, quant_vit, images[:count], kind=kind)
        assert check.passed and check.images == count and check.max_abs_difference < 1e-6
        assert check.top1_agreement == 1 and check.in_step_difference < 1e-6


def test_another_model_is_refused(quant_vit, exported, images):
    kind, file = exported
    other = copy.deepcopy(quant_vit)
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight.mul_(-1)
    check = verify_torch_file(file.path, other, images, kind=kind, raise_on_mismatch=False)
    assert not check.passed and check.in_step_difference is None and check.first_diverging_node is None
    with pytest.raises(ExportError, match="Its logits do not agree within 0.0001"):
        verify_torch_file(file.path, other, images, kind=kind)
    with pytest.raises(ExportError, match="could not be executed on images"):
        verify_torch_file(file.path, quant_vit, torch.zeros(1, 3, 40, 32), kind=kind)


def test_weights_of_torch_qcdq_are_int8(exported):
    kind, file = exported
    if kind == "torch-qcdq":
        nodes = torch.jit.load(file.path).inlined_graph.nodes()
        assert sum(module._is_integer_weight(node) for node in nodes) == 10


@pytest.mark.parametrize("kind", list(EXPORTS))
def test_fixed_batch(tmp_path, kind):
    model = calibrated(quantize_layers(TwoLinears(bypass=False), 4, 8), torch.randn(4, 2, 2, 2))
    file = EXPORTS[kind](model, tmp_path / "x", input_shape=(2, 2, 2), dynamic_batch=False)
    assert verify_torch_file(file.path, model, torch.randn(3, 2, 2, 2), kind=kind).passed


@pytest.mark.parametrize("kind", list(EXPORTS))
def test_bad_models_and_arguments(tmp_path, kind):
    export = EXPORTS[kind]
    model = calibrated(quantize_layers(TwoLinears(bypass=True), 4, 8), torch.randn(4, 2, 2, 2))
    with pytest.raises(ExportError, match="Expected the model's 4 quantizers in the .* graph, got 2"):
        export(model, tmp_path / "x", input_shape=(2, 2, 2))

    class FixedBatch(TwoLinears):
        def forward(self, images):
            return super().forward(images.reshape(2, 8))

    fixed = calibrated(quantize_layers(FixedBatch(bypass=False), 4, 8), torch.randn(2, 2, 2, 2))
    with pytest.raises(ExportError, match=r"(?s)input \(2, 2, 2, 2\) failed: .*Try dynamic_batch=False"):
        export(fixed, tmp_path / "x", input_shape=(2, 2, 2))
    with pytest.raises(InputError, match="either a fixed batch or a dynamic one"):
        export(model, tmp_path / "x", input_shape=(2, 2, 2), dynamic_batch=True, batch_size=3)
    with pytest.raises(ExportError, match="existing folder"):
        export(model, tmp_path / "none" / "x", input_shape=(2, 2, 2))
    assert os.listdir(tmp_path) == []
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(ExportError, match=f"Expected a file of kind {kind}"):
        verify_torch_file(tmp_path / "text", model, torch.zeros(1, 2, 2, 2), kind=kind)
