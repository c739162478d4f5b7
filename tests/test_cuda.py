"""The whole package on a GPU. Every test here is skipped where there is none; MASKAQ_TEST_DEVICE=cpu runs them anyhow.
"""

import copy
import importlib.util
import json
import os
import shutil
import warnings

import pytest
import torch
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import layerwise_quantize

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.cli import main
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import CompilationWarning
from maskaq_brevitas.evaluation import digits_split
from maskaq_brevitas.evaluation import evaluate
from maskaq_brevitas.models.families import known_families
from maskaq_brevitas.quant.trainable import training_twin
from maskaq_brevitas.support import small_model
from maskaq_brevitas.tuning.distill import Distiller
from maskaq_brevitas.tuning.sensitivity import Switches
from maskaq_brevitas.tuning.sensitivity import place_kinds
from maskaq_brevitas.tuning.sensitivity import sensitivity

DEVICE = os.environ.get("MASKAQ_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")

SYNTHESIS = SynthesisConfig(steps=4, warmup_steps=2, batch_size=4)
DISTILL = DistillConfig(
    epochs=2, steps_per_epoch=2, batch_size=4, refresh_every=1, refresh_steps=2, feature_weight=1.0, drawn_images=4
)
RECONSTRUCT = ReconstructConfig(steps=4, batch_size=4)
EXAMPLES = [(family, example) for family in known_families(optional=True) for example in family.examples]


def make(model, **changes):
    options = dict(
        scheme="w4a8", num_images=8, batch_size=4, held_back=4, synthesis=SYNTHESIS, device=DEVICE, progress=False
    )
    return DataFreeCalibrator(model, **{**options, **changes})


def logits(model, images, device):
    with torch.no_grad():
        return model.to(device)(images.to(device)).cpu()


def states():
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE == "cuda" else [])]


def close(one, other):
    """Whether two outputs are the same but for rounding ties that fall apart."""
    return float((one - other).norm() / other.norm()) < 0.05


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products in float32, not in its 10-bit form."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("changes", [
    {}, {"precision": "bfloat16"}, {"kept_tokens": 0.5}, {"parameterization": "pixel"}, {"mask_per_layer": True},
    {"memory_mib": 8},
], ids=str)  # fmt: skip
def test_images_are_made(tiny_vit, changes):
    config = SynthesisConfig(steps=4, warmup_steps=2, batch_size=4, **changes)
    calibrator = make(tiny_vit, synthesis=config)
    images, labels = next(iter(calibrator))
    assert images.device.type == labels.device.type == "cpu"
    assert (images.flatten(1).std(dim=1) > 0.05).all()
    assert calibrator.version == 1


def test_calibrated_model_computes_what_it_computes_on_a_cpu(digits_vit):
    calibrator = make(digits_vit)
    quant_model = calibrator.quantize()
    images = calibrator.pool.images()
    on_gpu = logits(quant_model, images, DEVICE)
    assert close(on_gpu, logits(calibrator.freeze(), images, DEVICE))
    assert close(on_gpu, logits(copy.deepcopy(quant_model), images, "cpu"))


@pytest.mark.parametrize("tuning", [
    [DISTILL], [RECONSTRUCT], [RECONSTRUCT, DISTILL],
    [DistillConfig(epochs=1, steps_per_epoch=2, batch_size=4, refresh_every=None, distance_weight=0.0,
                   feature_weight=1.0, precision="bfloat16", kept_tokens=0.5, weight_learning_rate=2e-3,
                   augment="cutmix")],
], ids=["distill", "reconstruct", "both", "best"])  # fmt: skip
def test_tuning(digits_vit, tuning, tmp_path):
    calibrator = make(digits_vit, tuning=tuning, run_dir=tmp_path / "run")
    quant_model = calibrator.quantize()
    again = make(digits_vit, tuning=tuning, run_dir=tmp_path / "run", run_mode="resume")
    again.load()
    images = calibrator.held_back.images()
    assert torch.isfinite(logits(quant_model, images, DEVICE)).all()
    assert torch.equal(logits(quant_model, images, DEVICE), logits(again.quant_model, images, DEVICE))


def test_tuning_compiled(digits_vit):
    config = DistillConfig(
        epochs=1, steps_per_epoch=3, batch_size=4, refresh_every=None, distance_weight=0.0, feature_weight=1.0,
        compile="always",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompilationWarning)  # tells why it fails
        quant_model = make(digits_vit, tuning=config).quantize()
    assert all(torch.isfinite(parameter).all() for parameter in quant_model.parameters())


def test_interrupted_run_goes_on(digits_vit, tmp_path, monkeypatch):
    """From the same files, the second epoch ends as in the run that was not interrupted, but for the order of sums."""
    train_epoch, seen = Distiller.train_epoch, []

    def noted(self, *arguments, **named):
        seen.append(self)
        if len(seen) == 2:  # the second epoch
            shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        return train_epoch(self, *arguments, **named)

    monkeypatch.setattr(Distiller, "train_epoch", noted)
    make(digits_vit, tuning=DISTILL, run_dir=tmp_path / "whole").quantize()
    make(digits_vit, tuning=DISTILL, run_dir=tmp_path / "copy", run_mode="resume").quantize()
    whole, resumed = seen[1], seen[-1]
    assert len(seen) == 3 and resumed is not whole and resumed.step == whole.step == 4
    wanted, found = whole.state()[0], resumed.state()[0]
    assert wanted.keys() == found.keys() and wanted
    for name, tensor in wanted.items():  # moments of the gradients of all four steps
        assert float((found[name].cpu() - tensor.cpu()).norm()) <= 0.05 * float(tensor.norm()) + 1e-12, name


def test_tuning_runs_the_twin(digits_vit):
    """Its scales are those of Brevitas to the bit, else Brevitas' own code would be tuned, slowly and without pivots.
    """
    calibrator = make(digits_vit)
    quant_model = calibrator.quantize()
    twin = training_twin(quant_model)
    images = calibrator.pool.images()
    assert close(logits(twin, images, DEVICE), logits(quant_model, images, DEVICE))


def test_random_states_are_kept(digits_vit):
    if DEVICE == "cuda":
        torch.cuda.manual_seed(5)
    before = states()
    calibrator = make(digits_vit, tuning=[RECONSTRUCT, DISTILL])
    calibrator.quantize()
    calibrator.calibrated_on(torch.randn(4, *calibrator.geometry.input_size, generator=torch.Generator()))
    calibrator.report()
    assert all(torch.equal(now, then) for now, then in zip(states(), before, strict=True))


def test_brevitas_own_calibration(digits_vit):
    digits_vit = digits_vit.to(DEVICE)
    quant_model = layerwise_quantize(copy.deepcopy(digits_vit))
    calibrator = make(digits_vit, quant_model=quant_model, device=None)
    with torch.no_grad(), calibration_mode(quant_model):
        for images, _ in calibrator:
            quant_model(images.to(DEVICE))
    calibrator.refresh(steps=2)
    assert torch.isfinite(logits(quant_model, calibrator.pool.images(), DEVICE)).all()


def test_mixed_precision_and_sensitivity(digits_vit):
    calibrator = make(digits_vit, scheme="auto-4.5")
    calibrator.quantize()
    assert calibrator.allocated
    groups = place_kinds(Switches(calibrator.quant_model).names)
    images = calibrator.pool.images().to(DEVICE)
    found = sensitivity(calibrator.quant_model, calibrator.maker.float_snapshot, images.split(4), groups)
    assert all(entry.divergence >= 0 for entry in found)


@pytest.mark.parametrize("family, example", EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_families(family, example):
    model = small_model(family, example)
    synthesis = SynthesisConfig(steps=2, warmup_steps=1, batch_size=4)
    calibrator = make(model, scheme="w8a8", num_images=4, held_back=None, synthesis=synthesis)
    quant_model = calibrator.quantize()
    images = calibrator.pool.images()
    assert close(logits(quant_model, images, DEVICE), logits(copy.deepcopy(quant_model), images, "cpu"))


@pytest.mark.skipif(importlib.util.find_spec("onnxoptimizer") is None, reason="needs the extra 'export'")
def test_file_of_a_model_on_the_gpu(digits_vit, tmp_path):
    from maskaq_brevitas.export import FORMATS

    calibrator = make(digits_vit)
    quant_model = calibrator.quantize()
    path = tmp_path / "model.onnx"
    FORMATS["qonnx"].export(quant_model, path, input_shape=calibrator.geometry.input_size)
    assert FORMATS["qonnx"].verify(path, quant_model, calibrator.held_back.images()).passed
    assert next(quant_model.parameters()).device.type == DEVICE


def test_evaluate_leaves_the_model_where_it_was(digits_vit):
    found = evaluate(digits_vit, digits_split(False, digits_vit), device=DEVICE)
    assert next(digits_vit.parameters()).device.type == "cpu"
    assert found.top1 > 95


def test_command_line(tmp_path, capsys):
    out = tmp_path / "run"
    main([
        "quantize", "digits_vit", "--scheme", "w4a4", "--device", DEVICE, "--batch-size", "auto", "--images", "32",
        "--steps", "20", "--tune", "distill", "--epochs", "2", "--no-export", "--out", str(out), "--quiet",
    ])  # fmt: skip
    assert "synthetic" in capsys.readouterr().out
    rows = {row["name"]: row["top1"] for row in json.loads((out / "report.json").read_text())["accuracy"]}
    assert min(rows.values()) > 90
    main(["evaluate", str(out), "--device", DEVICE, "--quiet"])
    main(["sensitivity", str(out), "--device", DEVICE, "--quiet"])
