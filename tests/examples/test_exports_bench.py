"""The bench of exports on a finished run of the shipped model: float64 leaves no difference."""

import json
from pathlib import Path

import pytest

from maskaq_brevitas import cli

BENCH = Path(__file__).parents[2] / "examples" / "benchmarks" / "exports.py"


@pytest.mark.heavy
def test_files_and_pytorch_are_one_function(bench, tmp_path, capsys):
    budget = "--images 4 --batch-size 4 --steps 2 --eval-limit 4 --no-export --no-baselines --quiet".split()
    budget += ["--synthesis.align_weight", "0"]  # no provisional calibration
    assert cli.main(["quantize", "digits_vit", "--scheme", "w4a4", *budget, "--out", str(tmp_path / "run")]) == 0
    bench.main([str(tmp_path / "run"), "--limit", "6", "--exact", "2", "--out", str(tmp_path / "new" / "rows.json")])
    rows = {row["name"]: row for row in json.loads((tmp_path / "new" / "rows.json").read_text())}
    printed = capsys.readouterr().out
    assert len(rows) == 9 and all(name in printed for name in rows)
    assert rows["PyTorch, summed in another order"]["largest_difference"] > 0
    assert rows["float64: PyTorch, summed in another order"]["largest_difference"] == 0
    for name in ("float64: QONNX file", "float64: QCDQ file"):
        assert rows[name]["equal_top1"] == 100 and rows[name]["images"] == 2
        assert rows[name]["largest_difference"] < 1e-6
