"""quantize(tuning=...), refresh and resume: what they record, what they keep, and that they end with the same bytes."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_vit import random_vit
from torch import nn

from maskaq_brevitas import files
from maskaq_brevitas.calibrator import DataFreeCalibrator
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.models.zoo import load_model
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.synthesis.pool import SyntheticImages
from maskaq_brevitas.tuning.calibrate import is_calibrated
from maskaq_brevitas.tuning.distill import Distiller

TUNING = DistillConfig(epochs=3, refresh_every=1, refresh_steps=1, batch_size=4, learning_rate=1e-4)
RESULTS = ("images.safetensors", "held_back.safetensors", "quant_model.safetensors")


def small_vit() -> nn.Module:
    """A ViT that the child process of the kill test can build as well: random weights of a fixed seed."""
    return random_vit(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=4)


def make_calibrator(model: nn.Module, **changes) -> DataFreeCalibrator:
    """A calibrator of the smallest budget; equalisation is on, because it is what a resumed run must not repeat."""
    scheme = replace(resolve_scheme("w4a4"), weight_range="minmax", activation_range="minmax")
    options = dict(
        scheme=scheme, num_images=6, held_back=2, batch_size=4, seed=0, progress=False,
        synthesis=SynthesisConfig(steps=2, warmup_steps=1, batch_size=4, procedural_share=0.0),
    )  # fmt: skip
    return DataFreeCalibrator(model, **{**options, **changes})


def _results(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in RESULTS}


@pytest.fixture
def states(tmp_path, monkeypatch) -> tuple[dict[str, bytes], list[Path]]:
    """Results of an uninterrupted run, and what a kill before each of its writes would leave on disk."""
    run, copies = tmp_path / "whole", []

    def copy_first(function):
        def wrapped(*args):
            copies.append(tmp_path / f"killed-{len(copies):02d}")
            shutil.copytree(run, copies[-1])
            return function(*args)

        return wrapped

    calibrator = make_calibrator(small_vit(), run_dir=run)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_whole", copy_first(files.write_whole))
        patch.setattr(SyntheticImages, "save", copy_first(SyntheticImages.save))
        calibrator.quantize(TUNING)
    return _results(run), copies


@pytest.mark.heavy
def test_a_run_killed_before_any_write_ends_with_the_same_bytes(states):
    expected, copies = states
    assert len(copies) > 20
    for copy in copies:
        calibrator = make_calibrator(small_vit(), run_dir=copy, run_mode="resume")
        calibrator.quantize(TUNING)
        assert _results(copy) == expected, copy
        assert [entry["version"] for entry in calibrator.refreshes] == [2, 3], copy
        assert [entry["epoch"] for entry in calibrator.history if entry["event"] == "epoch"] == [1, 2, 3], copy
        assert not list((copy / "state").glob("images-*")), copy


@pytest.mark.heavy
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    make_calibrator(small_vit(), run_dir=tmp_path / "whole").quantize(TUNING)
    run = tmp_path / "killed"
    places = (
        "state/images-1-0001", "state/tuning-0-0001", "state/images-2-0000", "images.safetensors",
        "state/tuning-0-0002",
    )  # fmt: skip
    for place in places:
        command = [sys.executable, "-W", "ignore", __file__, str(run), place, str(torch.get_num_threads())]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        assert child.returncode == -signal.SIGKILL, child.stderr
    make_calibrator(small_vit(), run_dir=run, run_mode="resume").quantize(TUNING)
    assert _results(run) == _results(tmp_path / "whole")


def test_images_drawn_for_the_tuning_are_the_same_after_a_resume(tmp_path, monkeypatch):
    tuning = replace(
        TUNING, drawn_images=5, steps_per_epoch=3, refresh_every=None, distance_weight=0.0, feature_weight=1.0
    )  # fmt: skip
    make_calibrator(small_vit(), run_dir=tmp_path / "whole").quantize(tuning)
    train, seen = Distiller.train_epoch, []

    def interrupted(self, batches, *rest, **options):
        if len(seen) == 3:
            raise KeyboardInterrupt
        # One by one, as the epoch asks for them: the augmentation draws from the same generator in between.
        return train(self, (seen.append(batch) or batch for batch in batches), *rest, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distiller, "train_epoch", interrupted)
        make_calibrator(small_vit(), run_dir=tmp_path / "killed").quantize(tuning)
    resumed = make_calibrator(small_vit(), run_dir=tmp_path / "killed", run_mode="resume")
    resumed.quantize(tuning)
    assert _results(tmp_path / "killed") == _results(tmp_path / "whole")
    # Three batches of two images of the pool and two of the drawn ones each.
    assert [len(batch) for batch in seen] == [4, 4, 4]
    pool = {image.numpy().tobytes() for image in resumed.pool.images()}
    assert [[image.numpy().tobytes() in pool for image in batch] for batch in seen] == [[True, True, False, False]] * 3


def test_what_tuning_began_with_is_kept_until_the_images_change(tiny_vit, monkeypatch):
    calibrator = make_calibrator(tiny_vit, held_back=0)
    calibrator.quantize(replace(TUNING, refresh_every=None))
    images = calibrator.pool.images()
    again = calibrator.calibrated_on(images)
    counted, calibrate = [], calibrator.quant_maker.calibrate
    monkeypatch.setattr(calibrator.quant_maker, "calibrate", lambda *given: counted.append(1) or calibrate(*given))
    kept = calibrator.calibrated_on()
    assert not counted and torch.equal(kept(images), again(images))
    assert not torch.equal(kept(images), calibrator.freeze()(images))
    calibrator.refresh(steps=1)
    calibrator.calibrated_on()
    assert counted


def test_images_drawn_for_the_tuning_are_drawn_again(tmp_path, monkeypatch):
    """Epochs 0 and 1 see one set of drawn images, 2 and 3 another; a run resumed before epoch 3 sees the same."""
    tuning = replace(
        TUNING, epochs=4, drawn_images=4, redraw_every=2, steps_per_epoch=2, refresh_every=None, augment="none"
    )  # fmt: skip
    train, seen = Distiller.train_epoch, []

    def noted(self, batches, *rest, **options):
        found: list[torch.Tensor] = []
        losses = train(self, (found.append(batch) or batch for batch in batches), *rest, **options)
        seen.append({image.numpy().tobytes() for batch in found for image in batch[2:]})
        return losses

    monkeypatch.setattr(Distiller, "train_epoch", noted)
    make_calibrator(small_vit(), run_dir=tmp_path / "whole").quantize(tuning)
    assert [len(images) for images in seen] == [4, 4, 4, 4]
    assert seen[0] == seen[1] and seen[2] == seen[3] and not seen[0] & seen[2]

    def interrupted(self, *given, **options):
        if len(seen) == 7:
            raise KeyboardInterrupt
        return noted(self, *given, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distiller, "train_epoch", interrupted)
        make_calibrator(small_vit(), run_dir=tmp_path / "killed").quantize(tuning)
    make_calibrator(small_vit(), run_dir=tmp_path / "killed", run_mode="resume").quantize(tuning)
    assert len(seen) == 8 and seen[7] == seen[3]
    assert _results(tmp_path / "killed") == _results(tmp_path / "whole")


def test_an_error_in_the_middle_of_a_refresh_leaves_the_pool_whole(tiny_vit, tmp_path, monkeypatch):
    whole = make_calibrator(tiny_vit, run_dir=tmp_path / "whole")
    whole.quantize(TUNING)
    calibrator = make_calibrator(tiny_vit, run_dir=tmp_path / "run")
    calibrator.ensure_images()
    before = calibrator.pool.pixels.clone()
    write = RunDirectory.write_tensors

    def fail(self, name, tensors):
        if name == "state/images-2-0001.safetensors":
            raise KeyboardInterrupt
        write(self, name, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_tensors", fail)
        with pytest.raises(KeyboardInterrupt):
            calibrator.quantize(TUNING)
    assert calibrator.version == 1
    assert torch.equal(calibrator.pool.pixels, before)
    make_calibrator(tiny_vit, run_dir=tmp_path / "run", run_mode="resume").quantize(TUNING)
    assert _results(tmp_path / "run") == _results(tmp_path / "whole")


def test_same_seed_gives_the_same_images_and_another_seed_others(tiny_vit):
    first, again, other = (make_calibrator(tiny_vit, seed=seed).ensure_images() for seed in (0, 0, 1))
    assert first.pixels.numpy().tobytes() == again.pixels.numpy().tobytes()
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.pixels, other.pixels)


def test_the_best_held_back_state_is_kept(tiny_vit):
    calibrator = make_calibrator(tiny_vit)
    # A rate that destroys the model: the calibrated state must win.
    tuning = replace(TUNING, refresh_every=None, learning_rate=1.0, max_gradient_norm=None, epochs=2)
    calibrator.quantize(tuning)
    losses = [entry["held_back_loss"] for entry in calibrator.history]
    assert calibrator.best_epoch == 0
    assert min(losses) == losses[0]
    reference = make_calibrator(tiny_vit)
    reference.calibrate()
    expected = reference.quant_model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in calibrator.quant_model.state_dict().items())


def test_without_held_back_images_the_last_state_is_kept(tiny_vit):
    calibrator = make_calibrator(tiny_vit, held_back=0)
    calibrator.quantize(replace(TUNING, refresh_every=None))
    assert calibrator.best_epoch == TUNING.epochs
    assert [entry["held_back_loss"] for entry in calibrator.history] == [None] * 4


def test_history_and_stages_tell_what_happened(tiny_vit):
    calibrator = make_calibrator(tiny_vit, tuning=replace(TUNING, refresh_every=2))
    calibrator.quantize()
    assert [entry["event"] for entry in calibrator.history] == ["calibration", "epoch", "epoch", "refresh", "epoch"]
    assert [entry["pool_version"] for entry in calibrator.history if "pool_version" in entry] == [1, 1, 1, 2]
    (refresh,) = calibrator.refreshes
    assert (refresh["version"], refresh["images"], refresh["steps"], refresh["start"]) == (2, 6, 1, "images")
    assert refresh["alignment_before"] > 0
    names = [entry["stage"] for entry in calibrator.stages]
    assert names == ["synthesis", "calibration", "refresh 2", "distillation, its refreshes included"]


def test_a_factory_gives_the_optimiser(tiny_vit):
    built = []

    def optimizer(groups):
        built.append(torch.optim.RAdam(groups))
        return built[0]

    make_calibrator(tiny_vit).quantize(replace(TUNING, epochs=1), optimizer=optimizer)
    assert len(built) == 1


def test_another_tuning_is_refused_with_the_differing_keys(tiny_vit, tmp_path):
    tuning = replace(TUNING, epochs=1)
    make_calibrator(tiny_vit, run_dir=tmp_path / "given").quantize(tuning)
    with pytest.raises(RunDirectoryError, match="tuning.json.*0-distill.temperature: 5.0 -> 4.0"):
        resumed = make_calibrator(tiny_vit, run_dir=tmp_path / "given", run_mode="resume")
        resumed.quantize(replace(tuning, temperature=4.0))
    make_calibrator(tiny_vit, run_dir=tmp_path / "built", tuning=tuning)
    with pytest.raises(RunDirectoryError, match=r"tuning\.0-distill\.epochs: 1 -> 2"):
        make_calibrator(tiny_vit, run_dir=tmp_path / "built", run_mode="resume", tuning=replace(tuning, epochs=2))
    with pytest.raises(ConfigurationError, match="another tuning than the constructor"):
        make_calibrator(tiny_vit, tuning=tuning).quantize(TUNING)


def test_a_checkpoint_of_other_images_is_refused(tiny_vit, tmp_path):
    run = tmp_path / "run"
    calibrator = make_calibrator(tiny_vit, run_dir=run)
    calibrator.quantize(replace(TUNING, epochs=2, refresh_every=1))
    calibrator.refresh()
    calibrator.refresh()
    note = calibrator.run.read_json("state/tuning.json")
    calibrator.run.write_json("state/tuning.json", {**note, "done": 1, "pool_version": 1})
    with pytest.raises(RunDirectoryError, match="images are of version 4, but the checkpoint.*version 1"):
        make_calibrator(tiny_vit, run_dir=run, run_mode="resume").quantize(replace(TUNING, epochs=2, refresh_every=1))


def test_a_given_model_stays_uncalibrated_until_its_owner_calibrates(tiny_vit):
    given, _ = swap_layers(tiny_vit, "w4a4")
    before = {name: value.clone() for name, value in given.state_dict().items()}
    calibrator = make_calibrator(tiny_vit, quant_model=given)
    calibrator.ensure_images()
    assert not is_calibrated(given)
    after = given.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())


# -- refresh ----------------------------------------------------------------------------------------------------


def test_a_refresh_brings_the_attention_closer():
    """Images made without alignment; a refresh with alignment alone must bring the masked attention closer."""
    synthesis = SynthesisConfig(steps=10, warmup_steps=2, batch_size=4, align_weight=0.0)
    calibrator = make_calibrator(load_model("digits_vit"), scheme="w3a3", synthesis=synthesis, num_images=4)
    calibrator.calibrate()
    calibrator.maker.config = replace(
        synthesis, head_weight=0, class_weight=0, tv_weight=1e-9, entropy_weight=0, align_weight=1.0, jitter=0,
        late_jitter=0, colour_shift=0, colour_scale=0,
    )  # fmt: skip
    entry = calibrator.refresh(steps=20)
    assert entry["alignment_after"] < 0.95 * entry["alignment_before"]
    assert calibrator.refreshes == [entry]


def test_a_share_replaces_the_oldest_images_and_keeps_the_labels(tiny_vit):
    calibrator = make_calibrator(tiny_vit)
    calibrator.calibrate()
    labels = calibrator.pool.labels.clone()
    for expected in ([0, 1], [2, 3], [4, 5], [0, 1]):
        before = calibrator.pool.pixels.clone()
        calibrator.refresh(share=1 / 3, steps=1)
        changed = (before != calibrator.pool.pixels).flatten(1).any(dim=1)
        assert changed.nonzero().flatten().tolist() == expected
        assert torch.equal(calibrator.pool.labels, labels)
    calibrator.refresh(start="noise", steps=1)
    assert sorted(calibrator.pool.labels.tolist()) == sorted(labels.tolist())
    assert calibrator.version == 6


def test_a_refresh_is_warm_with_a_quarter_of_rate_and_steps(tiny_vit, monkeypatch):
    from maskaq_brevitas.synthesis import maker as module

    calls = []

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return module_synthesize(*args, **kwargs)

    module_synthesize = module.synthesize
    calibrator = make_calibrator(
        tiny_vit, synthesis=SynthesisConfig(steps=8, warmup_steps=1, batch_size=8, procedural_share=0.0)
    )
    calibrator.calibrate()
    before = calibrator.pool.images()
    monkeypatch.setattr(module, "synthesize", spy)
    calibrator.refresh()
    calibrator.refresh(start="noise", steps=1)
    warm, cold = calls
    assert torch.equal(warm["start"], before)
    assert (warm["steps"], warm["learning_rate"]) == (2, 0.25 * calibrator.synthesis.learning_rate)
    assert cold["start"] is None
    assert (cold["steps"], cold["learning_rate"]) == (1, calibrator.synthesis.learning_rate)


def test_batches_of_a_refresh_against_another_model_are_not_reused(tiny_vit, tmp_path):
    calibrator = make_calibrator(tiny_vit, run_dir=tmp_path / "run")
    calibrator.calibrate()
    run = calibrator.run
    shape = (4, 3, 32, 32)
    run.write_tensors(
        "state/images-2-0000.safetensors",
        dict(images=torch.zeros(shape), informative=torch.zeros(4, 16, dtype=torch.bool), redrawn=torch.tensor(0)),
    )
    plan = dict(event="refresh", version=2, images=6, steps=1, start="images", quant_model="another")
    run.write_json("state/refresh-2.json", {**plan, "alignment_before": 1.0})
    entry = calibrator.refresh(steps=1)
    assert entry["alignment_before"] != 1.0
    assert calibrator.pool.pixels[:4].float().std() > 0


def _main(run: str, place: str, threads: str) -> None:
    """The child of the kill test: resumes the run and kills itself right after the first write of a file."""
    torch.set_num_threads(int(threads))

    def kill(name: str) -> None:
        if name.startswith(place):
            os.kill(os.getpid(), signal.SIGKILL)

    write_tensors, save = RunDirectory.write_tensors, SyntheticImages.save

    def write_and_die(self, name, tensors):
        write_tensors(self, name, tensors)
        kill(name)

    def save_and_die(self, path):
        save(self, path)
        if self.version > 1:
            kill(Path(path).name)

    RunDirectory.write_tensors = write_and_die
    SyntheticImages.save = save_and_die
    make_calibrator(small_vit(), run_dir=run, run_mode="resume").quantize(TUNING)


if __name__ == "__main__":
    _main(*sys.argv[1:])
