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


def test_colours_are_drawn_per_image_and_channel():
    factors, offsets = augment.draw_colours(50, 3, 0.5, 0.1, generator())
    assert factors.shape == offsets.shape == (50, 3, 1, 1)
    assert float(factors.log().std()) == pytest.approx(0.1, abs=0.02)
    assert float(offsets.abs().max()) <= 0.5 and float(offsets.std()) == pytest.approx(0.5 / np.sqrt(3), abs=0.04)
    assert factors.unique().numel() == offsets.unique().numel() == 150
    factors, offsets = augment.draw_colours(2, 1, 0.0, 0.0, generator())
    assert (factors == 1).all() and (offsets == 0).all()


def coordinates(height, width):
    """An image that is its own coordinates in pixels from its middle, across and down, so that it tells a movement."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns - (width - 1) / 2, rows - (height - 1) / 2])


def test_parts_are_turned_mirrored_and_cut_without_shear():
    """The map between pixels is a turn of at most 20 degrees, a mirror, and two sides that are scaled."""
    count, height, width = 64, 48, 80
    images = coordinates(height, width).expand(count, -1, -1, -1)
    found = augment.cut_out(images, augment.draw_crops(tuple(images.shape), 0.3, 20, 0.5, generator()))
    middle = found[:, :, height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4]
    across = (middle[..., :, 1:] - middle[..., :, :-1]).flatten(2).median(dim=2).values  # (count, 2)
    down = (middle[..., 1:, :] - middle[..., :-1, :]).flatten(2).median(dim=2).values
    # Reflected middles apart, the two directions of the cut stand upright on one another.
    cosine = (across * down).sum(1) / across.norm(dim=1) / down.norm(dim=1)
    assert float(cosine.abs().max()) < 1e-3
    turn = torch.rad2deg(torch.atan2(across[:, 1], across[:, 0].abs()))
    assert 15 < float(turn.abs().max()) <= 20 + 1e-3
    area = across.norm(dim=1) * down.norm(dim=1)
    assert 0.29 < float(area.min()) < 0.4 and 0.85 < float(area.max()) <= 1 + 1e-4
    mirrored = (across[:, 0] < 0).float().mean()
    assert 0.3 < float(mirrored) < 0.7


def test_a_part_is_what_slicing_gives():
    """Half of each side, at twice the size, from the corner that the offset says."""
    images = torch.rand(2, 3, 12, 20, generator=generator())
    lines = torch.tensor([[0.5, 0, -0.5], [0, 0.5, 0.5]]).expand(2, -1, -1)  # left and at the bottom
    found = augment.cut_out(images, lines)
    expected = torch.nn.functional.interpolate(images[..., 6:, :10], (12, 20), mode="bilinear")
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])  # behind the border there is more


@pytest.mark.parametrize("area", (0.25, 0.6, 1.0))
def test_parts_lie_in_the_image_and_are_as_large_as_said(area):
    lines = augment.draw_crops((500, 3, 24, 40), area, 0, 0, generator())
    sizes, offsets = lines[:, [0, 1], [0, 1]], lines[:, :, 2]
    assert ((offsets.abs() + sizes) <= 1 + 1e-6).all()
    shares = sizes.prod(dim=1)
    assert shares.max() > 0.98 * min(1.0, area + 0.75 * (1 - area)) and shares.max() <= 1
    if area < 0.75:  # above, sides are cut to the image
        assert area <= shares.min() < area + 0.02
