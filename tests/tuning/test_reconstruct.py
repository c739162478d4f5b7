"""Block-by-block reconstruction: the error, what is trained, learned rounding, variants, and the stage with its resume.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from maskaq_brevitas.calibrator import DataFreeCalibrator
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.families import features_behind
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.calibrate import calibrate
from maskaq_brevitas.tuning.losses import block_error
from maskaq_brevitas.tuning.reconstruct import BlockData
from maskaq_brevitas.tuning.reconstruct import block_inputs
from maskaq_brevitas.tuning.reconstruct import reconstruct_block
from maskaq_brevitas.tuning.reconstruct import through
from maskaq_brevitas.tuning.reconstruct import trainable_parts
from maskaq_brevitas.tuning.reconstruct_stage import varied


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)


@pytest.fixture
def quant_model(tiny_vit, images):
    model, _ = swap_layers(tiny_vit, "w3a3")
    calibrate(model, [images])
    return model.requires_grad_(False)


def in_memory(shape, like):
    return torch.empty(shape, dtype=like.dtype)


def block_data(quant_model, tiny_vit, images) -> BlockData:
    plain = float_snapshot(tiny_vit)
    float_inputs = block_inputs(plain, images, 3, in_memory)
    return BlockData(
        float_inputs, block_inputs(quant_model, images, 3, in_memory), through(plain.blocks[0], float_inputs, 3)
    )


def run(quant_model, tiny_vit, images, *, held_back=None, features=None, **options):
    options = {"steps": 12, "batch_size": 4, **options}
    data = block_data(quant_model, tiny_vit, images)
    return reconstruct_block(
        quant_model.blocks[0], data, held_back, ReconstructConfig(**options),
        generator=torch.Generator().manual_seed(0), features=features,
    )  # fmt: skip


def test_block_error_equals_numpy():
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(2, 5, 3, generator=generator) for _ in range(2))
    target[0, 0] *= 30  # a token that a plain squared error would follow alone
    weights = torch.rand(2, 5, generator=generator)
    error = (output - target).numpy().reshape(10, 3) ** 2
    power = (target.numpy().reshape(10, 3) ** 2).sum(axis=1)
    median = np.sort(power)[4]  # torch takes the lower of the two middle values
    importance = 1 / (10 * np.maximum(power, median) ** 0.75 * median**0.25)
    tokens = weights.numpy().reshape(10) / weights.mean().item()
    assert block_error(output, target).item() == pytest.approx((error.sum(axis=1) * importance).sum(), rel=1e-5)
    expected = (error.sum(axis=1) * importance * tokens).sum()
    assert block_error(output, target, weights).item() == pytest.approx(expected, rel=1e-5)


def test_inputs_and_targets_are_what_the_models_compute(tiny_vit, images):
    plain = float_snapshot(tiny_vit)
    data = block_data(plain, tiny_vit, images)
    whole = plain.blocks[0](data.float_inputs)
    for size in (3, 8):
        assert torch.allclose(through(plain.blocks[0], data.float_inputs, size), whole, atol=1e-6)
    assert torch.equal(data.float_inputs, data.quant_inputs)
    features = features_behind(plain, "blocks.0")(whole)
    expected = plain.forward_head(plain.forward_features(images), pre_logits=True)
    assert torch.allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize("options", ({}, {"rounding": "learned"}, {"feature_weight": 1.0}, {"drop": 0.0}))
def test_a_block_comes_closer_to_the_float_block(quant_model, tiny_vit, images, options):
    features = features_behind(float_snapshot(tiny_vit), "blocks.0")
    figures = run(
        quant_model,
        tiny_vit,
        images,
        features=features,
        steps=40,
        learning_rate=1e-3,
        scale_learning_rate=1e-3,
        **options,
    )
    assert figures.kept
    assert figures.after < 0.95 * figures.before


def test_learned_rounding_goes_up_or_down_and_nowhere_else(quant_model, tiny_vit, images):
    layer = quant_model.blocks[0].attn.qkv
    before, scale = layer.weight.detach().clone(), layer.quant_weight().scale.detach().clone()
    keys = list(quant_model.state_dict())
    figures = run(
        quant_model, tiny_vit, images, steps=40, rounding="learned", scale_learning_rate=0.0, learning_rate=0.0
    )
    assert figures.kept
    assert keys == list(quant_model.state_dict())
    assert torch.allclose(layer.quant_weight().scale, scale)
    steps, now = before / scale, layer.weight / scale
    assert torch.allclose(now, now.round(), atol=1e-3)  # the rounding is in the weights
    inside = (steps > -3.9) & (steps < 2.9)  # 3 bits: -4 .. 3; others are clipped
    moved = (now.round() - steps)[inside]
    assert moved.abs().max() < 1 + 1e-3
    assert (now.round() != steps.round())[inside].any()


def test_a_block_that_gets_worse_is_put_back(quant_model, tiny_vit, images):
    before = {name: value.clone() for name, value in quant_model.state_dict().items()}
    figures = run(quant_model, tiny_vit, images, steps=3, learning_rate=10.0, scale_learning_rate=0.0, drop=0.0)
    assert not figures.kept
    assert figures.after == figures.before
    assert all(torch.equal(before[name], value) for name, value in quant_model.state_dict().items())


def test_the_held_back_images_choose(quant_model, tiny_vit, images):
    data = block_data(quant_model, tiny_vit, images)
    # Held-back targets that no training can come closer to: the block as it is gives them exactly.
    held = BlockData(data.float_inputs, data.quant_inputs, through(quant_model.blocks[0], data.quant_inputs, 3))
    figures = run(quant_model, tiny_vit, images, held_back=held, steps=20, learning_rate=1e-3)
    assert figures.train_after < figures.train_before
    assert not figures.kept


def test_same_seed_same_bytes_and_nothing_stays_borrowed(tiny_vit, images):
    results = []
    for _ in range(2):
        model, _ = swap_layers(tiny_vit, "w3a3")
        calibrate(model, [images])
        model.requires_grad_(False)
        state = torch.get_rng_state()
        run(model, tiny_vit, images)
        assert torch.equal(state, torch.get_rng_state())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize("rounding", ("straight-through", "learned"))
def test_an_error_inside_a_block_leaves_no_hook_and_no_rounding(quant_model, tiny_vit, images, rounding):
    data = block_data(quant_model, tiny_vit, images)
    types = [type(module) for module in quant_model.modules()]

    def fail(*_):
        raise RuntimeError("inside")

    handle = quant_model.blocks[0].mlp.register_forward_pre_hook(fail)
    held = BlockData(*(torch.zeros(0, 1, 1) for _ in range(3)))
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        reconstruct_block(
            quant_model.blocks[0], data, held, ReconstructConfig(steps=2, rounding=rounding),
            generator=torch.Generator(),
        )  # fmt: skip
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in quant_model.modules())
    assert types == [type(module) for module in quant_model.modules()]


def test_trainable_parts_are_all_of_a_block_that_is_quantized(quant_model):
    layers, scales = trainable_parts(quant_model.blocks[0])
    assert len(layers) == 12  # weight and bias of qkv, proj, fc1, fc2, norm1, norm2
    assert len(scales) == 4 + 8  # weights; four layer inputs, four operands


def test_varied_images_are_others_with_the_same_values(images):
    state = torch.get_rng_state()
    found = varied(images, 3, torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())
    assert found.shape == (24, 3, 32, 32)
    assert torch.equal(found[:8], images)
    assert found.min() >= images.min() - 1e-4
    assert found.max() <= images.max() + 1e-4
    assert torch.equal(found, varied(images, 3, torch.Generator().manual_seed(1)))
    for index in range(8):
        assert not torch.equal(found[8 + index], images[index])


def test_bad_input_is_refused(quant_model, images):
    with pytest.raises(InputError, match="at least one image"):
        block_inputs(quant_model, images[:0], 4, in_memory)
    for name, value in dict(
        drop=1.0, steps=0, rounding="up", feature_weight=-1, informative_weight=0, variants=0
    ).items():
        with pytest.raises(ConfigurationError, match=name):
            ReconstructConfig(**{name: value})
    del quant_model.norm
    with pytest.raises(ModelError, match="feature_weight=0"):
        features_behind(quant_model, "blocks.0")


# -- the stage --------------------------------------------------------------------------------------------------

TUNING = ReconstructConfig(steps=3, batch_size=4, variants=2)


def make_calibrator(model, **changes) -> DataFreeCalibrator:
    options = dict(
        scheme="w4a4", num_images=6, held_back=2, batch_size=4, progress=False,
        synthesis=SynthesisConfig(steps=2, warmup_steps=1, batch_size=4),
    )  # fmt: skip
    return DataFreeCalibrator(model, **{**options, **changes})


def test_a_reconstruction_killed_after_any_block_ends_with_the_same_bytes(tiny_vit, tmp_path, monkeypatch):
    from maskaq_brevitas.tuning import reconstruct_stage as module

    tunings = (TUNING, DistillConfig(epochs=1, refresh_every=None, batch_size=4))
    whole = make_calibrator(tiny_vit, run_dir=tmp_path / "whole", tuning=tunings)
    copies = []
    real = module.save_checkpoint

    def keep(run, *args):
        real(run, *args)
        copies.append(tmp_path / f"copy-{len(copies)}")
        shutil.copytree(run.path, copies[-1])

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", keep)
        whole.quantize()
    expected = (tmp_path / "whole" / "quant_model.safetensors").read_bytes()
    assert len(copies) == 3  # before the first block and behind each
    for copy in copies:
        resumed = make_calibrator(tiny_vit, run_dir=copy, run_mode="resume", tuning=tunings)
        resumed.quantize()
        assert (copy / "quant_model.safetensors").read_bytes() == expected
        events = [entry["event"] for entry in resumed.history]
        assert events == ["block", "block", "distillation starts", "epoch"]


def test_the_cache_may_lie_on_disk(tiny_vit):
    results = []
    for limit in (4096, 0):
        calibrator = make_calibrator(tiny_vit)
        calibrator.quantize(ReconstructConfig(steps=2, batch_size=4, cache_mib=limit, informative_weight=4.0))
        results.append(calibrator.quant_model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_the_report_names_the_blocks(tiny_vit):
    calibrator = make_calibrator(tiny_vit)
    calibrator.quantize(TUNING)
    report = calibrator.report()
    assert "| blocks.1 |" in report.to_markdown()
    entries = json.loads(report.to_json())["history"]
    assert [entry["block"] for entry in entries] == ["blocks.0", "blocks.1"]
    assert all(entry["after"] <= entry["before"] for entry in entries)
