import numpy as np
import pytest
import torch

from maskaq_brevitas.synthesis.textures import TexturePainter

KINDS = ("clouds", "strands", "cells", "formula", "network", "smooth", "texture")


def painter(shape=(3, 64, 64), seed=0):
    return TexturePainter(shape, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ((3, 24, 40), (1, 9, 9), (4, 5, 3)))
def test_every_kind_gives_finite_seeded_textures_of_any_shape(kind, shape):
    for seed in range(8):
        image = getattr(painter(shape, seed), kind)()
        assert image.shape == shape and torch.isfinite(image).all()
        assert torch.equal(image, getattr(painter(shape, seed), kind)())
    assert not torch.equal(image, getattr(painter(shape, seed + 1), kind)())


@pytest.mark.parametrize("exponent", (0.5, 1.0, 1.8))
def test_noise_falls_with_frequency_as_asked(exponent):
    texture = painter((3, 128, 128))
    texture.chance = lambda share: False  # the same in all directions
    power = np.abs(np.fft.fft2(texture.noise(exponent, 64).numpy())) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128), indexing="ij"))
    band = (frequency > 0.03) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[band]), np.log(power.mean(axis=0)[band]), 1)[0]
    assert slope == pytest.approx(-2 * exponent, abs=0.1)


def test_strands_are_smooth_along_and_rough_across_their_direction():
    """Per image, differences of neighbours in the smoother of two directions are far smaller somewhere."""
    ratios = []
    for seed in range(6):
        image = painter((1, 128, 128), seed).strands()[0]
        down = image.diff(dim=0)[:, :-1].square().unfold(0, 16, 16).unfold(1, 16, 16).mean(dim=(-2, -1))
        across = image.diff(dim=1)[:-1].square().unfold(0, 16, 16).unfold(1, 16, 16).mean(dim=(-2, -1))
        ratios.append(float((torch.maximum(down, across) / torch.minimum(down, across)).max()))
    assert np.median(ratios) > 3


def test_cells_have_one_owner_and_few_colours():
    texture = painter((3, 64, 64), 3)
    texture.grain = lambda most: torch.zeros(3, 64, 64)
    # Few cells, with thin lines between them.
    texture.uniform = lambda low=0.0, high=1.0: high if (low, high) == (3, 20) else low
    cells = texture.cells()
    assert len(torch.unique(cells.flatten(1), dim=1).T) > 6  # lines blend
    assert cells.flatten(1).std(dim=1).max() > 0
    _, counts = torch.unique((cells * 50).round().flatten(1), dim=1, return_counts=True)
    assert counts.sort(descending=True).values[:6].sum() > 0.5 * 64 * 64


def test_views_and_blur_keep_a_plain_texture_as_it_is():
    texture = painter()
    plain = torch.full((3, 64, 64), 0.25)
    assert torch.allclose(texture.seen_from_elsewhere(plain), plain, atol=1e-6)
    assert torch.allclose(texture.distorted(plain), plain, atol=1e-6)
    assert torch.allclose(texture.blurred(plain, 4.0), plain, atol=1e-6)


def test_blur_takes_away_high_frequencies_and_leaves_the_mean():
    texture = painter()
    rough = texture.randn(3, 64, 64)
    smooth = texture.blurred(rough, 8.0)
    assert smooth.diff(dim=-1).std() < 0.2 * rough.diff(dim=-1).std()
    assert smooth.mean() == pytest.approx(float(rough.mean()), abs=0.05)


def test_colours_of_a_palette_lie_between_its_ends():
    texture = painter()
    values = torch.linspace(-3, 3, 64).expand(64, 64)
    image = texture.coloured(values)
    assert torch.equal(image[:, :, 0], image[:, :1, 0].expand(3, 64))
    # Far beyond -1 and 1 nothing changes any more.
    assert torch.equal(image[:, 0, 0], image[:, 0, 1]) and torch.equal(image[:, 0, -1], image[:, 0, -2])
