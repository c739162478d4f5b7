"""The accuracy bench: both tables on the smallest budget, and that a finished cell is not measured again."""

import json
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from maskaq_brevitas import cli

BENCH = Path(__file__).parents[2] / "examples" / "benchmarks" / "accuracy.py"
BUDGET = (
    "--images 2 --held-back 2 --steps 2 --epochs 2 --refresh-every 1 --refresh-steps 1 --eval-limit 20 --seeds 0 "
    "--schemes w4a4 --threads 1 --quiet"
).split()


@pytest.fixture
def run(bench, capsys) -> Iterator[Callable[..., tuple[dict, str]]]:
    threads = torch.get_num_threads()

    def main(out: Path, *more: str) -> tuple[dict, str]:
        capsys.readouterr()
        bench.main(["--out", str(out), *BUDGET, *more])
        return json.loads((out / "accuracy.json").read_text())["cells"], capsys.readouterr().out

    yield main
    torch.set_num_threads(threads)


@pytest.mark.heavy
def test_the_table_goes_on_where_it_was(run, tmp_path):
    first, _ = run(tmp_path, "--rows", "float", "noise", "class-pixel")
    cells, text = run(tmp_path, "--rows", "float", "noise", "class-pixel", "real", "maskaq+refresh")
    assert {name: cells[name] for name in first} == first
    assert set(cells) - set(first) == {"real|w4a4|0", "maskaq+refresh|w4a4|0"}
    assert cells["float|w4a4|0"]["top1"] > 90
    assert len(cells["maskaq+refresh|w4a4|0"]["alignment"]) == 1
    assert "| MaskAQ + distillation with refresh |" in text
    assert "--rows float noise class-pixel real maskaq+refresh" in text


@pytest.mark.heavy
def test_a_finished_run_is_evaluated_on_the_same_images(run, tmp_path):
    budget = "--images 4 --batch-size 4 --steps 2 --seed 3 --eval-limit 4 --no-export --no-baselines --quiet".split()
    budget += ["--synthesis.align_weight", "0"]  # no provisional calibration
    finished = tmp_path / "run"
    assert cli.main(["quantize", "digits_vit", "--scheme", "w8a8", *budget, "--out", str(finished)]) == 0
    cells, text = run(tmp_path / "table", "--rows", "float", "--runs", str(finished))
    cell = cells[f"{finished}|w8a8|3"]
    assert cell["top1"] >= 90 and cell["seconds"] > 0
    row = next(line for line in text.splitlines() if f"Finished run {finished}" in line)
    assert f"{cell['top1']:.1f}" in row and "w8a8" in text


@pytest.mark.heavy
def test_the_ablation(run, tmp_path):
    cells, text = run(tmp_path, "--ablation", "--rows", "whole", "no-mask")
    assert set(cells) == {"whole|w4a4|0", "no-mask|w4a4|0"}
    assert all({"top1", "calibrated_top1"} <= set(cell) for cell in cells.values())
    assert "w4a4 calibrated | w4a4 tuned" in text
