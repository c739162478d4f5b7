"""The calibrator with a quant model that Brevitas traced and quantized: images, alignment, refresh, tuning, report."""

import pytest
import torch
from borrowed import hooks
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas.graph.quantize import quantize
from brevitas_examples.imagenet_classification.ptq.ptq_common import calibrate as brevitas_calibrate

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas import DistillConfig
from maskaq_brevitas import ReconstructConfig
from maskaq_brevitas import SynthesisConfig
from maskaq_brevitas import prepare_for_fx
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.attention_tap import attention_tap
from maskaq_brevitas.tuning.calibrate import is_calibrated
from maskaq_brevitas.tuning.calibrate import returned_quant_tensors


def traced(model):
    return quantize(preprocess_for_quantize(prepare_for_fx(model)))


def calibrator(model, quant_model=None, **options):
    options = dict(num_images=4, batch_size=4, steps=3, held_back=2, progress=False) | options
    if isinstance(options.get("synthesis"), SynthesisConfig):
        options.pop("steps")
    return DataFreeCalibrator(model, quant_model=traced(model) if quant_model is None else quant_model, **options)


def test_brevitas_calibrates_on_images_that_are_made_in_its_calibration_mode(tiny_vit):
    """The first iteration comes when Brevitas has switched its quantizers off already."""
    quant_model = traced(tiny_vit)
    loader = calibrator(tiny_vit, quant_model)
    code, flags = quant_model.code, returned_quant_tensors(quant_model)
    assert any(flags.values()) and not is_calibrated(quant_model)
    brevitas_calibrate(loader, quant_model)
    assert is_calibrated(quant_model) and loader.version == 1
    assert quant_model.code == code and hooks(quant_model) == 0
    assert returned_quant_tensors(quant_model) == flags
    # Made before and outside of Brevitas' mode, the images and so the scales are the same.
    outside = calibrator(tiny_vit)
    outside.ensure_images()
    assert torch.equal(outside.pool.pixels, loader.pool.pixels)
    brevitas_calibrate(outside, outside.quant_model)
    for name, value in quant_model.state_dict().items():
        assert torch.equal(outside.quant_model.state_dict()[name], value), name


def test_alignment_is_with_the_traced_model(tiny_vit):
    loader = calibrator(tiny_vit, synthesis=SynthesisConfig(steps=3, procedural_share=0.0, mask_enabled=False))
    loader.calibrate()
    found = loader.maker.alignment(loader.freeze())
    assert found > 0
    float_itself = loader.maker.alignment(loader.maker.float_snapshot)
    assert float_itself == pytest.approx(0, abs=1e-6)
    # The same from taps on the live Brevitas model instead of its frozen copy.
    assert loader.maker.alignment(loader.quant_model) == pytest.approx(found, rel=1e-5)
    images = loader.pool.images()
    with attention_tap(loader.quant_model, "logits") as theirs, attention_tap(tiny_vit, "logits") as ours:
        loader.quant_model(images)
        tiny_vit(images)
    differences = [float((a - b).norm() / b.norm()) for a, b in zip(theirs.logits, ours.logits, strict=True)]
    assert all(0 < difference < 0.3 for difference in differences)


def test_the_traced_model_shapes_the_images(tiny_vit):
    """Another weight of the alignment term makes other images."""
    weights = (0.0, 1.0)
    pixels = []
    for weight in weights:
        synthesis = SynthesisConfig(steps=4, procedural_share=0.0, align_weight=weight)
        pixels.append(calibrator(tiny_vit, synthesis=synthesis).ensure_images().pixels)
    assert not torch.equal(*pixels)


def test_refresh_follows_the_traced_model(tiny_vit):
    loader = calibrator(tiny_vit)
    loader.calibrate()
    before, output = loader.pool.pixels.clone(), loader.freeze()(torch.ones(1, 3, 32, 32))
    with torch.no_grad():
        for name, parameter in loader.quant_model.named_parameters():
            if name.endswith("qkv.weight"):
                parameter.mul_(1.5)
    entry = loader.refresh()
    assert entry["version"] == loader.version == 2
    assert entry["alignment_before"] > 0 and entry["alignment_after"] > 0
    assert not torch.equal(loader.pool.pixels, before)
    assert not torch.equal(loader.freeze()(torch.ones(1, 3, 32, 32)), output)
    assert torch.equal(next(iter(loader))[0], loader.pool.images())


def test_kept_tokens_reach_the_traced_model(tiny_vit):
    synthesis = SynthesisConfig(steps=3, procedural_share=0.0, kept_tokens=0.5)
    loader = calibrator(tiny_vit, synthesis=synthesis)
    loader.calibrate()
    assert is_calibrated(loader.quant_model)
    assert type(loader.quant_model.get_submodule("patch_drop")) is torch.nn.Identity


@pytest.mark.parametrize("kept_tokens", (1.0, 0.5))
def test_distillation_trains_the_traced_model(tiny_vit, kept_tokens):
    config = DistillConfig(epochs=2, batch_size=4, kept_tokens=kept_tokens, refresh_every=1, refresh_steps=1)
    loader = calibrator(tiny_vit, tuning=config)
    before = {name: value.clone() for name, value in loader.quant_model.named_parameters()}
    loader.quantize()
    assert len(loader.refreshes) == 1
    epochs = [entry for entry in loader.history if entry["event"] == "epoch"]
    assert epochs[-1]["train_loss"] > 0 and epochs[-1]["train_distance"] > 0
    assert any(not torch.equal(value, before[name]) for name, value in loader.quant_model.named_parameters())


@pytest.mark.parametrize("tuning", (ReconstructConfig(), DistillConfig(epochs=1, feature_weight=1.0)))
def test_what_needs_blocks_is_refused_before_images_are_made(tiny_vit, tuning):
    loader = calibrator(tiny_vit, tuning=tuning)
    with pytest.raises(ModelError, match="is FX-traced: its transformer blocks are no modules.*feature_weight=0"):
        loader.quantize()
    assert loader.version == 0


def test_what_needs_a_scheme_or_the_float_module_is_refused(tiny_vit):
    loader = calibrator(tiny_vit)
    with pytest.raises(ConfigurationError, match="this quant model was given"):
        loader.calibrated_on(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ModelError, match="Expected the model that it was traced from; a traced model goes in as quant"):
        DataFreeCalibrator(prepare_for_fx(tiny_vit))


def test_report_counts_the_bits_that_arrive_at_a_layer(tiny_vit):
    loader = calibrator(tiny_vit)
    loader.calibrate()
    report = loader.report()
    layers = {place.name: place for place in report.places if place.weight is not None}
    assert len(layers) == 10 and all(place.arriving_bits == 8 for place in layers.values())
    for place in layers.values():
        assert place.activation is None and place.bops == place.macs * 8 * 8
    # All layers, and neither of the attention matmuls: 2 blocks x 2 matmuls x 2 heads x 17 x 17 tokens x 32 channels.
    matmuls = 2 * 2 * 2 * 17 * 17 * 32
    assert report.cost.macs_quantized == report.cost.macs - matmuls
    assert report.cost.bops == report.cost.macs_quantized * 64 + matmuls * 32 * 32
    assert "quant model as given" in report.title and "float by design" not in str(report)


def test_saved_and_loaded(tiny_vit, tmp_path):
    image = torch.ones(1, 3, 32, 32)
    loader = calibrator(tiny_vit, run_dir=tmp_path)
    loader.calibrate()
    loader.save()
    again = calibrator(tiny_vit, run_dir=tmp_path, run_mode="resume")
    again.load()
    assert torch.equal(again.pool.pixels, loader.pool.pixels)
    assert torch.equal(again.freeze()(image), loader.freeze()(image))
