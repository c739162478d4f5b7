import pytest
import torch

from maskaq_brevitas.synthesis.procedural import dead_leaves_images
from maskaq_brevitas.synthesis.scenes import scene_images, shaded_images


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", ((2, 3, 32, 48), (1, 1, 7, 5), (3, 4, 16, 16), (2, 3, 3, 3)))
@pytest.mark.parametrize("make", (shaded_images, scene_images))
def test_images_are_seeded_shares_of_any_shape(make, shape):
    images = make(shape, generator())
    assert images.shape == shape and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1
    assert torch.equal(images, make(shape, generator()))
    assert not torch.equal(images, make(shape, generator(1)))


def test_some_shaded_scenes_are_smooth_as_no_dead_leaves_are():
    def roughness(images):
        """Median grey difference of neighbouring pixels, per image."""
        return images.mean(dim=1).diff(dim=-1).abs().flatten(1).median(dim=1).values

    shape = (64, 3, 128, 128)
    shaded, leaves = roughness(shaded_images(shape, generator())), roughness(dead_leaves_images(shape, generator()))
    assert shaded.quantile(0.25) < 0.5 * leaves.quantile(0.25)
    assert shaded.quantile(0.9) > 0.5 * leaves.quantile(0.9)


def test_half_of_the_scenes_are_dead_leaves():
    drawn = torch.Generator().manual_seed(5)
    probe = torch.Generator().manual_seed(5)
    coins = [float(torch.rand((), generator=probe)) < 0.5 for _ in range(40)]
    images = scene_images((40, 3, 8, 8), drawn)
    probe = torch.Generator().manual_seed(5)
    for _ in range(40):
        torch.rand((), generator=probe)
    for image, is_shaded in zip(images, coins, strict=True):
        expected = (shaded_images if is_shaded else dead_leaves_images)((1, 3, 8, 8), probe)[0]
        assert torch.equal(image, expected)
    assert 10 < sum(coins) < 30
