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
    """When the work begins: a finished run is read without a word."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast}, raising=False)

    def interrupt(*work):
        raise KeyboardInterrupt

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        calibrator = DataFreeCalibrator(
            tiny_vit, num_images=2, synthesis=SynthesisConfig(precision="bfloat16", align_weight=0.0),
            tuning=DistillConfig(precision="bfloat16"), progress=False,
        )  # fmt: skip
        assert not [warning for warning in found if warning.category is SlowArithmeticWarning]
        monkeypatch.setattr(calibrator.maker, "fill", interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrator.quantize()
    messages = [str(warning.message) for warning in found if warning.category is SlowArithmeticWarning]
    assert [message.split()[0] for message in messages] == ([] if fast else ["tuning.precision", "synthesis.precision"])
    assert all("which this cpu can only emulate" in text and "precision='auto'" in text for text in messages)
