"""Whole runs on a backbone inside a larger model: segmentation and detection."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from brevitas.graph.calibrate import quantization_status_manager
from brevitas.graph.quantize import layerwise_quantize
from brevitas.nn import QuantConv2d
from brevitas.nn import QuantLinear
from brevitas.quant import Int8ActPerTensorFloat
from brevitas.quant import Int8WeightPerChannelFloat
from torch import nn

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.errors import SkippedLayerWarning
from maskaq_brevitas.export import count_quantizers
from maskaq_brevitas.export import export_qcdq
from maskaq_brevitas.export import export_qonnx
from maskaq_brevitas.export import export_torch_program
from maskaq_brevitas.export import verify_qcdq
from maskaq_brevitas.export import verify_qonnx
from maskaq_brevitas.export import verify_torch_file

sys.path.insert(0, str(Path(__file__).parent / "models"))
from larger_models import Segmenter  # noqa: E402
from larger_models import TokenReader  # noqa: E402
from larger_models import detector  # noqa: E402
from larger_models import drawn  # noqa: E402
from larger_models import transformers_model  # noqa: E402


def make(model, quant_model=None, *, backbone="encoder", scheme="w8a8", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedLayerWarning)
        return DataFreeCalibrator(
            model, quant_model, backbone=backbone, scheme=scheme, num_images=4, batch_size=4, progress=False,
            **{"held_back": 4, "synthesis": SynthesisConfig(steps=2, batch_size=4), **options},
        )  # fmt: skip


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(params=("vit", "swin", "swin_v2"))
def segmenter(request):
    return drawn(lambda: Segmenter(request.param))


def test_the_backbone_is_quantized_in_place(segmenter):
    before = copy.deepcopy(segmenter.state_dict())
    with pytest.warns(
        SkippedLayerWarning, match=r"Left in float, outside of the backbone 'encoder': head.0 \(Conv2d\), head.1"
    ):
        calibrator = DataFreeCalibrator(
            segmenter,
            backbone="encoder",
            scheme="w8a8",
            num_images=4,
            batch_size=4,
            steps=2,
            held_back=4,
            progress=False,
        )
    swapped = calibrator.quant_model
    layers = [name for name, module in swapped.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    assert layers == ["head.0", "head.1"] == [layer.name for layer in calibrator.swap_record.skipped]
    with torch.no_grad():
        images = calibrator.ensure_images().images()
        off = quantization_status_manager(swapped, disable_act_quant=True, disable_weight_quant=True, is_training=False)
        with off:
            torch.testing.assert_close(swapped(images), segmenter(images), atol=1e-5, rtol=1e-5)
        assert calibrator.calibrate() is swapped
        assert 1e-4 < relative(swapped(images), segmenter(images)) < 0.1
        frozen = calibrator.freeze()
        assert torch.equal(frozen(images), swapped(images)) and not any(
            part.requires_grad for part in frozen.parameters()
        )
        assert relative(calibrator.calibrated_on(images)(images), segmenter(images)) < 0.1
    trace = calibrator.maker.traces[-1]
    assert {"features", "align", "head", "entropy"} <= set(trace) and "class" not in trace
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())
    assert "of the backbone 'encoder' of Segmenter alone" in str(calibrator.report())
    assert calibrator.refresh(steps=1)["alignment_after"] > 0


@pytest.mark.parametrize("name", ("vit", "swin"))
def test_tuning_moves_the_backbone_alone(name, tmp_path):
    segmenter = drawn(lambda: Segmenter(name))
    tuning = [
        ReconstructConfig(steps=4, variants=1),
        DistillConfig(
            epochs=2, refresh_every=1, refresh_steps=1, feature_weight=1.0, kept_tokens=0.5 if name == "vit" else 1.0
        ),
    ]
    calibrator = make(segmenter, scheme="w4a4", tuning=tuning, run_dir=tmp_path)
    quant_model = calibrator.quantize()
    losses = [entry["held_back_loss"] for entry in calibrator.history if "held_back_loss" in entry]
    assert len(losses) == 3 and min(losses) > 0 and calibrator.refreshes
    for name, parameter in segmenter.head.named_parameters():
        assert torch.equal(parameter, quant_model.head.get_parameter(name))
    images = calibrator.held_back.images()
    with torch.no_grad():
        wanted = calibrator.float_model(images)
        found = calibrator.freeze()
        assert relative(calibrator.quant_backbone(images), wanted) < 0.5
        again = make(segmenter, scheme="w4a4", tuning=tuning, run_dir=tmp_path, run_mode="resume")
        again.load()
        assert torch.equal(again.freeze()(images), found(images))
    with pytest.raises(ModelError, match="gives the outputs of several of its blocks|does not name what follows"):
        make(segmenter, tuning=ReconstructConfig(steps=1, feature_weight=1.0)).quantize()
    with pytest.raises(ModelError, match="last_feature_weight=0"):
        make(segmenter, tuning=DistillConfig(last_feature_weight=1.0)).quantize()


def test_other_widths_are_chosen_for_the_same_larger_model():
    calibrator = make(drawn(lambda: Segmenter("vit_pair")), scheme="auto-4")
    quant_model = calibrator.quant_model
    assert calibrator.calibrate() is quant_model and calibrator.allocated
    proxy = quant_model.encoder.model.blocks[0].mlp.fc1.weight_quant
    assert f"w{int(proxy.bit_width())}" == calibrator.allocated["blocks.0.mlp.fc1"][:2]


def test_overrides_name_layers_as_the_backbone_does():
    calibrator = make(drawn(lambda: Segmenter("swin")), overrides={"layers_1.blocks.0.mlp.fc1": "w3a3"})
    assert int(calibrator.quant_model.encoder.layers_1.blocks[0].mlp.fc1.weight_quant.bit_width()) == 3


def test_tokens_that_a_larger_model_reads():
    model = drawn(TokenReader)
    calibrator = make(model, backbone="trunk")
    images = next(iter(calibrator))[0]
    with torch.no_grad():
        assert 1e-4 < relative(calibrator.calibrate()(images), model(images)) < 0.1


def test_a_larger_quant_model_that_was_given():
    model = drawn(lambda: Segmenter("vit"))
    options = dict(
        input_quant=Int8ActPerTensorFloat,
        weight_quant=Int8WeightPerChannelFloat,
        bias_quant=None,
        return_quant_tensor=False,
    )
    layers = {nn.Linear: (QuantLinear, options), nn.Conv2d: (QuantConv2d, options)}
    mine = layerwise_quantize(copy.deepcopy(model), layers, name_blacklist=["head.0", "head.1"]).eval()
    calibrator = make(model, mine)
    assert calibrator.quant_model is mine and calibrator.calibrate() is mine and calibrator.swap_record is None
    images = calibrator.pool.images()
    with torch.no_grad():
        assert 1e-4 < relative(mine(images), model(images)) < 0.1
        assert torch.equal(calibrator.freeze()(images), mine(images))


@pytest.mark.parametrize("kind", ("faster_rcnn", "retina"))
def test_detection(kind, tmp_path):
    model = detector(kind)
    calibrator = make(model, backbone="backbone.body")
    quant_model = calibrator.calibrate()
    images = [torch.rand(3, 25, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    with torch.no_grad():
        found = quant_model(images)
        square = torch.stack([image[:, :, :25] for image in images]).repeat(1, 1, 2, 2)[..., :32, :32]
        maps, wanted = (network.backbone(square) for network in (quant_model, model))
    assert len(found) == 2 and all(len(each["boxes"]) > 0 and torch.isfinite(each["boxes"]).all() for each in found)
    assert all(1e-4 < relative(maps[name], wanted[name]) < 0.1 for name in ("0", "1"))
    with pytest.raises(
        ExportError, match=f"{type(model).__name__} cannot be exported: it gives list of dict.*Export the part"
    ):
        export_qonnx(quant_model, tmp_path / "model.onnx", input_shape=(3, 32, 32))
    with pytest.raises(ExportError, match="it gives list of dict"):
        export_torch_program(quant_model, tmp_path / "model.pt2", input_shape=(3, 32, 32))
    if kind == "retina":  # body and pyramid: a mapping of maps
        part = quant_model.backbone
        assert export_qonnx(part, tmp_path / "backbone.onnx", input_shape=(3, 32, 32)).quant_nodes == count_quantizers(
            part
        )
        assert verify_qonnx(tmp_path / "backbone.onnx", part, calibrator.held_back.images()[:2]).passed


def test_export_of_a_whole_segmentation_model(tmp_path):
    calibrator = make(drawn(lambda: Segmenter("vit")), scheme="w4a8")
    quant_model = calibrator.calibrate()
    images = calibrator.held_back.images()
    file = export_qonnx(quant_model, tmp_path / "model.onnx", input_shape=(3, 32, 32))
    assert file.quant_nodes == count_quantizers(quant_model)
    check = verify_qonnx(tmp_path / "model.onnx", quant_model, images)
    assert check.passed and check.top1_agreement > 0.99
    quant_model.head[0].weight.data.mul_(1.01)
    assert not verify_qonnx(tmp_path / "model.onnx", quant_model, images, raise_on_mismatch=False).passed


def test_export_of_a_backbone_with_several_outputs(tmp_path):
    calibrator = make(drawn(lambda: Segmenter("vit")), scheme="w4a8")
    part = calibrator.calibrate().encoder
    images = calibrator.held_back.images()
    export_qcdq(part, tmp_path / "part.onnx", input_shape=(3, 32, 32), dynamic_batch=True)
    assert verify_qcdq(tmp_path / "part.onnx", part, images).passed
    export_torch_program(part, tmp_path / "part.pt2", input_shape=(3, 32, 32), dynamic_batch=False)
    assert verify_torch_file(tmp_path / "part.pt2", part, images[:1], kind="torch-export").passed


@pytest.mark.parametrize(
    ("kind", "depths", "read", "layers"),
    [
        ("upernet_swin", (1, 2), lambda out: out.logits, 3),
        ("mask2former_swin", (1, 2, 1, 1), lambda out: out.masks_queries_logits, 5),
        ("depth_anything", (), lambda out: out.predicted_depth, 2),
    ],
)
def test_models_of_transformers_on_its_own_backbones(kind, depths, read, layers, tmp_path):
    model = transformers_model(kind, depths=depths)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    name = next(name for name, part in model.named_modules() if hasattr(part, "out_features"))
    with torch.no_grad():
        wanted = read(model(images))
    tuning = DistillConfig(epochs=1, refresh_every=None, distance_weight=0.0, feature_weight=1.0)
    calibrator = make(model, backbone=name, held_back=2, tuning=tuning)
    quant_model = calibrator.quantize()
    backbone = quant_model.get_submodule(name)
    assert type(quant_model) is type(model) and type(backbone) is type(model.get_submodule(name))
    with torch.no_grad():
        assert 1e-4 < relative(read(quant_model(images)), wanted) < 0.2
        assert torch.equal(read(model(images)), wanted)
        maps, float_maps = backbone(images).feature_maps, model.get_submodule(name)(images).feature_maps
    errors = [relative(*pair) for pair in zip(maps, float_maps, strict=True)]
    # Random weights amplify what rounding changes, block after block.
    assert 1e-4 < errors[0] < 0.1 and max(errors) < 0.6
    assert sum(place.name.endswith(".query") for place in calibrator.swap_record.places) == layers
    part = quant_model if kind == "upernet_swin" else backbone
    file = export_qonnx(part, tmp_path / "model.onnx", input_shape=(3, 32, 32))
    same = 2 * layers  # quantizers in front of keys and values that equal the one in front of queries
    assert count_quantizers(part) - same <= file.quant_nodes <= count_quantizers(part)
    assert verify_qonnx(tmp_path / "model.onnx", part, images[:1]).passed


def test_the_inside_of_a_swin_backbone_is_no_backbone_of_its_own():
    model = transformers_model("upernet_swin", depths=(1, 1), image_size=24)  # grids of 6 x 6 and 3 x 3
    calibrator = make(model, backbone="backbone.swin")
    with pytest.raises(ModelError, match="Quantize the whole SwinBackbone"):
        calibrator.calibrate()(torch.zeros(1, 3, 24, 24))


def test_transformers_segmentation_on_a_backbone_of_timm(tmp_path):
    transformers = pytest.importorskip("transformers")
    backbone = transformers.TimmBackboneConfig(
        backbone="vit_tiny_patch16_224", out_indices=[0, 1], use_pretrained_backbone=False, features_only=True
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=4, use_auxiliary_head=False, pool_scales=[1, 2]
    )
    model = drawn(lambda: transformers.UperNetForSemanticSegmentation(config))
    calibrator = make(model, backbone="backbone._backbone", held_back=2)
    quant_model = calibrator.calibrate()
    images = calibrator.held_back.images()
    with torch.no_grad():
        assert 1e-4 < relative(quant_model(images).logits, model(images).logits) < 0.1
    file = export_qonnx(quant_model, tmp_path / "model.onnx", input_shape=(3, 224, 224))
    assert file.quant_nodes == count_quantizers(quant_model)
    assert verify_qonnx(tmp_path / "model.onnx", quant_model, images[:1]).passed
