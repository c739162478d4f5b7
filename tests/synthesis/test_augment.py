import numpy as np
import pytest
import torch

from maskaq_brevitas.synthesis import augment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_low_frequency_images_have_the_spectrum_of_natural_ones():
    images = augment.low_frequency_images((32, 3, 64, 64), generator()).double().numpy()
    power = np.zeros((64, 64))
    for image in images.reshape(-1, 64, 64):
        power += np.abs(np.fft.fft2(image)) ** 2
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None])
    inside = (frequency > 3 / 64) & (frequency < 0.5)
    slope = np.polyfit(np.log(frequency[inside]), np.log(power[inside]), 1)[0]
    assert slope == pytest.approx(-2, abs=0.1)  # amplitude 1/f: power 1/f^2
    assert np.allclose(images.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    assert np.allclose(images.std(axis=(1, 2, 3)), 1, atol=1e-3)


def test_low_frequency_channels_share_most_of_their_variance():
    red, green, _ = augment.low_frequency_images((64, 3, 32, 32), generator()).unbind(1)
    correlation = np.corrcoef(red.flatten(), green.flatten())[0, 1]
    assert correlation == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("draw", (augment.gaussian_images, augment.low_frequency_images))
@pytest.mark.parametrize("shape", ((2, 1, 8, 12), (1, 3, 7, 5)))
def test_starts_are_seeded(draw, shape):
    first = draw(shape, generator())
    assert first.shape == shape and torch.isfinite(first).all()
    assert torch.equal(first, draw(shape, generator()))
    assert not torch.equal(first, draw(shape, generator(1)))


def test_gaussian_images():
    images = augment.gaussian_images((4, 3, 64, 64), generator())
    assert float(images.mean()) == pytest.approx(0, abs=0.02) and float(images.std()) == pytest.approx(1, abs=0.02)


def test_rolls_cover_every_offset_and_nothing_else():
    drawn = [augment.draw_roll(2, generator(seed)) for seed in range(200)]
    assert set(drawn) == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
    stream = generator()
    before = stream.get_state()
    assert augment.draw_roll(0, stream) == (0, 0) and torch.equal(stream.get_state(), before)


def test_colour_jitter_is_affine_per_image_and_channel():
    images = torch.randn(50, 3, 4, 4, generator=generator(1))
    changed = augment.colour_jitter(images, 0.5, 0.1, generator())
    scales, shifts = np.zeros((50, 3)), np.zeros((50, 3))
    for image in range(50):
        for channel in range(3):
            x, y = images[image, channel].flatten().numpy(), changed[image, channel].flatten().numpy()
            scales[image, channel], shifts[image, channel] = np.polyfit(x, y, 1)
            assert np.allclose(y, scales[image, channel] * x + shifts[image, channel], atol=1e-5)
    assert np.log(scales).std() == pytest.approx(0.1, abs=0.02)
    assert np.abs(shifts).max() <= 0.5 + 1e-5 and shifts.std() == pytest.approx(0.5 / np.sqrt(3), abs=0.04)
    assert np.unique(scales.round(6)).size == 150
    assert torch.equal(augment.colour_jitter(images, 0.0, 0.0, generator()), images)
