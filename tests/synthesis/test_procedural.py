import numpy as np
import pytest
import torch

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.synthesis import maker
from maskaq_brevitas.synthesis.augment import low_frequency_images
from maskaq_brevitas.synthesis.procedural import dead_leaves_images
from maskaq_brevitas.synthesis.procedural import procedural_places
from maskaq_brevitas.synthesis.starts import draw_start


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", ((2, 3, 32, 48), (1, 1, 7, 5), (3, 4, 16, 16)))
def test_images_are_seeded_shares_of_any_shape(shape):
    images = dead_leaves_images(shape, generator())
    assert images.shape == shape and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1 and images.std() > 0.02
    assert torch.equal(images, dead_leaves_images(shape, generator()))
    assert not torch.equal(images, dead_leaves_images(shape, generator(1)))


def test_no_images():
    with pytest.raises(RuntimeError):
        dead_leaves_images((0, 3, 8, 8), generator())


def derivative_kurtosis(images):
    """Fourth standardised moment of horizontal differences: 3 for Gaussian images, far more for scenes with edges."""
    difference = np.diff(images.double().numpy(), axis=-1)
    centred = difference - difference.mean(axis=(1, 2, 3), keepdims=True)
    return ((centred**4).mean(axis=(1, 2, 3)) / (centred**2).mean(axis=(1, 2, 3)) ** 2).mean()


def test_dead_leaves_have_edges_and_flat_regions_which_noise_of_their_spectrum_lacks():
    leaves = dead_leaves_images((12, 3, 64, 64), generator())
    noise = low_frequency_images((12, 3, 64, 64), generator())
    assert derivative_kurtosis(noise) == pytest.approx(3, abs=0.3)
    assert derivative_kurtosis(leaves) > 10


def test_power_falls_like_that_of_photographs():
    power = np.zeros((64, 64))
    for image in dead_leaves_images((48, 3, 64, 64), generator()).double().numpy().reshape(-1, 64, 64):
        power += np.abs(np.fft.fft2(image - image.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None])
    inside = (frequency > 3 / 64) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[inside]), np.log(power[inside]), 1)[0]
    assert -3.2 < slope < -1.6  # photographs: -2, give or take 0.5


def test_synthesis_can_start_from_dead_leaves():
    low, high = torch.tensor([-2.0, -1.0, 0.0]).view(3, 1, 1), torch.tensor([2.0, 3.0, 1.0]).view(3, 1, 1)
    start = draw_start("dead_leaves", (2, 3, 16, 16), low, high, generator())
    shares = dead_leaves_images((2, 3, 16, 16), generator())
    torch.testing.assert_close((start - low) / (high - low), shares)


@pytest.mark.parametrize(("count", "share", "expected"), (
    (6, 0.5, [1, 3, 5]), (5, 0.5, [1, 3]), (1, 0.5, []), (8, 0.25, [3, 7]), (4, 0.75, [1, 2, 3]), (3, 0.0, []),
    (10, 0.99, list(range(1, 10)))
))  # fmt: skip
def test_places_are_spread_evenly(count, share, expected):
    assert procedural_places(count, share).nonzero().flatten().tolist() == expected


def make(model, **changes):
    config = SynthesisConfig(steps=2, warmup_steps=1, batch_size=4, procedural_share=0.5)
    options = dict(scheme="w8a8", num_images=7, batch_size=4, held_back=2, synthesis=config, progress=False)
    return DataFreeCalibrator(model, **{**options, **changes})


def test_half_of_a_pool_is_drawn_and_labelled_by_the_float_model(tiny_vit):
    calibrator = make(tiny_vit)
    pool = calibrator.ensure_images()
    drawn = procedural_places(7, 0.5)
    assert int(drawn.sum()) == 3
    with torch.no_grad():
        seen = tiny_vit(pool.images())
    assert torch.equal(pool.labels[drawn], seen[drawn].argmax(dim=-1))
    assert pool.labels[~drawn].unique().numel() == 4  # each class once
    assert (pool.informative.sum(dim=1) == pool.informative[0].sum()).all()
    others = make(tiny_vit, synthesis=SynthesisConfig(steps=3, warmup_steps=1, batch_size=4)).ensure_images()
    assert torch.equal(others.pixels[drawn], pool.pixels[drawn])  # whatever the optimiser does
    assert not torch.equal(others.pixels[~drawn], pool.pixels[~drawn])
    assert not torch.equal(make(tiny_vit, seed=1).ensure_images().pixels[drawn], pool.pixels[drawn])
    assert not torch.equal(calibrator.held_back.pixels[1], pool.pixels[1])


def test_a_refresh_leaves_drawn_images_alone(tiny_vit):
    calibrator = make(tiny_vit)
    before = calibrator.ensure_images().pixels.clone()
    drawn = procedural_places(7, 0.5)
    assert calibrator.refresh(start="noise", steps=1, share=0.5)["images"] == 2
    first = (calibrator.pool.pixels != before).flatten(1).any(dim=1)
    assert int(first.sum()) == 2 and not (first & drawn).any()
    assert calibrator.refresh(start="noise", steps=1)["images"] == 4
    assert torch.equal((calibrator.pool.pixels != before).flatten(1).any(dim=1), ~drawn)
    assert (calibrator.pool.made_at[drawn] == 1).all() and (calibrator.pool.made_at[~drawn] == 3).all()


def test_alignment_is_measured_on_optimised_images(tiny_vit):
    calibrator = make(tiny_vit)
    calibrator.calibrate()
    before = calibrator.maker.alignment(calibrator.freeze())
    calibrator.pool.pixels[procedural_places(7, 0.5)] = 0
    assert calibrator.maker.alignment(calibrator.freeze()) == before
    calibrator.pool.pixels[0] = 0
    assert calibrator.maker.alignment(calibrator.freeze()) != before


def test_an_interrupted_synthesis_ends_with_the_same_bytes(tiny_vit, tmp_path, monkeypatch):
    whole = make(tiny_vit).ensure_images().pixels
    calls, synthesize = [], maker.synthesize

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return synthesize(*args, **kwargs)

    monkeypatch.setattr(maker, "synthesize", stops)
    with pytest.raises(KeyboardInterrupt):
        make(tiny_vit, run_dir=tmp_path / "run").ensure_images()
    again = make(tiny_vit, run_dir=tmp_path / "run", run_mode="resume").ensure_images()
    assert torch.equal(again.pixels, whole)


def test_a_model_without_classes(tiny_vit):
    tiny_vit.reset_classifier(0)
    pool = make(tiny_vit).ensure_images()
    assert pool.pixels.flatten(1).float().std(dim=1).min() > 0 and (pool.labels == 0).all()
