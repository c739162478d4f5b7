import pytest
import torch

from maskaq_brevitas.synthesis.procedural import dead_leaves_images
from maskaq_brevitas.synthesis.scenes import scene_images


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", ((2, 3, 32, 48), (1, 1, 7, 5), (3, 4, 16, 16), (2, 3, 3, 3)))
def test_images_are_seeded_shares_of_any_shape(shape):
    images = scene_images(shape, generator())
    assert images.shape == shape and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1
    assert torch.equal(images, scene_images(shape, generator()))
    assert not torch.equal(images, scene_images(shape, generator(1)))


def test_scenes_reach_from_smooth_to_rough_as_dead_leaves_do_not():
    def roughness(images):
        """Median grey difference of neighbouring pixels, per image."""
        return images.mean(dim=1).diff(dim=-1).abs().flatten(1).median(dim=1).values

    shape = (64, 3, 128, 128)
    scenes, leaves = roughness(scene_images(shape, generator())), roughness(dead_leaves_images(shape, generator()))
    assert scenes.quantile(0.25) < 0.5 * leaves.quantile(0.25)
    assert scenes.quantile(0.9) / scenes.quantile(0.1) > 1.5 * leaves.quantile(0.9) / leaves.quantile(0.1)


def test_contrast_is_that_of_photographs():
    deviations = scene_images((64, 3, 64, 64), generator()).flatten(1).std(dim=1)
    assert 0.1 < deviations.median() < 0.3
    assert deviations.max() < 0.5


def test_number_of_threads_changes_nothing():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(scene_images((5, 3, 48, 40), generator()))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
