"""FINN's front end on the exports. What needs FINN+ runs where MASKAQ_FINN_VENV names an environment with it."""

import os
import sys

import numpy as np
import pytest
import torch

from integration.finn.__main__ import main
from integration.finn.__main__ import verdict_of
from integration.finn.__main__ import verdict_of_lint
from integration.finn.environment import VARIABLE
from integration.finn.environment import environment_python
from integration.finn.environment import run_frontend
from integration.finn.frontend import _InStep
from integration.finn.frontend import samples
from integration.finn.reference import write_reference
from integration.finn.variants import VARIANTS
from integration.finn.variants import small_quant_vit
from integration.finn.variants import write_variant
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.export import lint_finn
from maskaq_brevitas.export.finn_form import finn_form

needs_finn = pytest.mark.skipif(
    not os.environ.get(VARIABLE),
    reason=f"{VARIABLE} names no environment with finn-plus (see integration/finn/README.md)",
)
#: Verdicts that take FINN seconds each, one per way to fail.
CHOSEN = ("profile", "encoder", "zero-point", "fork-scale", "erf")


def images(count):
    return torch.randn((count, 3, 16, 16), generator=torch.Generator().manual_seed(5))


@needs_finn
@pytest.mark.heavy
def test_finn_maps_what_the_lint_says_and_computes_what_pytorch_computes(tmp_path):
    python = environment_python(None, None)
    requests, lints = {}, {}
    for name in CHOSEN:
        write_variant(VARIANTS[name], tmp_path / f"{name}.onnx")
        lints[name] = lint_finn(tmp_path / f"{name}.onnx")
        requests[name] = {
            "model": str(tmp_path / f"{name}.onnx"), "output": str(tmp_path / name),
            "part": "xcvc1902-vsva2197-2MP-e-S",
            "target_fps": 1000, "clock_ns": 5.0,
        }  # fmt: skip
    for name in ("profile", "encoder"):
        requests[name]["sample"] = str(tmp_path / f"{name}.npz")
        write_reference(small_quant_vit(), images(2), tmp_path / f"{name}.npz", VARIANTS[name].cut)
    results = run_frontend(python, requests)
    assert {name: verdict_of(result) for name, result in results.items()} == {
        "profile": "lands", "encoder": "lands", "zero-point": "refused", "fork-scale": "leaves 3 MatMul",
        "erf": "leaves 1 Erf",
    }  # fmt: skip
    assert all(verdict_of(results[name]) == verdict_of_lint(lints[name]) for name in CHOSEN)
    for name in ("profile", "encoder"):
        assert results[name]["failed"] is None and results[name]["estimates"]["resources"]["LUT"] > 0
        for found in results[name]["execution"]:
            assert found["in_step"] < 1e-4 and found["strange"] == [] and found["flips"] < 1e-3 * found["values"]
    assert results["profile"]["execution"][0]["quantizers"] == 11


def test_the_reference_holds_what_pytorch_computes(tmp_path):
    quant_model = small_quant_vit()
    write_reference(quant_model, images(2), tmp_path / "reference.npz")
    first, second = samples(str(tmp_path / "reference.npz"))
    with torch.no_grad():
        assert np.array_equal(second["output"], finn_form(quant_model)(images(2)[1:]).numpy())
    assert len(first["levels"]) == 11 and first["ranges"]["encoder.blocks.0.attn.query"] == (-8, 7)
    levels = first["levels"]["stem.proj.0"]  # the image's own quantizer
    scale = float(quant_model.patch_embed.proj.input_quant.scale())
    assert np.allclose(levels, images(1).numpy() / scale, atol=1e-6)


@pytest.fixture
def sample():
    """Two quantizers of different codes and sizes, one of them on an image."""
    draw = np.random.default_rng(0)
    return {
        "levels": {"image": draw.uniform(-9, 9, (1, 3, 4, 4)), "tokens": draw.uniform(-9, 9, (1, 6, 8))},
        "ranges": {"image": (-8, 7), "tokens": (-8, 7)},
    }


def codes(levels):
    return np.clip(np.round(levels), -8, 7)


def test_quantizers_are_found_in_any_layout_and_order(sample):
    step = _InStep(sample)
    last = np.moveaxis(codes(sample["levels"]["image"]), 1, -1)
    assert np.array_equal(step("a", codes(sample["levels"]["tokens"])), codes(sample["levels"]["tokens"]))
    assert np.array_equal(step("b", last), last)
    assert step.verdict() == {"quantizers": 2, "values": 96, "flips": 0, "farthest_flip": 0.0, "strange": []}


def test_a_flip_on_a_tie_is_put_right_and_counted(sample):
    sample["levels"]["tokens"][0, 0, 0] = 2.5004
    step = _InStep(sample)
    given = codes(sample["levels"]["tokens"])
    given[0, 0, 0] = 2
    assert step("a", given)[0, 0, 0] == 3
    step("b", codes(sample["levels"]["image"]))
    verdict = step.verdict()
    assert verdict["flips"] == 1 and verdict["farthest_flip"] == pytest.approx(4e-4) and verdict["strange"] == []


def test_what_is_no_flip_is_named(sample):
    step = _InStep(sample)
    given = codes(sample["levels"]["tokens"])
    given[0, 0, 0] += 2 if given[0, 0, 0] < 0 else -2
    step("a", given)
    wrong = np.zeros((1, 4, 4, 3))
    assert step("b", wrong) is wrong
    first, second, third = step.verdict()["strange"]
    assert first == "a: off by more than one step" and "b: equals no quantizer of PyTorch" in second
    assert third == "image: no node for it"


def test_without_an_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ConfigurationError, match=f"name one with --venv or {VARIABLE}"):
        environment_python(None, None)
    with pytest.raises(ConfigurationError, match="got: no bin/python there"):
        environment_python(tmp_path, None)
    here = tmp_path / "here" / "bin"
    here.mkdir(parents=True)
    (here / "python").symlink_to(sys.executable)
    with pytest.raises(ConfigurationError, match="No module named"):
        environment_python(tmp_path / "here", None)


def test_the_command_names_its_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "--variants" in printed and VARIABLE in printed
