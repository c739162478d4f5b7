"""The speed bench on timm's smallest ViT: every row is there, and ratios are those of the seconds beside them."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "examples" / "benchmarks" / "speed.py"


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("speed_bench", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.heavy
def test_all_rows_are_measured_and_stored(speed, tmp_path, capsys):
    out = tmp_path / "new" / "speed.json"
    speed.main(f"--models test_vit --batch 2 --steps 2 --repetitions 1 --threads 1 --out {out}".split())
    report = json.loads(out.read_text())
    rows = report["levers"]["test_vit"]
    assert list(rows) == ["floor: two bare networks", *speed.LEVERS]
    floor = rows["floor: two bare networks"]
    assert floor["ratio"] == 1
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["seconds_per_step"] / floor["seconds_per_step"])
        assert row["images_per_second"] == pytest.approx(2 / row["seconds_per_step"])
    assert list(report["growth"]["test_vit"]) == ["batch 1", "batch 2", "batch 4", "384 pixels, batch 1", "depth 24, batch 1"]
    assert "all levers" in capsys.readouterr().out


def test_runs_take_turns_and_ratios_are_medians_within_a_repetition(speed, monkeypatch):
    order = []
    seconds = {"bare": iter([1.0, 2.0, 4.0]), "ours": iter([2.0, 6.0, 8.0])}

    def timed(run, steps, device):
        name = run(0)
        order.append(name)
        return next(seconds[name]), 5.0

    monkeypatch.setattr(speed, "timed", timed)
    table = speed.compare({name: lambda steps, name=name: name for name in seconds}, 3, 1, "cpu", 8)
    assert order == ["bare", "ours"] * 3
    assert table["ours"]["ratios"] == [2.0, 3.0, 2.0] and table["ours"]["ratio"] == 2.0
    assert table["ours"]["seconds_per_step"] == 6.0 and table["ours"]["images_per_second"] == pytest.approx(8 / 6)
    assert table["ours"]["peak_mb"] == 5.0


def test_peak_memory_sees_what_a_run_takes(speed):
    if speed._reset_peak("cpu") is None:
        pytest.skip("no /proc")
    import torch

    _, peak = speed.timed(lambda steps: torch.ones(64_000_000).sum(), 1, "cpu")
    assert 200 < peak < 400  # 256 MB
