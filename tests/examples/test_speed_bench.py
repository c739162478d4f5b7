"""The speed bench on timm's smallest ViT: every row is there, and ratios are those of the seconds beside them."""

import json
from pathlib import Path

import pytest
import torch

from maskaq_brevitas.modes import multiplies_in_bfloat16

BENCH = Path(__file__).parents[2] / "examples" / "benchmarks" / "speed.py"


OPTIONS = "--models test_vit --batch 2 --steps 2 --repetitions 1 --threads 1".split()


def test_all_rows_are_measured_and_stored(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "_peak_elsewhere", lambda variant, batch, name, changes, device: 100.0 * batch)
    out = tmp_path / "new" / "speed.json"
    bench.main([*OPTIONS, "--out", str(out)])
    report = json.loads(out.read_text())
    rows = report["levers"]["test_vit"]
    emulated = set() if multiplies_in_bfloat16(torch.device("cpu")) else {"bfloat16", "and bfloat16"}
    assert list(rows) == ["floor: two bare networks", *(title for title in bench.LEVERS if title not in emulated)]
    floor = rows["floor: two bare networks"]
    assert floor["ratio"] == 1
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["seconds_per_step"] / floor["seconds_per_step"])
        assert row["images_per_second"] == pytest.approx(2 / row["seconds_per_step"])
    peaks = {title: row["peak_mb"] for title, row in report["growth"]["test_vit"].items()}
    assert peaks == {
        "batch 1": 100,
        "batch 2": 200,
        "batch 4": 400,
        "384 pixels, batch 1": 100,
        "depth 24, batch 1": 100,
    }
    assert "all levers" in capsys.readouterr().out


def test_bfloat16_is_left_out_where_it_is_emulated(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "_peak_elsewhere", lambda *work: 1.0)
    monkeypatch.setattr(bench, "multiplies_in_bfloat16", lambda device: False)
    bench.main([*OPTIONS, "--no-growth", "--out", str(tmp_path / "speed.json")])
    rows = json.loads((tmp_path / "speed.json").read_text())["levers"]["test_vit"]
    assert set(bench.LEVERS) - set(rows) == {"bfloat16", "and bfloat16"}
    assert "Without bfloat16, which cpu would emulate here" in capsys.readouterr().out


@pytest.mark.heavy
def test_memory_is_measured_in_another_process(bench):
    small, large = (bench._peak_elsewhere("dense step", batch, "test_vit", {}, "cpu") for batch in (1, 16))
    assert 0 < small < large


def test_runs_take_turns_and_ratios_are_medians_within_a_repetition(bench, monkeypatch):
    order = []
    seconds = {"bare": iter([1.0, 2.0, 4.0]), "ours": iter([2.0, 6.0, 8.0])}

    def timed(run, steps):
        name = run(0)
        order.append(name)
        return next(seconds[name])

    monkeypatch.setattr(bench, "timed", timed)
    table = bench.compare({name: lambda steps, name=name: name for name in seconds}, 3, 1, 8)
    assert order == ["bare", "ours"] * 3
    assert table["ours"]["ratios"] == [2.0, 3.0, 2.0] and table["ours"]["ratio"] == 2.0
    assert table["ours"]["seconds_per_step"] == 6.0 and table["ours"]["images_per_second"] == pytest.approx(8 / 6)


def test_what_a_batch_costs_once_is_no_part_of_a_step(bench):
    # 5 s before the first step has ended, 2 s for each further one, however long it takes to come back.
    assert bench.timed(lambda steps: [5.0 + 2.0 * step for step in range(steps)], 4) == 2.0


def test_peak_memory_sees_what_a_run_takes(bench):
    if bench._in_use("cpu") is None:
        pytest.skip("no /proc")
    torch.ones(600_000_000)  # a larger peak, before it
    peak = bench.peak_memory(lambda steps: torch.ones(256_000_000).sum(), "cpu")
    assert 900 < peak < 1300  # 1,024 MB


def test_a_failing_measurement_of_memory_is_not_silent(bench):
    with pytest.raises(RuntimeError, match="memory of 'no such variant' failed"):
        bench._peak_elsewhere("no such variant", 1, "test_vit", {}, "cpu")
