"""The report's figures against independent computations on small models."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from maskaq_brevitas.calibrator import DataFreeCalibrator
from maskaq_brevitas.errors import MissingExtraError
from maskaq_brevitas.models.zoo import load_model
from maskaq_brevitas.quant.attention import OPERANDS
from maskaq_brevitas.report import AccuracyRow
from maskaq_brevitas.report import make_report
from maskaq_brevitas.report import multiply_accumulates
from maskaq_brevitas.report import sqnr
from maskaq_brevitas.report.pictures import overlay

# digits_vit: 32 x 32 pixels, patches of 4, a class token, 6 blocks of width 96.
TOKENS, DIM, HIDDEN, DEPTH = 65, 96, 288, 6
MATMUL = TOKENS * TOKENS * DIM  # all heads together
BLOCK_MACS = {
    "attn.qkv": TOKENS * DIM * 3 * DIM,
    "attn.query": MATMUL,
    "attn.key": 0,
    "attn.value": 0,
    "attn.probabilities": MATMUL,
    "attn.proj": TOKENS * DIM * DIM,
    "mlp.fc1": TOKENS * DIM * HIDDEN,
    "mlp.fc2": TOKENS * HIDDEN * DIM,
}
PATCH_MACS = 64 * (3 * 4 * 4) * DIM
HEAD_MACS = DIM * 10


@pytest.fixture(scope="module")
def calibrator():
    """A calibrated w4a6 run on eight nearly unoptimised images."""
    calibrator = DataFreeCalibrator(
        load_model("digits_vit"), scheme="w4a6", num_images=4, held_back=4, batch_size=4, steps=1, progress=False
    )
    calibrator.calibrate()
    return calibrator


@pytest.fixture(scope="module")
def report(calibrator):
    return calibrator.report()


def _place(report, name):
    return next(place for place in report.places if place.name == name)


def test_macs_by_hand(digits_vit):
    macs = multiply_accumulates(digits_vit)
    for block in range(DEPTH):
        for name, count in BLOCK_MACS.items():
            assert macs.get(f"blocks.{block}.{name}", 0) == count
    assert macs["patch_embed.proj"] == PATCH_MACS
    assert macs["head"] == HEAD_MACS
    assert macs[""] == PATCH_MACS + HEAD_MACS + DEPTH * sum(BLOCK_MACS.values())


def test_bops_by_hand(report):
    linear = sum(count for name, count in BLOCK_MACS.items() if "query" not in name and "prob" not in name)
    # q k^T runs at 6 x 6 bits, probabilities @ v at 8 x 6.
    block = linear * 4 * 6 + MATMUL * 6 * 6 + MATMUL * 8 * 6
    assert report.cost.bops == DEPTH * block + (PATCH_MACS + HEAD_MACS) * 8 * 8
    assert report.cost.bops_float32 == report.cost.macs * 32 * 32
    assert report.cost.macs_quantized == report.cost.macs


def test_bytes_by_hand(report, digits_vit):
    weights = {"4": DEPTH * (3 * DIM * DIM + DIM * DIM + 2 * DIM * HIDDEN), "8": 3 * 4 * 4 * DIM + 10 * DIM}
    channels = DEPTH * (3 * DIM + DIM + HIDDEN + DIM) + DIM + 10
    quantizers = DEPTH * (DIM + 1 + DIM + HIDDEN + len(OPERANDS)) + 2  # qkv, proj, fc1, fc2: scales of their inputs
    parameters = sum(parameter.numel() for parameter in digits_vit.parameters())
    rest = parameters - sum(weights.values())
    channel_affines = DEPTH * 2 * HIDDEN
    assert all(place.activation.zero_point == 0 for place in report.places)
    expected = weights["4"] // 2 + weights["8"] + 4 * (channels + quantizers + rest + channel_affines)
    assert report.cost.bytes_quantized == expected
    assert report.cost.bytes_float32 == 4 * parameters
    assert report.cost.parameters == parameters


def test_sqnr_formula():
    signal, error = np.array([3.0, -4.0]), np.array([0.3, 0.4])
    assert sqnr(float((signal**2).sum()), float((error**2).sum())) == pytest.approx(20.0)
    assert sqnr(1.0, 0.0) == math.inf
    assert sqnr(0.0, 1.0) == -math.inf


@pytest.mark.parametrize("name", ["blocks.1.attn.qkv", "patch_embed.proj", "head"])
def test_sqnr_of_weights_and_activations(calibrator, report, name):
    place = _place(report, name)
    layer = calibrator.quant_model.get_submodule(name)

    def decibels(x, scale, low, high):
        rounded = np.clip(np.round(x / scale), low, high) * scale
        return 10 * np.log10((x**2).sum() / ((rounded - x) ** 2).sum())

    seen = []
    handle = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach().double().numpy()))
    with torch.no_grad():
        calibrator.quant_model(calibrator.held_back.images())
    handle.remove()
    top = 2 ** (place.activation.bits - 1)
    scale = layer.input_quant.scale().detach().double().numpy()
    assert scale.size == (DIM if name == "blocks.1.attn.qkv" else 1)
    assert place.activation.scale == (pytest.approx(scale.min()), pytest.approx(scale.max()))
    assert place.activation.sqnr == pytest.approx(decibels(seen[0], scale, -top, top - 1), abs=0.01)

    weight = layer.weight.detach().double().numpy()
    scale = layer.quant_weight().scale.detach().double().numpy()
    top = 2 ** (place.weight.bits - 1) - 1
    low = -top - 1 if name == "blocks.1.attn.qkv" else -top  # 4 bits take all levels, the 8 of the others all but one
    assert place.weight.sqnr == pytest.approx(decibels(weight, scale, low, top), abs=0.01)
    assert place.weight.scale == (pytest.approx(scale.min()), pytest.approx(scale.max()))


def test_agreement_is_the_share_of_equal_top1(calibrator, report, digits_vit):
    with torch.no_grad():
        for name, pool in (("synthetic", calibrator.pool), ("held-back synthetic", calibrator.held_back)):
            ours, theirs = digits_vit(pool.images()).argmax(1), calibrator.quant_model(pool.images()).argmax(1)
            assert report.agreement[name] == (ours == theirs).double().mean()


def test_of_a_large_pool_a_part_is_compared(calibrator, digits_vit, monkeypatch):
    monkeypatch.setattr("maskaq_brevitas.report.report.AGREEMENT_IMAGES", 3)
    with torch.no_grad():
        found, wanted = (model(calibrator.pool.images()[:3]) for model in (calibrator.quant_model, digits_vit))
    agreement = make_report(calibrator).agreement["synthetic"]
    assert agreement == pytest.approx(float((found.argmax(1) == wanted.argmax(1)).double().mean()))
    assert agreement * 3 == pytest.approx(round(agreement * 3))


def test_the_model_is_left_as_it_was(calibrator):
    model = calibrator.quant_model
    model.blocks[0].train()
    training = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_report(calibrator)
    assert {name: module.training for name, module in model.named_modules()} == training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for module in [*model.modules(), *calibrator.float_model.modules()]:
        assert not module._forward_hooks and not module._forward_pre_hooks
    model.eval()


def test_names_what_is_special(calibrator, report):
    notes = "\n".join(report.details["notes"])
    assert "attention probabilities are kept at 8 bits, nominal activations are at 6" in notes
    assert "layers skipped: none" in notes
    assert report.details["configuration"]["scheme"]["name"] == "w4a6"
    assert [stage["stage"] for stage in report.details["stages"]] == ["synthesis", "calibration"]
    assert all(stage["peak_memory_mib"] > 0 for stage in report.details["stages"])


def test_save_writes_three_whole_files(calibrator, tmp_path):
    report = calibrator.report(rows=[AccuracyRow(name="float", top1=97.5, images=40)])
    report.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.png", "report.json", "report.md"]
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["accuracy"] == [{"name": "float", "top1": 97.5, "images": 40, "calibration_images": None}]
    assert len(content["places"]) == len(report.places) == 2 + DEPTH * 8
    assert "| float | - | 97.50 | 40 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "images.png").read_bytes().startswith(b"\x89PNG")
    assert "97.50" in str(report) and "blocks.0.attn.query" in str(report)


def test_without_matplotlib_the_figures_are_written_and_the_extra_is_named(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib.*pip install 'maskaq_brevitas\[viz\]'"):
        report.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_overlay_dims_what_is_not_informative():
    pixels = torch.full((1, 3, 4, 6), 200, dtype=torch.uint8)
    informative = torch.tensor([[True, False, False, False, False, True]])
    shown = overlay(pixels, informative, (2, 3))
    assert shown.shape == (1, 3, 4, 6)
    bright = torch.full((2, 2), 200 / 255)
    assert torch.allclose(shown[0, 0, :2, :2], bright) and torch.allclose(shown[0, 2, 2:, 4:], bright)
    assert torch.allclose(shown[0, 1, :2, 2:], torch.full((2, 4), 50 / 255))
