import copy
import logging
import os
import subprocess
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch
from small_quant_vit import QUANTIZERS
from small_quant_vit import calibrated
from small_quant_vit import quantize_layers
from torch import nn

import maskaq_brevitas.export.qonnx as module
from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import MissingExtraError
from maskaq_brevitas.export import count_quantizers
from maskaq_brevitas.export import export_qonnx
from maskaq_brevitas.export import verify_qonnx
from maskaq_brevitas.export.process import quiet

SHAPE = (3, 32, 32)


def state(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(name, child.training, getattr(child, "export_mode", None)) for name, child in model.named_modules()]
    return tensors, flags


def assert_untouched(model, before, images, logits):
    tensors, flags = state(model)
    assert flags == before[1]
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())
    assert not any(child._forward_hooks for child in model.modules())
    with torch.no_grad():
        assert torch.equal(model(images), logits)


def test_file_says_what_was_asked_for(exported):
    assert exported.quant_nodes == QUANTIZERS
    assert exported.bytes == exported.path.stat().st_size > 100_000
    assert exported.input_shape == SHAPE and not exported.dynamic_batch
    graph = onnx.load(exported.path).graph
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [1, *SHAPE]
    assert [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim] == [1, 10]
    assert sum(node.op_type == "Quant" for node in graph.node) == QUANTIZERS
    assert exported.opset == next(o.version for o in onnx.load(exported.path).opset_import if o.domain == "")


def test_nothing_but_the_file_is_left_and_no_local_path_in_it(exported):
    assert os.listdir(exported.path.parent) == ["vit.onnx"]
    content = exported.path.read_bytes()
    assert os.path.dirname(torch.__file__).encode() not in content and b"stack_trace" not in content


def test_bit_widths_in_the_file(exported):
    graph = onnx.load(exported.path).graph
    parameters = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    widths = [float(parameters[node.input[3]]) for node in graph.node if node.op_type == "Quant"]
    assert widths.count(4.0) == 10 and widths.count(8.0) == QUANTIZERS - 10


def test_count_quantizers(quant_vit):
    assert count_quantizers(quant_vit) == QUANTIZERS
    assert count_quantizers(nn.Linear(2, 2)) == 0


def test_dynamic_batch_keeps_the_class_token(quant_vit, images, tmp_path):
    """qonnx' own cleanup folds the class token of a symbolic batch to an empty constant."""
    file = export_qonnx(quant_vit, tmp_path / "dynamic.onnx", input_shape=SHAPE, dynamic_batch=True)
    graph = onnx.load(file.path).graph
    for value in (graph.input[0], graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert all(0 not in tensor.dims for tensor in graph.initializer)
    assert file.dynamic_batch and file.quant_nodes == QUANTIZERS
    check = verify_qonnx(file.path, quant_vit, images)
    assert check.passed and check.max_abs_difference < 1e-5


def test_fixed_batch_of_two_takes_any_number_of_images(quant_vit, images, tmp_path):
    file = export_qonnx(quant_vit, tmp_path / "two.onnx", input_shape=SHAPE, batch_size=2)
    assert onnx.load(file.path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    check = verify_qonnx(file.path, quant_vit, images)
    assert check.images == 3 and check.max_abs_difference < 1e-5


@pytest.mark.parametrize("dynamic", [False, True])
def test_torchscript_exporter_of_older_torch(quant_vit, images, tmp_path, monkeypatch, dynamic):
    monkeypatch.setattr(module, "has_dynamo", lambda: False)
    file = export_qonnx(quant_vit, tmp_path / "old.onnx", input_shape=SHAPE, dynamic_batch=dynamic)
    assert file.quant_nodes == QUANTIZERS
    assert verify_qonnx(file.path, quant_vit, images).max_abs_difference < 1e-5


def test_same_model_gives_the_same_bytes(quant_vit, exported, tmp_path):
    again = export_qonnx(quant_vit, tmp_path / "again.onnx", input_shape=SHAPE)
    assert again.path.read_bytes() == exported.path.read_bytes()


def test_export_is_quiet_and_leaves_the_model_and_the_process_alone(quant_vit, images, tmp_path, capfd):
    with torch.no_grad():
        logits = quant_vit(images)
    before, filters, threshold = state(quant_vit), list(warnings.filters), logging.root.manager.disable
    rng = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = export_qonnx(quant_vit, tmp_path / "quiet.onnx", input_shape=SHAPE)
        verify_qonnx(file.path, quant_vit, images)
    assert not caught and capfd.readouterr() == ("", "")
    assert warnings.filters == filters and logging.root.manager.disable == threshold
    assert torch.equal(torch.get_rng_state(), rng)
    assert_untouched(quant_vit, before, images, logits)


@pytest.mark.parametrize("training", [False, True])
def test_failed_export_leaves_model_and_folder_alone(quant_vit, images, tmp_path, monkeypatch, training):
    def fail(*args, **kwargs):
        raise RuntimeError("the exporter broke half way")

    quant_vit = copy.deepcopy(quant_vit)
    quant_vit.train(training)
    before = state(quant_vit)
    monkeypatch.setattr(torch.onnx, "export", fail)
    (tmp_path / "old.onnx").write_bytes(b"what was there before")
    with pytest.raises(ExportError, match=r"VisionTransformer with input \(1, 3, 32, 32\) failed: .* broke half way"):
        export_qonnx(quant_vit, tmp_path / "old.onnx", input_shape=SHAPE)
    assert os.listdir(tmp_path) == ["old.onnx"]
    assert (tmp_path / "old.onnx").read_bytes() == b"what was there before"
    tensors, flags = state(quant_vit)
    assert flags == before[1] and all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())


class TwoLinears(nn.Module):
    def __init__(self, bypass: bool):
        super().__init__()
        self.one, self.two, self.bypass = nn.Linear(8, 8), nn.Linear(8, 8), bypass

    def forward(self, images):
        x = images.flatten(1)
        if self.bypass:
            return self.one(x) + nn.functional.linear(x, self.two.weight)
        return self.one(x) + self.two(x)


def test_bypassed_layer_is_named(tmp_path):
    model = calibrated(quantize_layers(TwoLinears(bypass=True), 4, 8), torch.randn(4, 2, 2, 2))
    with pytest.raises(ExportError, match="4 quantizers, got 2 nodes, none for: two.*never calls them"):
        export_qonnx(model, tmp_path / "x.onnx", input_shape=(2, 2, 2))
    assert os.listdir(tmp_path) == []


def test_equal_quantizers_of_one_tensor_may_merge(tmp_path):
    model = calibrated(quantize_layers(TwoLinears(bypass=False), 4, 8), torch.randn(4, 2, 2, 2))
    file = export_qonnx(model, tmp_path / "x.onnx", input_shape=(2, 2, 2))
    assert count_quantizers(model) == 4 and file.quant_nodes == 3
    assert verify_qonnx(file.path, model, torch.randn(3, 2, 2, 2)).passed


def test_code_that_fixes_the_batch_is_refused_for_a_dynamic_one(tmp_path):
    class FixedBatch(TwoLinears):
        def forward(self, images):
            return super().forward(images.reshape(int(images.shape[0]) * 8).reshape(2, 8))

    model = calibrated(quantize_layers(FixedBatch(bypass=False), 4, 8), torch.randn(2, 2, 2, 2))
    with pytest.raises(ExportError, match="dynamic_batch=False"):
        export_qonnx(model, tmp_path / "x.onnx", input_shape=(2, 2, 2), dynamic_batch=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (1, 3, 32, 32)}, r"three positive integers .* got \(1, 3, 32, 32\)"),
        ({"input_shape": (3, 0, 32)}, "three positive integers"),
        ({"input_shape": SHAPE, "batch_size": 0}, "got batch_size=0"),
        ({"input_shape": SHAPE, "batch_size": 4, "dynamic_batch": True}, "either a fixed batch or a dynamic one"),
    ],
)
def test_bad_arguments(quant_vit, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        export_qonnx(quant_vit, tmp_path / "x.onnx", **options)


def test_bad_targets(quant_vit, tmp_path):
    with pytest.raises(ExportError, match="existing folder .*Make it first"):
        export_qonnx(quant_vit, tmp_path / "none" / "x.onnx", input_shape=SHAPE)
    with pytest.raises(ExportError, match="got the folder"):
        export_qonnx(quant_vit, tmp_path, input_shape=SHAPE)


def test_float_model_is_refused(tmp_path):
    with pytest.raises(ExportError, match="got Linear with none switched on"):
        export_qonnx(nn.Linear(2, 2), tmp_path / "x.onnx", input_shape=SHAPE)


@pytest.mark.parametrize("name", ["onnx", "qonnx", "onnxscript", "onnxoptimizer"])
def test_missing_extra(quant_vit, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"'{name}'.*maskaq_brevitas\[export\]"):
        export_qonnx(quant_vit, tmp_path / "x.onnx", input_shape=SHAPE)


def test_quiet_is_put_back_on_failure(capsys):
    filters, threshold = list(warnings.filters), logging.root.manager.disable
    with pytest.raises(KeyError), quiet():
        warnings.warn("unseen", stacklevel=1)
        print("unseen")
        raise KeyError
    assert warnings.filters == filters and logging.root.manager.disable == threshold
    print("seen")
    assert capsys.readouterr().out == "seen\n"


def test_import_is_light():
    code = "import sys, maskaq_brevitas.export; print({'onnx', 'qonnx', 'onnxruntime'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_weights_in_the_file_are_the_models(quant_vit, exported):
    graph = onnx.load(exported.path).graph
    parameters = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weight = quant_vit.head.weight.detach().numpy()
    assert any(value.shape == weight.shape and np.array_equal(value, weight) for value in parameters.values())
