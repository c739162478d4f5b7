"""What the bytes of a run depend on, and what they do not."""

import pytest
import torch
from small_run import calibrator_of
from small_run import results
from small_run import run


@pytest.fixture
def pool(tmp_path):
    return calibrator_of(tmp_path / "plain").ensure_images()


@pytest.mark.parametrize(
    "changes",
    ({"batch_size": 3}, {"num_workers": 2}, {"shuffle": True}, {"num_workers": 2, "shuffle": True, "batch_size": 5}),
    ids=str,
)
def test_images_do_not_depend_on_the_loader(changes, pool, tmp_path):
    calibrator = calibrator_of(tmp_path / "other", **changes)
    seen = torch.cat([images for images, _ in calibrator])
    assert torch.equal(calibrator.pool.pixels, pool.pixels) and torch.equal(calibrator.pool.labels, pool.labels)
    assert torch.equal(seen.flatten(1).sort(0).values, pool.images().flatten(1).sort(0).values)
    if changes.get("shuffle"):
        again = torch.cat([images for images, _ in calibrator_of(tmp_path / "again", **changes)])
        assert torch.equal(again, seen) and not torch.equal(seen, pool.images())


def test_the_callers_random_state_changes_nothing(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.rand(seed)
        run(tmp_path / str(seed), export=False)
    assert results(tmp_path / "1", export=False) == results(tmp_path / "2", export=False)


def test_the_number_of_threads_changes_rounding_only(pool, tmp_path):
    """Sums are cut at other places: last bits move, and a pixel may round the other way. No run resumes across it."""
    torch.set_num_threads(2)
    try:
        other = calibrator_of(tmp_path / "two").ensure_images()
    finally:
        torch.set_num_threads(1)
    difference = (other.pixels.int() - pool.pixels.int()).abs()
    assert float((difference > 2).float().mean()) < 0.01 and torch.equal(other.labels, pool.labels)
