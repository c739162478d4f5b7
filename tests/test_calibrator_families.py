"""Whole runs on models that are no plain ViT: windows and stages, no classes, channels other than three."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from brevitas.graph.calibrate import bias_correction_mode
from brevitas.graph.gptq import gptq_mode

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.config import EFFORTS
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.export import count_quantizers
from maskaq_brevitas.export import export_qonnx
from maskaq_brevitas.export import verify_qonnx
from maskaq_brevitas.models.token_choice import token_choice
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.calibrate import calibrate

sys.path.insert(0, str(Path(__file__).parent / "models"))
from small_models import build  # noqa: E402


def make(name, scheme="w4a4", **options):
    synthesis = options.pop("synthesis", SynthesisConfig(steps=2, batch_size=4))
    return DataFreeCalibrator(
        build(name), scheme=scheme, batch_size=4, synthesis=synthesis, progress=False,
        **{"num_images": 4, "held_back": 4, **options},
    )  # fmt: skip


def test_swin_is_reconstructed_across_its_stages():
    tuning = ReconstructConfig(steps=20, feature_weight=1.0, informative_weight=2.0, variants=1)
    calibrator = make("swin", tuning=tuning, held_back=0)
    calibrator.quantize()
    blocks = [entry for entry in calibrator.history if entry["event"] == "block"]
    assert [entry["block"] for entry in blocks] == [
        f"layers.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)
    ]
    assert all(entry["after"] <= entry["before"] < 1 for entry in blocks) and any(entry["kept"] for entry in blocks)


def test_swin_is_distilled_block_by_block_output():
    weights = dict(feature_weight=1.0, last_feature_weight=1.0)
    calibrator = make("swin", tuning=DistillConfig(epochs=3, **weights, refresh_every=2, refresh_steps=1))
    calibrator.quantize()
    epochs = [entry for entry in calibrator.history if entry["event"] == "epoch"]
    assert len(epochs) == 3
    assert all(0 < entry[key] < 10 for entry in epochs for key in ("train_features", "train_last_features"))
    assert calibrator.refreshes[0]["alignment_after"] > 0
    assert "layers.0.blocks.0" in str(calibrator.report())


def test_models_that_need_their_whole_grid_keep_all_tokens():
    with pytest.raises(
        ModelError, match="No tokens of SwinTransformer can be left out: its windows.*Use kept_tokens=1"
    ):
        make("swin", synthesis=SynthesisConfig(steps=1, kept_tokens=0.5))
    with pytest.raises(ModelError, match="No tokens of Eva can be left out: its rotary position embedding"):
        make("eva02", tuning=DistillConfig(kept_tokens=0.5))
    with pytest.raises(ModelError, match="No tokens of Cait"), token_choice([build("cait")]):
        pass
    for name, expected in (("swin", (1, 1)), ("vit", (0.5, 0.5))):
        calibrator = make(name, effort="default", synthesis=None)
        assert (calibrator.synthesis.kept_tokens, calibrator.tuning[0].kept_tokens) == expected
    for name, weight, part in (("registers", 1, 3), ("vit", 0, 1)):  # without classes and with them
        calibrator = make(name, effort="best", synthesis=None, num_images=None)
        synthesis = calibrator.synthesis
        assert {synthesis.head_weight, synthesis.entropy_weight, synthesis.align_weight} == {weight}
        assert len(calibrator.pool) == EFFORTS["best"].num_images // part


def test_without_classes_features_are_aligned():
    calibrator = make("registers", tuning=DistillConfig(epochs=1, refresh_every=None, distance_weight=0.0))
    quant_model = calibrator.quantize()
    assert "features" in calibrator.maker.traces[-1] and "class" not in calibrator.maker.traces[-1]
    images = calibrator.held_back.images()
    with torch.no_grad():
        p, q = build("registers")(images), calibrator.freeze()(images)
        relative = ((p - q).square().sum(1) / p.square().sum(1)).mean()
    losses = [entry["held_back_loss"] for entry in calibrator.history if "held_back_loss" in entry]
    assert min(losses) == pytest.approx(float(relative), rel=1e-3)
    report = calibrator.report()
    assert "cosine similarity of the features with the float model" in str(report)
    assert report.agreement["synthetic"] == pytest.approx(1, abs=0.5) and quant_model.num_classes == 0
    with pytest.raises(ConfigurationError, match="Nothing shapes the images: .* has no classes"):
        only = dict(head_weight=0, tv_weight=0, entropy_weight=0, align_weight=0)
        make("registers", synthesis=SynthesisConfig(steps=1, **only)).ensure_images()


@pytest.mark.parametrize(("name", "channels"), (("vit_wide", 5), ("swin_padded", 1)))
def test_images_of_other_channels_and_sides(name, channels):
    calibrator = make(name)
    images, _ = next(iter(calibrator))
    assert images.shape[1] == channels and images.shape[2] != images.shape[3]
    assert torch.isfinite(calibrator.calibrate()(images)).all()
    assert calibrator.pool.informative.sum(dim=1).unique().tolist() == [
        max(1, round(0.1 * calibrator.geometry.patches))
    ]


@pytest.mark.parametrize(("name", "kept"), (("vit_wide", 0.5), ("swin_padded", 1.0)))
def test_whole_runs_on_images_of_other_channels_and_sides(name, kept, tmp_path):
    """Tuning with every augmentation, report with pictures, export and its check."""
    synthesis = SynthesisConfig(steps=3, batch_size=4, kept_tokens=kept)
    common = dict(epochs=1, refresh_every=None, kept_tokens=kept)
    tuning = [DistillConfig(augment=kind, **common) for kind in ("published", "light", "mixed", "strong", "cutmix")]
    calibrator = make(name, scheme="w4a8", synthesis=synthesis, tuning=tuning)
    quant_model = calibrator.quantize()
    losses = [entry["held_back_loss"] for entry in calibrator.history if "held_back_loss" in entry]
    assert len(losses) == 10 and all(0 < loss < 5 for loss in losses)
    calibrator.report().save(tmp_path)
    assert (tmp_path / "images.png").stat().st_size > 1000
    shape = calibrator.geometry.input_size
    assert export_qonnx(quant_model, tmp_path / "model.onnx", input_shape=shape).quant_nodes == count_quantizers(
        quant_model
    )
    assert verify_qonnx(tmp_path / "model.onnx", quant_model, calibrator.held_back.images()[:2]).passed


def test_one_mask_for_each_layer_of_a_model_with_stages():
    synthesis = SynthesisConfig(steps=2, batch_size=4, mask_per_layer=True, head_rows=4, entropy_rows=4)
    assert torch.isfinite(make("swin", synthesis=synthesis).ensure_images().images()).all()


def test_attention_pooling_with_dropped_tokens():
    synthesis = SynthesisConfig(steps=12, batch_size=4, kept_tokens=0.5)
    assert torch.isfinite(make("map", synthesis=synthesis).ensure_images().images()).all()


def test_brevitas_own_algorithms_run_on_swin():
    """They compute wrong shapes for linear layers on (batch, rows, columns, channels), which the swap avoids."""
    quant_model, _ = swap_layers(build("swin"), "w4a8")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calibrate(quant_model, [images])
    before = {
        name: weight.clone() for name, weight in quant_model.state_dict().items() if name.endswith("reduction.weight")
    }
    with torch.no_grad(), gptq_mode(quant_model, use_quant_activations=False) as gptq:
        for _ in range(gptq.num_layers):
            gptq.model(images)
            gptq.update()
    with torch.no_grad(), bias_correction_mode(quant_model):
        quant_model(images)
    after = quant_model.state_dict()
    assert before and all(not torch.equal(weight, after[name]) for name, weight in before.items())
    assert torch.isfinite(copy.deepcopy(quant_model)(images)).all()


def test_scales_in_front_of_class_attention_fit_all_tokens_and_not_the_class_token_alone():
    calibrator = make("cait", scheme="w8a8")
    quant_model = calibrator.calibrate()
    block = quant_model.blocks_token_only[0].attn
    scales = [layer.input_quant.scale().flatten() for layer in (block.q, block.k, block.v)]
    assert all(torch.allclose(scale, scales[0]) for scale in scales)
    seen = []
    handle = block.k.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        quant_model(calibrator.pool.images())
    handle.remove()
    reach = seen[0].abs().flatten(0, 1).amax(dim=0) / (127 * scales[0])
    assert 0.4 < float(reach.median()) < 1.5
