"""Arithmetic that fits the hardware."""

import warnings

import pytest
import torch

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas import modes
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import SlowArithmeticWarning
from maskaq_brevitas.tuning.stages import with_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    (({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({"avx512_f": True}, "float32")),
)
def test_auto_is_bfloat16_where_the_processor_multiplies_in_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert modes.fitting_precision("auto", CPU) == expected
    assert with_precision(DistillConfig(precision="auto"), CPU).precision == expected
    assert with_precision(SynthesisConfig(precision="auto"), CPU).precision == expected
    assert modes.arithmetic("auto", CPU)._enabled == (expected == "bfloat16")
    assert with_precision(ReconstructConfig(), CPU) == ReconstructConfig()
    for named in ("float32", "bfloat16"):
        assert modes.fitting_precision(named, CPU) == named


@pytest.mark.parametrize("supported", (True, False))
def test_older_releases_of_torch_are_asked_in_their_way(monkeypatch, supported):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert modes.fitting_precision("auto", CPU) == ("bfloat16" if supported else "float32")


@pytest.mark.parametrize("fast", (True, False))
def test_bfloat16_by_name_on_hardware_that_emulates_it_is_warned_of(monkeypatch, tiny_vit, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast}, raising=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        DataFreeCalibrator(
            tiny_vit, synthesis=SynthesisConfig(precision="bfloat16"), tuning=DistillConfig(precision="auto"),
            progress=False,
        )  # fmt: skip
    messages = [str(warning.message) for warning in found if warning.category is SlowArithmeticWarning]
    assert len(messages) == (0 if fast else 1)
    if messages:
        assert "synthesis.precision is bfloat16, which this cpu can only emulate" in messages[0]
        assert "precision='auto'" in messages[0]
