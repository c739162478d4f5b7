"""The training script of the shipped checkpoint: a few epochs of it learn, and writes files that load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from maskaq_brevitas.models.zoo import load_model

SCRIPT = Path(__file__).parents[2] / "examples" / "train_digits_vit.py"


@pytest.mark.heavy
def test_eight_epochs_learn_and_the_files_load(tmp_path):
    command = [sys.executable, str(SCRIPT), "--epochs", "8", "--threads", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = sorted(path.suffix for path in tmp_path.iterdir())
    assert files == [".json", ".safetensors"]
    weights = next(tmp_path.glob("*.safetensors"))
    load_model("digits_vit", checkpoint=weights)
    figures = json.loads(next(tmp_path.glob("*.json")).read_text())
    accuracy = [value for key, value in _leaves(figures) if "top1" in key]
    assert accuracy and min(accuracy) > 15  # ten classes: chance is 10, its deviation on 599 images 1.2


def _leaves(content, name=""):
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _leaves(value, key)
    else:
        yield name, content
