"""Random changes of images before a training step."""

import pytest
import torch

from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.tuning import augment as changes
from maskaq_brevitas.tuning.augment import augment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.randn(8, 3, 32, 32, generator=generator())


@pytest.mark.parametrize("kind", ["none", "light", "mixed", "strong", "published", "cutmix"])
def test_augmentation_is_seeded_and_keeps_the_shape(images, kind):
    first = augment(images, kind, generator())
    assert first.shape == images.shape
    assert torch.equal(first, augment(images, kind, generator()))
    assert torch.equal(first, images) == (kind == "none")


def test_cutmix_puts_a_box_of_one_image_into_another():
    plain = torch.stack([torch.full((3, 32, 32), float(value)) for value in (-0.5, 0.5)])
    published, mixed = (augment(plain, kind, generator()) for kind in ("published", "cutmix"))
    changed = (mixed != published).any(dim=1)
    assert changed.any() and torch.equal(changed[0], changed[1])
    assert torch.equal(mixed[0][:, changed[0]], published[1][:, changed[0]])


def test_mixed_augmentation_mirrors_half_and_puts_boxes_into_half():
    """Image i is i everywhere but for a ramp to the right, which tells mirror images; a box tells the image it is of.
    """
    count = 64
    ramp = torch.linspace(0, 0.5, 40).expand(3, 40, 40)
    images = torch.arange(count).view(-1, 1, 1, 1) + ramp
    found = augment(images, "mixed", generator())
    whole, ramps = found.floor(), found - found.floor()
    own = torch.arange(count).view(-1, 1, 1)
    assert torch.equal(found[:, 0], found[:, 1])
    mixed = (whole[:, 0] != own).flatten(1).any(1)
    assert 0.3 * count < mixed.sum() < 0.7 * count
    for index in mixed.nonzero().flatten().tolist():
        inside = whole[index, 0] != index
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        box = whole[index, 0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box == box[0, 0]).all()  # one rectangle of one other image
    mirrored = (ramps[~mixed][:, 0, :, -1] < ramps[~mixed][:, 0, :, 0]).all(1)
    assert 0.2 * len(mirrored) < mirrored.sum() < 0.8 * len(mirrored)


def test_light_augmentation_cuts_a_large_part_out_of_each_image():
    # The image is its own coordinates, so what is seen tells where it was cut.
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 60), indexing="ij")
    images = torch.stack([columns, rows])[None].expand(64, 2, 40, 60)
    found = augment(images, "light", generator())
    assert found.shape == images.shape
    assert float(found.abs().max()) <= 1 + 1e-5
    across = (found[:, 0, :, -1] - found[:, 0, :, 0]).mean(dim=1) / 2
    down = (found[:, 1, -1] - found[:, 1, 0]).mean(dim=1) / 2
    assert 0.66 < float((across * down).min()) < 0.75 and float((across * down).max()) > 0.95
    assert float((across / down).min()) > 0.87 and float((across / down).max()) < 1.14
    assert len({round(float(image.mean()), 3) for image in found[:, 0]}) > 32  # in different places


def test_strong_augmentation_takes_large_parts_turned_and_mirrored(monkeypatch):
    """Where each pixel of a part lies in the image, without the change of light and the blots."""
    monkeypatch.setattr(changes, "_other_light", lambda shares, _: shares)
    monkeypatch.setattr(changes, "_blended", lambda images, _: images)
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(80.0), indexing="ij")
    found = changes.augment(torch.stack([columns, rows]).expand(64, -1, -1, -1), "strong", generator())
    middle = found[:, :, 20:28, 36:44]
    across = (middle[..., :, 1:] - middle[..., :, :-1]).flatten(2).median(dim=2).values
    down = (middle[..., 1:, :] - middle[..., :-1, :]).flatten(2).median(dim=2).values
    area = across.norm(dim=1) * down.norm(dim=1)
    assert 0.29 < float(area.min()) < 0.4 and 0.85 < float(area.max()) <= 1 + 1e-4
    assert 15 < float(torch.rad2deg(torch.atan2(across[:, 1], across[:, 0].abs())).abs().max()) <= 20 + 1e-3
    assert 0.3 < float((across[:, 0] < 0).float().mean()) < 0.7


@pytest.mark.parametrize("channels", (1, 3, 5))
def test_strong_augmentation_changes_light_between_black_and_white(channels):
    shares = torch.rand(64, channels, 24, 24, generator=generator())
    found = changes._other_light(shares, generator())
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    brightness = found.mean(dim=(1, 2, 3)) / shares.mean(dim=(1, 2, 3))
    assert float(brightness.min()) < 0.8 and float(brightness.max()) > 1.2
    roughness = (found[..., 1:] - found[..., :-1]).abs().mean(dim=(1, 2, 3))
    assert 3 < int((roughness < 0.12).sum()) < 32  # white noise that was blurred


def test_strong_augmentation_shows_another_image_in_blots():
    """Image i is i everywhere; half of the images have blots, each of one other image."""
    count = 64
    images = torch.arange(count).view(-1, 1, 1, 1).expand(count, 3, 40, 40).float()
    found = changes._blended(images, generator())
    assert torch.equal(found[:, 0], found[:, 1])
    other = found[:, 0] != images[:, 0]
    share = other.flatten(1).float().mean(dim=1)
    mixed = share > 0
    assert 0.3 * count < int(mixed.sum()) < 0.7 * count
    assert float(share[mixed].min()) < 0.3 and float(share[mixed].max()) > 0.7
    assert all(len(set(found[i][:, other[i]].flatten().tolist())) == 1 for i in mixed.nonzero().flatten().tolist())


def test_strong_augmentation_keeps_normalised_images_between_black_and_white():
    model_geometry = Geometry((3, 32, 32), (4, 4), 1, True, 10, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    images = model_geometry.normalize(torch.rand(16, 3, 32, 32, generator=generator()))
    found = model_geometry.denormalize(augment(images, "strong", generator(), model_geometry))
    assert float(found.min()) > -1e-5 and float(found.max()) < 1 + 1e-5
    assert float((found - model_geometry.denormalize(images)).abs().mean()) > 0.1
