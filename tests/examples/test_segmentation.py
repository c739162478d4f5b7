"""The segmentation example: its data, its measure, and a run with a tiny budget that learns, quantizes and prints its
table.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
SCRIPT = Path(__file__).parents[2] / "examples" / "segmentation.py"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import segmentation

        return segmentation
    finally:
        sys.path.remove(str(SCRIPT.parent))


def test_mosaics(example):
    train, test = (example.photographs(train=side) for side in (True, False))
    assert len(train) == len(test) == len(example.MATERIALS) == len(example.COLOURS)
    assert all(min(photo.shape) >= example.SIDE for photo in (*train, *test))
    assert not any(torch.equal(photo, other) for photo, other in zip(train, test, strict=True))
    images, labels = example.mosaics(24, train, torch.Generator().manual_seed(0))
    again, _ = example.mosaics(24, train, torch.Generator().manual_seed(0))
    assert images.shape == (24, 3, 64, 64) and labels.shape == (24, 64, 64) and torch.equal(images, again)
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1
    assert labels.unique().tolist() == list(range(len(train))) and max(len(each.unique()) for each in labels) > 1


def test_mean_iou_equals_numpy(example):
    generator = torch.Generator().manual_seed(0)
    found, labels = (torch.randint(len(example.MATERIALS), (3, 8, 8), generator=generator) for _ in range(2))
    a, b = found.numpy(), labels.numpy()
    values = [
        ((a == each) & (b == each)).sum() / ((a == each) | (b == each)).sum() for each in range(len(example.MATERIALS))
    ]
    assert example.mean_iou(found, labels) == pytest.approx(100 * np.mean(values))
    assert example.mean_iou(labels, labels) == 100


def test_a_material_nobody_sees_and_that_is_not_there_counts_for_nothing(example):
    assert example.mean_iou(torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 4, 4, dtype=torch.long)) == 100


@pytest.mark.heavy
def test_a_tiny_budget_learns_and_quantizes(tmp_path):
    command = [
        sys.executable, "-W", "ignore", str(SCRIPT), "--output", str(tmp_path), "--train-steps", "60",
        "--mosaics", "256", "--test-mosaics", "16", "--schemes", "w8a8", "--images", "8", "--steps", "3",
        "--tune-steps", "4",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "figures.json").read_text())["mIoU"]
    assert list(table) == [
        "Float model",
        "Gaussian noise",
        "Training images",
        "Synthetic images",
        "Synthetic images, tuned",
    ]
    assert table["Float model"]["w8a8"][0] > 12  # six materials: a constant answer gives 3, chance about 9
    assert table["Training images"]["w8a8"][0] == pytest.approx(table["Float model"]["w8a8"][0], abs=3)
    assert "| Synthetic images |" in done.stdout and (tmp_path / "w8a8.png").stat().st_size > 1000
