"""The bench of what levers cost: rows, budget, and an objective that is the dense one whatever made the images."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.config import SynthesisConfig

BENCH = Path(__file__).parents[2] / "examples" / "benchmarks" / "levers.py"


@pytest.mark.heavy
def test_rows_are_made_once_and_another_budget_is_refused(bench, monkeypatch, tmp_path, capsys):
    options = "--images 4 --steps 2 --seeds 0 --schemes w8a8 w2a2 --eval-limit 40".split()
    options += ["--levers", "dense step", "and half of the patches", "--out", str(tmp_path / "bench")]
    bench.main(options)
    text = capsys.readouterr().out
    assert [title for title in bench.LEVERS if f"\n{title}  " in text] == ["dense step", "and half of the patches"]
    cells = json.loads((tmp_path / "bench" / "levers.json").read_text())["cells"]
    for cell in cells.values():
        assert cell["seconds"] > 0 and cell["top1"]["w8a8"] > cell["top1"]["w2a2"]
    monkeypatch.setattr(bench, "measure", lambda *work: pytest.fail("made again"))
    bench.main(options)
    assert capsys.readouterr().out == text
    with pytest.raises(SystemExit, match="found another one"):
        bench.main([*options, "--steps", "3"])


def test_rows_without_bfloat16_where_it_is_emulated(bench, monkeypatch, tmp_path, capsys):
    cell = {"seconds": 1.0, "objective": 2.0, "top1": {"w4a8": 3.0, "w4a4": 4.0}}
    monkeypatch.setattr(bench, "measure", lambda *work: cell)
    for fast in (False, True):
        monkeypatch.setattr(bench, "multiplies_in_bfloat16", lambda device, fast=fast: fast)
        bench.main(["--seeds", "0", "1", "--out", str(tmp_path / str(fast))])
        text = capsys.readouterr().out
        assert ("bfloat16" in text) is ("all of them" in text) is fast
        assert "2.00 ± 0.00" in text


def test_objective_is_that_of_the_dense_step(bench, tiny_vit):
    config = SynthesisConfig(steps=3, procedural_share=0.5)
    found = []
    for changes in ({}, {"kept_tokens": 0.5, "precision": "auto"}):
        calibrator = DataFreeCalibrator(
            tiny_vit, num_images=4, held_back=2, synthesis=config, tuning=[], progress=False
        )  # fmt: skip
        calibrator.calibrate()
        calibrator.maker.config = replace(config, **changes)
        before = calibrator.pool.pixels.clone()
        found.append(bench.objective(calibrator))
        assert torch.equal(calibrator.pool.pixels, before)
    assert found[0] == found[1]
    calibrator.pool.pixels[:] = torch.randint(
        0, 256, before.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    assert bench.objective(calibrator) > found[0]  # white noise
