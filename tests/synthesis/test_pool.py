import pytest
import torch
from safetensors.torch import save_file

from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.files import save_tensors
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.synthesis.pool import SyntheticImages
from maskaq_brevitas.synthesis.pool import balanced_labels

GEOMETRY = Geometry((3, 8, 12), (2, 3), 1, True, 10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def filled(count=5, seed=0, geometry=GEOMETRY):
    pool = SyntheticImages(count, geometry)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, *geometry.input_size), generator=generator)
    pool.put(
        torch.arange(count), geometry.normalize(pixels / 255), torch.randint(0, 10, (count,), generator=generator),
        torch.rand(count, geometry.patches, generator=generator) < 0.5,
    )  # fmt: skip
    pool.version = 3
    return pool, pixels.to(torch.uint8)


@pytest.mark.parametrize(("count", "classes"), ((20, 10), (7, 10), (25, 10), (3, 1)))
def test_labels_are_balanced(count, classes):
    labels = balanced_labels(count, classes, torch.Generator().manual_seed(0))
    occurrences = [int((labels == label).sum()) for label in range(classes)]
    assert sum(occurrences) == count and max(occurrences) - min(occurrences) <= 1
    assert labels.dtype == torch.long
    assert torch.equal(labels, balanced_labels(count, classes, torch.Generator().manual_seed(0)))


def test_labels_are_in_random_order():
    labels = [balanced_labels(20, 10, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert not torch.equal(*labels)
    assert labels[0].tolist() != sorted(labels[0].tolist())


def test_a_model_without_classes_gets_zeros():
    assert torch.equal(balanced_labels(4, 0, torch.Generator()), torch.zeros(4, dtype=torch.long))


def test_pixels_survive_normalisation():
    pool, pixels = filled()
    assert torch.equal(pool.pixels, pixels)
    mean, std = torch.tensor(GEOMETRY.mean).view(3, 1, 1), torch.tensor(GEOMETRY.std).view(3, 1, 1)
    image, label = pool[2]
    torch.testing.assert_close(image, (pixels[2] / 255 - mean) / std)
    assert image.dtype == torch.float32 and isinstance(label, int) and label == int(pool.labels[2])
    assert torch.equal(pool.images()[2], image)


def test_values_outside_the_pixel_range_are_clamped_and_rounded():
    pool = SyntheticImages(1, GEOMETRY)
    shares = torch.tensor([-0.3, 1.4, 100.4 / 255, 100.6 / 255]).view(4, 1, 1, 1)
    for share, expected in zip(shares, (0, 255, 100, 101), strict=True):
        pool.put(
            torch.tensor([0]), GEOMETRY.normalize(share.expand(1, 3, 8, 12)), torch.tensor([1]), torch.ones(1, 6).bool()
        )
        assert (pool.pixels == expected).all()


def test_put_is_in_place_and_only_at_its_indices():
    pool, pixels = filled()
    storage = [getattr(pool, name).data_ptr() for name in ("pixels", "labels", "informative")]
    black = GEOMETRY.normalize(torch.zeros(2, 3, 8, 12))
    pool.put(torch.tensor([3, 1]), black, torch.tensor([7, 8]), torch.zeros(2, 6, dtype=torch.bool))
    assert storage == [getattr(pool, name).data_ptr() for name in ("pixels", "labels", "informative")]
    assert not pool.pixels[[1, 3]].any() and pool.labels[[3, 1]].tolist() == [7, 8]
    assert torch.equal(pool.pixels[[0, 2, 4]], pixels[[0, 2, 4]])


@pytest.mark.parametrize("count", (0, -1))
def test_no_images(count):
    with pytest.raises(InputError, match="at least one image"):
        SyntheticImages(count, GEOMETRY)


def test_images_that_were_not_made_are_not_served():
    with pytest.raises(RuntimeError, match="not been made"):
        SyntheticImages(2, GEOMETRY)[0]


def test_save_and_load(tmp_path):
    pool, _ = filled()
    pool.save(tmp_path / "pool.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["pool.safetensors"]
    other = SyntheticImages(5, GEOMETRY)
    storage = other.pixels.data_ptr()
    other.load(tmp_path / "pool.safetensors")
    assert other.pixels.data_ptr() == storage and other.version == 3
    for name in ("pixels", "labels", "informative"):
        assert torch.equal(getattr(other, name), getattr(pool, name))


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def without_labels(path):
    save_file({"pixels": torch.zeros(5, 3, 8, 12, dtype=torch.uint8)}, path, metadata={"version": "1"})


def without_version(path):
    pool, _ = filled()
    save_tensors(path, {name: getattr(pool, name) for name in ("pixels", "labels", "informative", "made_at")})


def with_a_foreign_label(path):
    pool, _ = filled()
    pool.labels[2] = 10
    pool.save(path)


@pytest.mark.parametrize(
    "damage", (cut, without_labels, without_version, with_a_foreign_label, lambda path: path.unlink())
)
def test_damaged_file(tmp_path, damage):
    pool, pixels = filled()
    path = tmp_path / "pool.safetensors"
    pool.save(path)
    damage(path)
    with pytest.raises(RunDirectoryError, match="pool.safetensors"):
        pool.load(path)
    assert torch.equal(pool.pixels, pixels) and pool.version == 3


@pytest.mark.parametrize(
    ("count", "geometry"),
    (
        (4, GEOMETRY),
        (5, Geometry((1, 8, 12), (2, 3), 1, True, 10, mean=(0.5,), std=(0.5,))),
        (5, Geometry((3, 8, 12), (4, 6), 1, True, 10, GEOMETRY.mean, GEOMETRY.std)),  # same pixels, other patches
    ),
)
def test_file_of_another_pool_changes_nothing(tmp_path, count, geometry):
    filled(count, seed=9, geometry=geometry)[0].save(tmp_path / "pool.safetensors")
    pool, pixels = filled()
    labels = pool.labels.clone()
    with pytest.raises(RunDirectoryError, match="saved for another model or number of images"):
        pool.load(tmp_path / "pool.safetensors")
    assert torch.equal(pool.pixels, pixels) and torch.equal(pool.labels, labels) and pool.version == 3
