"""Mixed precision: the greedy choice, its budget, and a run that uses it."""

import itertools

import pytest
import torch

from maskaq_brevitas.calibrator import DataFreeCalibrator
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.quant.cost import multiply_accumulates
from maskaq_brevitas.tuning.allocate import allocate_widths
from maskaq_brevitas.tuning.allocate import bit_operations
from maskaq_brevitas.tuning.allocate import candidate_widths
from maskaq_brevitas.tuning.allocate import choose_widths


def test_choice_is_near_the_best_of_all_and_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    widths = (3, 4, 6, 8)
    for _ in range(20):
        names = "abcde"
        size = {name: float(torch.rand((), generator=generator)) + 0.1 for name in names}
        harm = {name: float(torch.rand((), generator=generator)) for name in names}
        costs = {name: {width: size[name] * width**2 for width in widths} for name in names}
        losses = {name: {width: harm[name] * 4.0**-width for width in widths} for name in names}
        budget = sum(size[name] * 4.5**2 for name in names)
        found = choose_widths(losses, costs, budget)
        total = sum(losses[name][found[name]] for name in names)
        assert sum(costs[name][found[name]] for name in names) <= budget
        allowed = [
            sum(losses[name][width] for name, width in zip(names, choice, strict=True))
            for choice in itertools.product(widths, repeat=5)
            if sum(costs[name][width] for name, width in zip(names, choice, strict=True)) <= budget
        ]
        uniform = sum(losses[name][4] for name in names)
        assert total <= uniform
        assert total <= 1.6 * min(allowed)


def test_a_wider_layer_that_loses_more_is_not_chosen():
    losses = {"a": {4: 0.1, 8: 0.2}, "b": {4: 0.1, 8: 0.01}}
    costs = {name: {4: 16.0, 8: 64.0} for name in losses}
    assert choose_widths(losses, costs, 1000.0) == {"a": 4, "b": 8}
    with pytest.raises(ConfigurationError, match="at least 32 .all at 4 bits., got 10"):
        choose_widths(losses, costs, 10.0)


def test_bit_operations_and_candidates():
    macs = {"fc": 10, "attn.query": 6, "attn.probabilities": 6, "attn": 12}
    assert bit_operations("fc", macs, 4.5, 8) == 10 * 4.5**2
    assert bit_operations("attn", macs, 4, 8) == 6 * 16 + 6 * 32
    assert bit_operations("attn", macs, 4, None) == 12 * 16
    assert candidate_widths(4.5) == [3, 4, 5, 6, 8]
    assert candidate_widths(2.0) == [2, 3, 4, 8]
    assert candidate_widths(8.0) == [7, 8]


def test_a_scheme_without_an_average_is_refused(tiny_vit):
    with pytest.raises(ConfigurationError, match="Expected a scheme with average_bits, for example auto-4.5"):
        allocate_widths(tiny_vit, tiny_vit, resolve_scheme("w4a4"), {}, [], lambda scheme: tiny_vit)


@pytest.mark.parametrize("text", ("auto-1.5", "auto-9", "auto-x", "auto-4.5.1", "auto"))
def test_bad_averages(text):
    with pytest.raises(ConfigurationError, match="auto-B"):
        resolve_scheme(text)


def make(model, **changes):
    synthesis = SynthesisConfig(steps=2, warmup_steps=1, batch_size=4)
    options = dict(scheme="auto-4.5", num_images=4, held_back=2, batch_size=4, progress=False, synthesis=synthesis)
    return DataFreeCalibrator(model, **{**options, **changes})


def test_a_run_respects_the_budget_and_can_be_loaded(tiny_vit, tmp_path):
    calibrator = make(tiny_vit, run_dir=tmp_path / "run", overrides={"blocks.0.mlp.fc2": "w8a8"})
    held = calibrator.quant_model
    calibrator.quantize()
    calibrator.save()
    assert calibrator.quant_model is held
    names = {
        name.rpartition(".")[0] if name.endswith(("query", "key", "value")) else name for name in calibrator.allocated
    }
    layers = {f"blocks.{b}.{n}" for b in (0, 1) for n in ("attn", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert names == layers - {"blocks.0.mlp.fc2"}
    places = {place.name: place for place in calibrator.report().places}
    macs = multiply_accumulates(tiny_vit)
    budget = spent = 0.0
    for name in names:
        place = places[f"{name}.query" if name.endswith("attn") else name]
        budget += bit_operations(name, macs, 4.5, 8)
        spent += bit_operations(name, macs, place.activation.bits, 8)
        if place.weight is not None:
            assert place.weight.bits == place.activation.bits
    assert spent <= budget
    assert places["blocks.0.mlp.fc2"].weight.bits == places["head"].weight.bits == 8
    assert places["blocks.0.attn.probabilities"].activation.bits == 8
    assert "bit widths chosen by sensitivity" in calibrator.report().to_markdown()

    loaded = make(tiny_vit, overrides={"blocks.0.mlp.fc2": "w8a8"})
    loaded.load(tmp_path / "run")
    images = calibrator.pool.images()
    with torch.no_grad():
        assert torch.equal(loaded.quant_model(images), calibrator.quant_model(images))
    resumed = make(tiny_vit, run_dir=tmp_path / "run", run_mode="resume", overrides={"blocks.0.mlp.fc2": "w8a8"})
    resumed.calibrate()
    assert resumed.allocated == calibrator.allocated
    assert "choice of bit widths" not in [stage["stage"] for stage in resumed.stages]
