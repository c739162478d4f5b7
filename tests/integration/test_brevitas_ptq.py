"""integration/brevitas_ptq: the command's table, and the drop-in claim: two lines of a Brevitas script."""

import difflib
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import brevitas.config
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from integration.brevitas_ptq.__main__ import main
from integration.brevitas_ptq.table import ALGORITHMS

ROOT = Path(__file__).parents[2]
DROP_IN = ROOT / "integration" / "brevitas_ptq" / "drop_in"
BUDGET = "--images 4 --steps 2 --threads 1 --eval-limit 100 --learned-round-iters 4".split()


def cells(path):
    return json.loads(path.read_text())["cells"]


def test_every_algorithm_on_synthetic_images(tmp_path, capsys):
    out = ["--kinds", "synthetic", "--out", str(tmp_path / "ptq.json")]
    main([*BUDGET, *out, "--models", "brevitas", "--algorithms", "calibrate", "gptq"])
    first = cells(tmp_path / "ptq.json")
    table = main([*BUDGET, *out, "--models", "ours"])
    found = cells(tmp_path / "ptq.json")
    assert {name: found[name] for name in first} == first  # it goes on where it was
    assert set(found) - set(first) == {f"{name}|synthetic|ours|w4a4" for name in ALGORITHMS}
    for name, cell in found.items():
        assert cell["top1"] > 80 and cell["layers"] == 26 and not cell["warnings"], name
        # Rounding changes where few iterations move a weight over the middle between two codes; the others, everywhere.
        low, high = {"calibrate": (0, 0), "learned-round": (5, 26)}.get(name.partition("|")[0], (26, 26))
        assert low <= cell["changed"] <= high, name
    assert len({cell["top1"] for cell in found.values()}) > 1
    lines = table.splitlines()
    assert lines[0] == "| w4a4 | Brevitas' layerwise model, synthetic | our quant_model, synthetic |"
    assert sum(line.startswith("| + apply_gptq | ") and "*" not in line for line in lines) == 1
    assert "(float: 99.0)" in table and "100 images to evaluate" in table and "--kinds synthetic" in table
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(SystemExit):
        main([*BUDGET, *out, "--seed", "1"])
    assert "table of another budget (differing: seed). Give another --out" in capsys.readouterr().err


def test_the_process_is_only_borrowed():
    import brevitas_examples.imagenet_classification.ptq.ptq_evaluate as script

    def surroundings():
        names = ("generate_dataloader", "get_torchvision_model", "get_model_config", "quantize_model")
        return (
            [getattr(script, name) for name in names], list(warnings.filters), brevitas.config.IGNORE_MISSING_KEYS,
            torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
        )  # fmt: skip

    before = surroundings()
    chosen = ["--models", "brevitas", "--algorithms", "calibrate", "whole-run"]
    table = main([*BUDGET, "--kinds", "noise", "real", *chosen])
    assert surroundings() == before
    assert table.startswith("| w4a4 | Brevitas' layerwise model, noise | Brevitas' layerwise model, real |")
    assert "| quantize_ptq_imagenet | " in table and "*" not in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--images", "0"], "--images, --steps, --threads: expected whole numbers >= 1"),
        (["--schemes", "w1a1"], "Unknown scheme 'w1a1'"),
        (["--schemes", "auto-4"], "Brevitas' algorithms do not choose widths"),
        (["--algorithms", "adaround"], "invalid choice: 'adaround'"),
    ),
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def users_files(tmp_path_factory):
    """A checkpoint of timm's smallest ViT (random weights), and folders of images (noise) in two classes."""
    folder = tmp_path_factory.mktemp("drop_in")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit").state_dict(), folder / "model.safetensors")
    source = np.random.default_rng(0)
    for part in ("calibration", "validation"):
        for label in ("a", "b"):
            (folder / part / label).mkdir(parents=True)
            for index in range(4):
                pixels = source.integers(0, 256, (160, 160, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{index}.png")
    return folder


def test_two_lines_make_a_brevitas_script_data_free():
    real, synthetic = (
        (DROP_IN / name).read_text().splitlines() for name in ("real_images.py", "synthetic_images.py")
    )
    difference = [line for line in difflib.ndiff(real, synthetic) if line[0] in "+-" and line[1:].strip()]
    assert [line[0] for line in difference] == ["+", "-", "+"]
    assert difference[0] == "+ from maskaq_brevitas import DataFreeCalibrator"
    assert difference[1].startswith("- calib_loader = DataLoader(") and difference[2].startswith(
        "+ calib_loader = DataFreeCalibrator(model, quant_model=quant_model, "
    )
    readme = (DROP_IN.parent / "README.md").read_text()
    assert all(line.strip() in readme for line in difference)


@pytest.mark.parametrize("script", ("real_images.py", "synthetic_images.py"))
def test_both_scripts_run(users_files, script):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = ["test_vit", str(users_files / "model.safetensors"), str(users_files)]
    command = [sys.executable, str(DROP_IN / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    name, value = done.stdout.strip().splitlines()[-1].split(": ")
    assert name == "top-1" and 0 <= float(value) <= 100

