"""Nothing but the figures at the end depends on labelled images."""

import ast
from pathlib import Path

import pytest
from PIL import Image

import maskaq_brevitas
from maskaq_brevitas import cli

PACKAGE = Path(maskaq_brevitas.__file__).parent
#: Whatever makes images, quantizes or tunes; commands and reports come after them.
BLIND = [
    *(
        path
        for folder in ("config", "models", "quant", "synthesis", "tuning")
        for path in sorted((PACKAGE / folder).glob("*.py"))
    ),
    *(PACKAGE / name for name in ("calibrator.py", "errors.py", "progress.py", "run_directory.py")),
]


def imported(path):
    """Full names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", BLIND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_synthesis_and_tuning_cannot_reach_labelled_images(path):
    readers = (
        "maskaq_brevitas.evaluation",
        "maskaq_brevitas.commands",
        "sklearn",
        "torchvision.datasets",
        "PIL",
        "timm.data.readers",
    )
    found = [name for name in imported(path) if name.startswith(readers)]
    assert found == []


def test_other_labelled_images_leave_every_byte_of_the_result(tmp_path):
    kept = []
    for run, (colour, label) in enumerate((("black", 1), ("white", 7))):
        photos, out = tmp_path / f"photos{run}", tmp_path / f"run{run}"
        photos.mkdir()
        Image.new("RGB", (32, 32), colour).save(photos / "a.png")
        (photos / "labels.csv").write_text(f"file,label\na.png,{label}\n")
        arguments = ["--scheme", "w4a4", "--effort", "default", "--images", "8", "--steps", "2", "--epochs", "2",
                     "--tuning.steps_per_epoch", "2", "--tuning.drawn_images", "4", "--batch-size", "4", "--quiet",
                     "--no-export", "--no-baselines", "--eval-data", str(photos), "--out", str(out)]  # fmt: skip
        assert cli.main(["quantize", "digits_vit", *arguments]) == 0
        kept.append({path.name: path.read_bytes() for path in out.glob("*.safetensors")})
    assert sorted(kept[0]) == ["held_back.safetensors", "images.safetensors", "quant_model.safetensors"]
    assert kept[0] == kept[1]
