"""Images of one run that serve for others."""

import json
import shutil

import pytest
import torch
import yaml

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas import cli
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import DamagedFileError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.files import load_tensors
from maskaq_brevitas.options import parse
from maskaq_brevitas.synthesis import maker

FAST = SynthesisConfig(steps=2, warmup_steps=1, batch_size=4, procedural_share=0.0)


def make(model, **changes):
    return DataFreeCalibrator(model, **{**dict(scheme="w4a4", batch_size=4, progress=False), **changes})


@pytest.fixture
def source(tiny_vit, tmp_path):
    """A folder with the images of a run, whose quant model was never calibrated."""
    folder = tmp_path / "source"
    make(tiny_vit, num_images=6, held_back=3, synthesis=FAST, run_dir=folder).ensure_images()
    return folder


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def no_synthesis(monkeypatch):
    def refuse(*_arguments, **_options):
        raise AssertionError("images are synthesised")

    monkeypatch.setattr(maker, "synthesize", refuse)


def test_images_are_taken_with_their_settings(tiny_vit, source, tmp_path, no_synthesis):
    calibrator = make(tiny_vit, scheme="w3a3", images_from=source, run_dir=tmp_path / "run", seed=5)
    assert (len(calibrator.pool), len(calibrator.held_back), calibrator.synthesis) == (6, 3, FAST)
    calibrator.quantize(DistillConfig(epochs=1, steps_per_epoch=1, batch_size=4, refresh_every=None))
    calibrator.save()
    for name in ("images.safetensors", "held_back.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (source / name).read_bytes()
    # The run is whole by itself.
    shutil.rmtree(source)
    again = make(tiny_vit, scheme="w3a3", num_images=6, held_back=3)
    again.load(tmp_path / "run")
    assert torch.equal(again.pool.pixels, calibrator.pool.pixels)


def test_images_are_taken_without_a_run_directory_too(tiny_vit, source, no_synthesis):
    calibrator = make(tiny_vit, images_from=source)
    images, _ = next(iter(calibrator))
    pixels = load_tensors(source / "images.safetensors")["pixels"][:4]
    assert torch.equal(images, calibrator.geometry.normalize(pixels.float() / 255))


def test_a_refresh_couples_them_to_the_new_model(tiny_vit, source, tmp_path):
    calibrator = make(tiny_vit, images_from=source, run_dir=tmp_path / "run")
    before = calibrator.ensure_images().pixels.clone()
    assert calibrator.refresh(steps=2)["version"] == 2
    assert not torch.equal(calibrator.pool.pixels, before)
    resumed = make(tiny_vit, images_from=source, run_dir=tmp_path / "run", run_mode="resume")
    assert torch.equal(resumed.ensure_images().pixels, calibrator.pool.pixels)


@pytest.mark.parametrize("fate", ["refreshed", "gone"])
def test_a_run_that_has_its_images_goes_on_without_the_other(tiny_vit, source, tmp_path, fate):
    begun = make(tiny_vit, images_from=source, run_dir=tmp_path / "run")
    before = begun.ensure_images().pixels.clone()
    if fate == "gone":
        shutil.rmtree(source)
    else:
        make(tiny_vit, num_images=6, held_back=3, synthesis=FAST, run_dir=source, run_mode="resume").refresh(steps=2)
    resumed = make(tiny_vit, images_from=source, run_dir=tmp_path / "run", run_mode="resume")
    assert torch.equal(resumed.ensure_images().pixels, before)


def test_a_run_cannot_take_its_own_images(tiny_vit, source):
    with pytest.raises(ConfigurationError, match="Choose another folder"):
        make(tiny_vit, images_from=source, run_dir=source, run_mode="overwrite")
    assert (source / "images.safetensors").is_file()


@pytest.mark.parametrize("changes, message", [
    (dict(num_images=5), "num_images: 6 -> 5"),
    (dict(held_back=2), "held_back: 3 -> 2"),
    (dict(steps=9), "synthesis.steps: 2 -> 9"),
    (dict(synthesis=SynthesisConfig(steps=2)), "synthesis.batch_size: 4 -> 16"),
], ids=["images", "held-back", "steps", "synthesis"])  # fmt: skip
def test_other_settings_are_refused(tiny_vit, source, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        make(tiny_vit, images_from=source, **changes)


def test_images_of_another_model_are_refused(tiny_vit, source):
    tiny_vit.head.bias.data += 1
    with pytest.raises(ConfigurationError, match="other weights"):
        make(tiny_vit, images_from=source)


def test_a_run_without_images_is_refused(tiny_vit, source, tmp_path):
    with pytest.raises(RunDirectoryError, match="holds no run"):
        make(tiny_vit, images_from=tmp_path)
    (source / "held_back.safetensors").unlink()
    with pytest.raises(RunDirectoryError, match="no held_back.safetensors"):
        make(tiny_vit, images_from=source)


def test_images_that_change_in_the_meantime_are_refused(tiny_vit, source, tmp_path):
    calibrator = make(tiny_vit, images_from=source)
    make(tiny_vit, num_images=6, held_back=3, synthesis=FAST, seed=1, run_dir=tmp_path / "other").ensure_images()
    shutil.copy(tmp_path / "other" / "images.safetensors", source)
    with pytest.raises(DamagedFileError, match="replaced in the meantime"):
        calibrator.ensure_images()


@pytest.mark.parametrize("name", ["images.safetensors", "held_back.safetensors"])
def test_damaged_images_are_refused(tiny_vit, source, tmp_path, name):
    calibrator = make(tiny_vit, images_from=source)
    make(tiny_vit, images_from=source, run_dir=tmp_path / "run").ensure_images()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    damage(source / name)
    for _ in range(2):  # also when it is tried again
        with pytest.raises(DamagedFileError, match="checksum"):
            calibrator.calibrate()
    with pytest.raises(DamagedFileError, match="checksum"):
        make(tiny_vit, images_from=source, run_dir=tmp_path / "run", run_mode="overwrite")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_other_images_make_another_run(tiny_vit, source, tmp_path):
    make(tiny_vit, images_from=source, run_dir=tmp_path / "run")
    make(
        tiny_vit, num_images=6, held_back=3, synthesis=FAST, seed=1, run_dir=tmp_path / "other"
    ).ensure_images()
    with pytest.raises(RunDirectoryError, match="images_from"):
        make(tiny_vit, images_from=tmp_path / "other", run_dir=tmp_path / "run", run_mode="resume")


def test_command_line(tmp_path, capsys):
    common = ["--no-export", "--no-baselines", "--eval-limit", "10", "--quiet"]
    first, second = tmp_path / "first", tmp_path / "second"
    made = ["--images", "4", "--batch-size", "4", "--steps", "2", "--synthesis.entropy_weight", "0.5"]
    assert cli.main(["quantize", "digits_vit", *made, *common, "--out", str(first)]) == 0
    told = ["quantize", "digits_vit", "--scheme", "w3a3", "--images-from", str(first), *common, "--out", str(second)]
    assert cli.main(told) == 0
    saved = yaml.safe_load((second / "config.yaml").read_text())
    assert (saved["images"], saved["steps"], saved["images_from"]) == (4, 2, str(first))
    assert saved["synthesis"]["entropy_weight"] == 0.5
    assert cli.main([*told, "--resume"]) == 0
    assert cli.main([*told, "--overwrite", "--images", "8"]) != 0
    assert "num_images: 4 -> 8" in capsys.readouterr().err
    assert cli.main([*told[:-1], str(first), "--overwrite"]) != 0
    assert "Choose another folder" in capsys.readouterr().err
    shutil.rmtree(first)
    assert cli.main([*told, "--resume"]) == 0
    assert cli.main(["evaluate", str(second), "--eval-limit", "10", "--quiet"]) == 0
    assert json.loads((second / "run.json").read_text())["identity"]["images_from"]


def test_command_line_takes_the_images_of_a_run_made_in_python(digits_vit, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "run"
    make(digits_vit, num_images=6, held_back=3, synthesis=FAST, run_dir=source).ensure_images()
    common = ["--no-export", "--no-baselines", "--eval-limit", "10", "--quiet"]
    assert cli.main(["quantize", "digits_vit", "--images-from", str(source), *common, "--out", str(out)]) == 0
    assert (out / "held_back.safetensors").read_bytes() == (source / "held_back.safetensors").read_bytes()
    assert cli.main(["evaluate", str(out), "--eval-limit", "10", "--quiet"]) == 0


def test_options_of_the_effort_stay(tiny_vit, tmp_path):
    """What says how images are made comes from the other run, what says how to tune does not."""
    make(tiny_vit, num_images=7, synthesis=FAST, run_dir=tmp_path / "run")
    options = parse("quantize", ["digits_vit", "--effort", "best", "--images-from", str(tmp_path / "run")])
    usual = parse("quantize", ["digits_vit", "--effort", "best"])
    assert (options.images, options.steps, options.batch_size) == (7, FAST.steps, FAST.batch_size)
    assert vars(options)["synthesis.procedural_share"] == 0
    assert (options.epochs, options.tune) == (usual.epochs, "distill")
