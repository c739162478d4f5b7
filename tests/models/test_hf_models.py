"""Models of Hugging Face transformers: their output object, their configuration, whole runs."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from brevitas.graph.calibrate import quantization_status_manager
from small_models import build
from torch import Tensor
from transformers import ViTConfig
from transformers import ViTForMaskedImageModeling

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import LayerBits
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.evaluation import evaluate
from maskaq_brevitas.models import families
from maskaq_brevitas.models.families import FAMILIES
from maskaq_brevitas.models.families import read_logits
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.models.token_choice import why_all_tokens
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.quant.swap import plan_bits
from maskaq_brevitas.quant.swap import swap_layers


def make(name, **options):
    synthesis = options.pop("synthesis", SynthesisConfig(steps=2, batch_size=4))
    return DataFreeCalibrator(
        build(name),
        scheme="w4a4",
        num_images=4,
        batch_size=4,
        held_back=4,
        synthesis=synthesis,
        progress=False,
        **options,
    )


def images(model, count=4):
    return torch.randn(count, *read_geometry(model).input_size, generator=torch.Generator().manual_seed(1))


def test_transformers_is_not_imported():
    code = (
        "import sys, maskaq_brevitas.commands; from maskaq_brevitas.models.geometry import read_geometry; "
        "from maskaq_brevitas.models.zoo import load_model; read_geometry(load_model('digits_vit')); "
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_copies_give_logits_and_the_model_stays_as_it_was():
    model = build("hf_deit")
    x = images(model)
    quant_model, _ = swap_layers(model, "w8a8")
    assert isinstance(quant_model(x), Tensor) and type(quant_model) is type(model) and quant_model.config is not None
    snapshot = float_snapshot(model)
    assert not isinstance(model(x), Tensor) and not model._forward_hooks
    torch.testing.assert_close(snapshot(x), model(x).logits, rtol=1e-5, atol=1e-5)
    for copied in (copy.deepcopy(snapshot), pickle.loads(pickle.dumps(snapshot))):
        assert torch.equal(copied(x), snapshot(x))


def test_geometry_is_read_from_the_configuration():
    wide = read_geometry(build("hf_vit"))
    assert wide.input_size == (5, 16, 48) and wide.grid == (2, 6) and wide.prefix_tokens == 1 and wide.class_token
    assert wide.num_classes == 5 and wide.mean == wide.std == (0.5,) * 5
    deit = read_geometry(build("hf_deit"))
    assert deit.prefix_tokens == 2 and deit.mean == (0.485, 0.456, 0.406)
    assert read_geometry(build("hf_dinov2")).num_classes == 0
    padded = read_geometry(build("hf_swin_padded"))
    assert padded.input_size == (3, 36, 28) and padded.grid == (9, 7) and not padded.class_token
    assert [layout.grid for layout in padded.layouts] == [(9, 7), (9, 7), (5, 4), (5, 4)]
    assert [layout.shift for layout in padded.layouts] == [(0, 0), (1, 1)] * 2


def test_normalisation_of_an_image_processor():
    from transformers import BitImageProcessor

    model = copy.deepcopy(build("hf_dinov2_swiglu"))
    processor = BitImageProcessor()
    model.pretrained_cfg = dict(mean=processor.image_mean, std=processor.image_std)
    geometry = read_geometry(model)
    assert geometry.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = processor(pixels, do_rescale=False, do_resize=False, do_center_crop=False, return_tensors="pt")
    torch.testing.assert_close(geometry.normalize(pixels), expected["pixel_values"][0])


def test_widths_of_embedding_and_both_classifiers():
    bits = plan_bits(build("hf_deit"), resolve_scheme("w4a4"))
    outer = {name for name, found in bits.items() if found == LayerBits(8, 8)}
    assert {"deit.embeddings.patch_embeddings.projection", "cls_classifier", "distillation_classifier"} <= outer
    assert bits["deit.layers.0.attention.q_proj"] == bits["deit.layers.1.mlp.fc2"] == LayerBits(4, 4)


def test_models_without_logits_or_features_are_refused():
    config = ViTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(
        ModelError,
        match="ViTForMaskedImageModeling of transformers gives neither logits nor features. "
        "Expected ViTForImageClassification or ViTModel",
    ):
        DataFreeCalibrator(ViTForMaskedImageModeling(config))


def test_a_model_without_classifier_gives_what_it_pools():
    model = build("hf_vit_features")
    calibrator = make("hf_vit_features", tuning=DistillConfig(epochs=1, refresh_every=None, distance_weight=0.0))
    quant_model = calibrator.quantize()
    assert calibrator.geometry.num_classes == 0 and calibrator.geometry.prefix_tokens == 1
    with torch.no_grad():
        found, wanted = quant_model(images(model)), model(images(model)).pooler_output
    assert found.shape == wanted.shape == (4, 32)
    assert not torch.equal(found, wanted) and float(torch.cosine_similarity(found, wanted).mean()) > 0.5


def test_tokens_can_be_left_out_unless_they_are_laid_out_as_maps():
    assert why_all_tokens(build("hf_dinov2_tokens")) == why_all_tokens(build("hf_vit_features")) == ""
    assert "maps of the whole grid" in why_all_tokens(build("hf_dinov2_maps"))
    assert "window" in why_all_tokens(build("hf_swin_maps"))


def test_a_swin_transformer_takes_images_of_other_sizes():
    model = build("hf_swin_maps")  # its windows never fill a grid, so no channel is shifted
    twin, _ = swap_layers(model, "w8a8")
    off = quantization_status_manager(twin, disable_act_quant=True, disable_weight_quant=True, is_training=False)
    for size in ((44, 60), (36, 28)):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
        with off, torch.no_grad():
            torch.testing.assert_close(twin(x), read_logits(model, model(x)), rtol=1e-5, atol=1e-5)
    filled, _ = swap_layers(build("hf_swin"), "w8a8")
    with torch.no_grad():
        for _ in range(2):  # not only the first time
            with pytest.raises(ModelError, match="A grid of 9 x 8 patches does not fill windows of 4 x 4.*image_size"):
                filled(torch.zeros(1, 3, 36, 32))


def test_an_older_transformers_is_told(monkeypatch):
    model = copy.deepcopy(build("hf_swin"))
    monkeypatch.setattr(
        families, "FAMILIES", [known for known in FAMILIES if not known.name.startswith("transformers")]
    )
    monkeypatch.setattr(families, "EXPLICIT_FORMS", {})
    monkeypatch.setattr(families, "_transformers_version", lambda: (4, 57))
    families._optional_family.cache_clear()
    try:
        with pytest.raises(
            ModelError, match="SwinAttention.* not registered.*transformers 5.24 or newer.*this is 4.57"
        ):
            DataFreeCalibrator(model)
    finally:
        families._optional_family.cache_clear()


@pytest.mark.parametrize("name", ("hf_deit", "hf_dinov2", "hf_swin", "tv_vit", "tv_swin_padded"))
def test_models_are_distilled_and_reconstructed(name):
    kept = 1.0 if "swin" in name else 0.5
    tuning = (
        ReconstructConfig(steps=3, feature_weight=1.0, variants=1),
        DistillConfig(epochs=1, feature_weight=1.0, last_feature_weight=1.0, refresh_every=None, kept_tokens=kept),
    )
    calibrator = make(name, tuning=tuning, synthesis=SynthesisConfig(steps=2, batch_size=4, kept_tokens=kept))
    quant_model = calibrator.quantize()
    blocks = [entry for entry in calibrator.history if entry["event"] == "block"]
    assert len(blocks) == (4 if "swin" in name else 2) and all(entry["after"] <= entry["before"] for entry in blocks)
    epochs = [entry for entry in calibrator.history if entry["event"] == "epoch"]
    assert len(epochs) == 1 and 0 < epochs[0]["train_features"] < 10 and 0 < epochs[0]["train_last_features"] < 10
    pixels = calibrator.held_back.images()
    found = quant_model(pixels)
    assert isinstance(found, Tensor) and torch.isfinite(found).all()
    assert "classifier" in str(calibrator.report()) or "head" in str(calibrator.report())


def test_accuracy_of_float_and_quantized():
    model = build("hf_swin")
    pixels = images(model, 6)
    with torch.no_grad():
        labels = model(pixels).logits.argmax(dim=1).tolist()
    data = list(zip(pixels, labels, strict=True))
    assert evaluate(model, data).top1 == 100
    quant_model, _ = swap_layers(model, "w8a8")
    assert evaluate(quant_model, data).images == 6
