"""The table of ``maskaq models``: every row of it is made here again."""

import dataclasses

import pytest

from maskaq_brevitas import support
from maskaq_brevitas.cli import main
from maskaq_brevitas.models.families import known_families
from maskaq_brevitas.support import Support
from maskaq_brevitas.support import check_support
from maskaq_brevitas.support import recorded_support

CASES = [(family, example) for family in known_families(optional=True) for example in family.examples]


@pytest.mark.parametrize(("family", "example"), CASES, ids=[example for _, example in CASES])
def test_the_recorded_row_is_what_is_measured(family, example):
    check = check_support(family, example)
    (recorded,) = [row for row in recorded_support() if row.example == example]
    assert check.row == recorded, "run: python -m maskaq_brevitas.support"
    assert check.off_difference <= 1e-5
    assert check.quantized_share >= 0.99
    assert check.row.qonnx == check.row.onnxruntime == "passed"


def test_there_is_a_row_for_each_example():
    assert [(row.family, row.example) for row in recorded_support()] == [(f.name, example) for f, example in CASES]


def test_the_command_prints_the_table(capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert all(row.example in printed and row.swapped in printed for row in recorded_support())
    assert "refused" in printed and "XCiT: its attention runs over channels" in printed
    assert main(["models", "swin v2"]) == 0
    printed = capsys.readouterr().out
    assert "swinv2_tiny_window8_256" in printed and "deit" not in printed and "refused" not in printed
    assert main(["models", "resnet"]) == 2
    assert "Expected a text that is part of a family's name" in capsys.readouterr().err


def test_the_command_can_measure(capsys, monkeypatch):
    row = recorded_support()[0]
    measured = Support(**{**dataclasses.asdict(row), "swapped": "measured now"})
    asked = []

    def check(family, example):
        asked.append((family.name, example))
        return support.SupportCheck(row=measured, off_difference=0.0, quantized_share=1.0)

    monkeypatch.setattr("maskaq_brevitas.commands.listings.check_support", check)
    assert main(["models", row.example, "--check"]) == 0
    assert asked == [(row.family, row.example)] and "measured now" in capsys.readouterr().out
