"""Distiller: what it trains, what it leaves alone, and that its state goes on bit for bit."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from brevitas.core.scaling import ParameterFromRuntimeStatsScaling
from brevitas.nn import QuantIdentity
from brevitas.quant import Int8ActPerTensorFloat
from torch import nn

from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import CompilationWarning
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.errors import TuningError
from maskaq_brevitas.modes import own_modes
from maskaq_brevitas.quant.equalize import equalize
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning import distill
from maskaq_brevitas.tuning.calibrate import calibrate
from maskaq_brevitas.tuning.distill import Distiller
from maskaq_brevitas.tuning.losses import block_error
from maskaq_brevitas.tuning.losses import centred_error
from maskaq_brevitas.tuning.optimizer import parameter_groups
from maskaq_brevitas.tuning.ranges import search_ranges
from maskaq_brevitas.tuning.state import copied_state
from maskaq_brevitas.tuning.state import load_quant_state


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quant_model(tiny_vit: nn.Module, images: torch.Tensor) -> nn.Module:
    model, _ = swap_layers(tiny_vit, replace(resolve_scheme("w4a4"), weight_range="minmax", equalize=False))
    calibrate(model, [images])
    return model


def _distiller(tiny_vit: nn.Module, quant_model: nn.Module, total_steps: int = 12, factory=None, **config) -> Distiller:
    config = {"augment": "none", "learning_rate": 1e-3, "final_learning_rate": 1e-5, **config}
    return Distiller(
        quant_model, float_snapshot(tiny_vit), DistillConfig(**config), prefix=1, total_steps=total_steps,
        optimizer=factory,
    )  # fmt: skip


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(
    ("config", "factory"),
    [
        (dict(learning_rate=1e-4), None),
        (dict(optimizer="sgd", learning_rate=1e-2, scale_learning_rate=1e-5), None),
        (dict(learning_rate=1e-5, scale_learning_rate=1e-4), torch.optim.RMSprop),
    ],
    ids=["adamw", "sgd", "factory"],
)
def test_loss_falls(tiny_vit, quant_model, images, config, factory):
    distiller = _distiller(tiny_vit, quant_model, factory=factory, **config)
    before = distiller.validation_loss([images]).total
    for _ in range(6):
        distiller.train_epoch(images.split(4), _generator())
    assert distiller.validation_loss([images]).total < before


def test_total_is_divergence_plus_weighted_distance(tiny_vit, quant_model, images):
    losses = _distiller(tiny_vit, quant_model, distance_weight=3.0).validation_loss([images])
    assert losses.distance > 0
    assert losses.total == pytest.approx(losses.divergence + 3 * losses.distance, rel=1e-5)
    assert _distiller(tiny_vit, quant_model, distance_weight=0.0).validation_loss([images]).distance == 0


def test_validation_is_a_mean_over_images_and_changes_nothing(tiny_vit, quant_model, images):
    distiller = _distiller(tiny_vit, quant_model)
    state = {name: value.clone() for name, value in quant_model.state_dict().items()}
    whole = distiller.validation_loss([images]).total
    assert distiller.validation_loss([images[:2], images[2:]]).total == pytest.approx(whole, rel=1e-4)
    assert all(torch.equal(state[name], value) for name, value in quant_model.state_dict().items())
    with pytest.raises(InputError, match="at least one image"):
        distiller.validation_loss([])


def _scales(quant_model: nn.Module) -> list[torch.Tensor]:
    impls = [module for module in quant_model.modules() if isinstance(module, ParameterFromRuntimeStatsScaling)]
    return [impl.value.detach().clone() for impl in impls]


def test_scales_learn_at_their_own_rate_or_not_at_all(tiny_vit, quant_model, images):
    groups, pairs = parameter_groups(quant_model, DistillConfig(learning_rate=1e-3, scale_learning_rate=1e-2))
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 1e-2]
    assert len(groups[2]["params"]) == len(pairs) > 10
    assert all(not logarithm.any() and logarithm.shape == scale.shape for scale, logarithm in pairs)
    before = _scales(quant_model)
    _distiller(tiny_vit, quant_model, scale_learning_rate=0.0).train_epoch([images], _generator())
    assert all(torch.equal(old, new) for old, new in zip(before, _scales(quant_model), strict=True))
    _distiller(tiny_vit, quant_model, scale_learning_rate=1e-3).train_epoch([images], _generator())
    # Adam's first step is its rate: a thousandth of each scale, one per channel or per tensor, large or small.
    for old, new in zip(before, _scales(quant_model), strict=True):
        moved = (new / old).log().abs()
        assert ((moved - 1e-3).abs() < 2e-5).logical_or(moved < 1e-3).all() and moved.max() > 5e-4


def test_scales_stay_positive(tiny_vit, quant_model, images):
    before = _scales(quant_model)
    _distiller(tiny_vit, quant_model, scale_learning_rate=5.0).train_epoch([images, images], _generator())
    for old, new in zip(before, _scales(quant_model), strict=True):
        assert ((new / old).log().abs() <= 0.41).all() and (new > 0).all()  # two steps of at most 0.2


def test_block_outputs_are_matched(tiny_vit, quant_model, images):
    distiller = _distiller(tiny_vit, quant_model, distance_weight=0.0, feature_weight=2.0, learning_rate=1e-4)
    found = distiller.validation_loss([images])
    with torch.no_grad():
        x, q = (model.norm_pre(model._pos_embed(model.patch_embed(images))) for model in (tiny_vit, quant_model))
        errors = []
        for float_block, quant_block in zip(tiny_vit.blocks, quant_model.blocks, strict=True):
            x, q = float_block(x), quant_block(q)
            errors.append(float(block_error(q, x)))
    assert found.features == pytest.approx(sum(errors) / 2, rel=1e-4)
    assert found.total == pytest.approx(found.divergence + 2 * found.features, rel=1e-5)
    for _ in range(6):
        distiller.train_epoch(images.split(4), _generator())
    assert distiller.validation_loss([images]).features < found.features


def test_a_quantizer_of_the_user_is_trained_through_brevitas(tiny_vit, quant_model, images):
    quant_model.blocks[0].attn.query = QuantIdentity(
        act_quant=Int8ActPerTensorFloat.let(scaling_impl_type="const", scaling_init=1.0), return_quant_tensor=False
    ).eval()
    with pytest.warns(CompilationWarning, match="Brevitas' own code is tuned, .* expected a scale that is one"):
        distiller = _distiller(tiny_vit, quant_model, learning_rate=1e-4)
    assert distiller.network is quant_model
    before = distiller.validation_loss([images]).total
    for _ in range(6):
        distiller.train_epoch(images.split(4), _generator())
    assert distiller.validation_loss([images]).total < before


def test_biases_follow_the_weights(tiny_vit, images):
    """A step of the weights leaves the mean output of a layer where it was."""
    model, _ = swap_layers(tiny_vit, replace(resolve_scheme("w4a4"), weight_range="minmax"))
    equalize(model, [images])
    calibrate(model, [images])
    search_ranges(model, [images], biases=True)
    layer = model.blocks[1].mlp.fc2
    assert layer.input_mean.abs().max() > 0.01

    def mean_output() -> torch.Tensor:
        return (layer.bias + layer.quant_weight().value @ layer.input_mean).detach()

    before, weight = mean_output(), layer.quant_weight().value.detach().clone()
    factory = lambda groups: torch.optim.SGD([group for group in groups if group["params"][0].ndim > 1])  # noqa: E731
    distiller = _distiller(tiny_vit, model, factory=factory, learning_rate=0.5, distance_weight=0.0)
    distiller.train_epoch([images], _generator())
    assert not torch.equal(layer.quant_weight().value, weight)
    torch.testing.assert_close(mean_output(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("steps", "worth"), [(100, False), (10**9, True)])
def test_compiling_is_left_to_long_tunings(tiny_vit, quant_model, steps, worth, monkeypatch):
    compiled = []
    monkeypatch.setattr(distill, "compile_blocks", compiled.append)
    _distiller(tiny_vit, quant_model, total_steps=steps, distance_weight=0.0)
    assert len(compiled) == 2 * worth
    _distiller(tiny_vit, quant_model, total_steps=steps, distance_weight=1.0, compile="always")
    assert len(compiled) == 2 * worth  # the context has to be tapped


def test_rate_falls_along_a_cosine(tiny_vit, quant_model, images):
    distiller = _distiller(tiny_vit, quant_model, total_steps=3)
    rates = []
    distiller.train_epoch(
        images[:6].split(2), _generator(), on_step=lambda _: rates.append(distiller.optimizer.param_groups[0]["lr"])
    )
    assert rates == pytest.approx([1e-3, (1e-3 + 1e-5) / 2, 1e-5])


def test_foreign_state_is_put_back(tiny_vit, quant_model, images):
    quant_model.train()
    next(quant_model.parameters()).requires_grad_(False)
    modes = [module.training for module in quant_model.modules()]
    flags = [parameter.requires_grad for parameter in quant_model.parameters()]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    distiller = _distiller(tiny_vit, quant_model, augment="published")
    distiller.train_epoch([images], _generator())

    def broken():
        yield images
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distiller.train_epoch(broken(), _generator())
    assert modes == [module.training for module in quant_model.modules()]
    assert flags == [parameter.requires_grad for parameter in quant_model.parameters()]
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in quant_model.modules())


def test_steps_that_are_not_finite_are_skipped_and_counted(tiny_vit, quant_model, images):
    broken = images.clone()
    broken[0] = float("nan")
    distiller = _distiller(tiny_vit, quant_model)
    losses = distiller.train_epoch([images, broken], _generator())
    assert losses.skipped == 1
    assert all(torch.isfinite(parameter).all() for parameter in quant_model.parameters())
    with pytest.raises(TuningError, match="None of the 1 steps.*Lower learning_rate"):
        distiller.train_epoch([broken], _generator())


def test_an_uncalibrated_scale_is_refused(quant_model):
    impl = next(module for module in quant_model.modules() if isinstance(module, ParameterFromRuntimeStatsScaling))
    impl.value.data.fill_(-1.0)
    with pytest.raises(TuningError, match="not positive and finite. Calibrate"):
        parameter_groups(quant_model, DistillConfig())


def test_a_tuning_without_steps_is_refused(tiny_vit, quant_model):
    with pytest.raises(InputError, match="total_steps: expected a whole number >= 1, got 0"):
        _distiller(tiny_vit, quant_model, total_steps=0)


@pytest.mark.parametrize(("optimizer", "momentum"), [("adamw", 0.9), ("sgd", 0.9), ("sgd", 0.0)])
def test_state_goes_on_bit_for_bit(tiny_vit, quant_model, images, optimizer, momentum):
    config = dict(augment="light", optimizer=optimizer, momentum=momentum, scale_learning_rate=1e-4)
    distiller = _distiller_with(tiny_vit, quant_model, config)
    distiller.train_epoch(images.split(4), _generator())
    state = {name: value.clone() for name, value in quant_model.state_dict().items()}
    tensors, plain = distiller.state()
    tensors = {name: value.clone() for name, value in tensors.items()}
    distiller.train_epoch(images.split(4), _generator())
    expected = {name: value.clone() for name, value in quant_model.state_dict().items()}

    quant_model.load_state_dict(state)
    again = _distiller_with(tiny_vit, quant_model, config)
    again.load_state(tensors, plain)
    again.train_epoch(images.split(4), _generator())
    assert all(torch.equal(expected[name], value) for name, value in quant_model.state_dict().items())


def _distiller_with(tiny_vit: nn.Module, quant_model: nn.Module, config: dict) -> Distiller:
    return Distiller(
        quant_model, float_snapshot(tiny_vit), DistillConfig(**config), prefix=1, total_steps=8
    )


def test_bfloat16_is_close_to_float32(tiny_vit, quant_model, images):
    exact = _distiller(tiny_vit, quant_model).validation_loss([images]).total
    rounded = _distiller(tiny_vit, quant_model, precision="bfloat16")
    assert rounded.validation_loss([images]).total == pytest.approx(exact, rel=0.3)
    assert rounded.train_epoch([images], _generator()).skipped == 0


def test_bfloat16_sees_what_was_learned_in_the_step_before(tiny_vit, quant_model, images):
    """Also inside of another autocast, which would keep its casts of parameters until it ends."""

    def losses(outside):
        found: list[float] = []
        distiller = _distiller(
            tiny_vit, copy.deepcopy(quant_model), precision="bfloat16", learning_rate=0.05, distance_weight=0.0,
            compile="never",
        )  # fmt: skip
        with outside:
            distiller.train_epoch(images.split(2), _generator(), on_step=found.append)
        return found

    assert losses(own_modes()) == losses(nullcontext())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(epochs=0), "epochs: expected a whole number >= 1"),
        (dict(refresh_every=0), "refresh_every: expected a whole number"),
        (dict(refresh_share=0.0), "refresh_share: expected a share"),
        (dict(temperature=0.0), "temperature: expected a positive number"),
        (dict(learning_rate=1e-6, final_learning_rate=1e-5), "final_learning_rate: expected at most"),
        (dict(momentum=1.0), "momentum: expected a number in"),
        (dict(max_gradient_norm=0.0), "max_gradient_norm: expected a positive number or None"),
        (dict(distance_weight=-1.0), "distance_weight: expected a number >= 0"),
        (dict(optimizer="lion"), "optimizer: expected one of adamw, sgd"),
    ],
)
def test_configuration_is_checked(values, message):
    with pytest.raises(ConfigurationError, match=message):
        DistillConfig(**values)


def test_published_values():
    config = DistillConfig.published()
    assert (config.optimizer, config.momentum) == ("sgd", 0.9)
    assert (config.learning_rate, config.final_learning_rate) == (1e-3, 1e-5)
    assert (config.epochs, config.refresh_every, config.refresh_start, config.batch_size) == (100, 30, "noise", 16)
    assert (config.temperature, config.distance_weight, config.max_gradient_norm) == (5.0, 10.0, None)


def test_last_features_are_matched(tiny_vit, quant_model, images):
    options = dict(distance_weight=0.0, last_feature_weight=3.0, learning_rate=1e-4)
    distiller = _distiller(tiny_vit, quant_model, **options)
    found = distiller.validation_loss([images])
    with torch.no_grad():
        target, output = (
            model.forward_head(model.forward_features(images), pre_logits=True) for model in (tiny_vit, quant_model)
        )
    assert found.last_features == pytest.approx(float(centred_error(output, target)), rel=1e-4)
    assert found.features == 0 and found.total == pytest.approx(found.divergence + 3 * found.last_features, rel=1e-5)
    for _ in range(6):
        distiller.train_epoch(images.split(4), _generator())
    assert distiller.validation_loss([images]).last_features < found.last_features


def test_models_that_name_no_last_features_are_refused(tiny_vit, quant_model):
    del tiny_vit.norm
    with pytest.raises(ModelError, match="does not name what follows its blocks.*last_feature_weight=0"):
        _distiller(tiny_vit, quant_model, last_feature_weight=1.0)


def test_networks_are_trained_and_measured_on_the_same_share_of_tokens(tiny_vit, quant_model, images):
    distiller = _distiller(tiny_vit, quant_model, distance_weight=0.0, feature_weight=1.0, kept_tokens=0.5)
    seen = {"float": [], "quant": []}
    for name, model in (("float", distiller.teacher), ("quant", distiller.network)):
        model.blocks[0].register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].detach()))
    distiller.train_epoch(images.split(4), _generator())
    # Float and quant embeddings differ by rounding, tokens by far more.
    for ours, theirs in zip(seen["float"], seen["quant"], strict=True):
        assert ours.shape == theirs.shape == (4, 1 + 8, 64)
        assert torch.cdist(ours, theirs).argmin(dim=-1).eq(torch.arange(9)).float().mean() > 0.9
    assert not torch.equal(seen["float"][0], seen["float"][1])
    first = distiller.validation_loss([images])
    assert seen["quant"][-1].shape == (8, 1 + 8, 64)
    assert distiller.validation_loss([images]) == first  # the same tokens again
    assert type(quant_model.patch_drop) is nn.Identity and type(distiller.teacher.patch_drop) is nn.Identity


def test_the_share_of_tokens_left_unrounded_falls_to_none(tiny_vit, quant_model, images):
    first, random = copied_state(quant_model), torch.get_rng_state()

    def tuned(drop: float) -> tuple[list[float | None], dict[str, torch.Tensor]]:
        load_quant_state(quant_model, first)
        distiller = _distiller(tiny_vit, quant_model, total_steps=8, learning_rate=1e-4, drop=drop)
        query, shares = distiller.network.blocks[0].attn.query, []
        query.register_forward_pre_hook(
            lambda *_: shares.append(None if query.dropped is None else float(query.dropped))
        )
        for _ in range(4):
            distiller.train_epoch(images.split(4), _generator())
        distiller.validation_loss([images])
        return shares, copied_state(quant_model)

    (shares, one), (_, two), (none, without) = tuned(0.6), tuned(0.6), tuned(0.0)
    assert shares[:8] == pytest.approx([0.6] * 5 + [0.3, 0, 0])
    assert shares[8] is None and none == [None] * 9
    # The same tokens in both, and nobody else's random numbers.
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert any(not torch.equal(value, without[name]) for name, value in one.items())
    assert torch.equal(random, torch.get_rng_state())


def test_quantized_weights_learn_in_units_of_their_grid(tiny_vit, quant_model, images):
    config = DistillConfig(
        learning_rate=1e-5, final_learning_rate=1e-7, weight_learning_rate=0.01, scale_learning_rate=0.0
    )
    groups, _ = parameter_groups(quant_model, config)
    layer = quant_model.blocks[0].mlp.fc1
    step = float(layer.weight_quant.scale().mean())
    (group,) = [group for group in groups if any(parameter is layer.weight for parameter in group["params"])]
    assert group["lr"] == group["first_lr"] == pytest.approx(0.01 * step)
    counted = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in counted}) == len(counted)
    before = layer.weight.detach().clone()
    distiller = _distiller(
        tiny_vit, quant_model, learning_rate=1e-5, final_learning_rate=1e-7, weight_learning_rate=0.01,
        scale_learning_rate=0.0, max_gradient_norm=None,
    )  # fmt: skip
    distiller.train_epoch([images], _generator())
    # Adam's first step is its rate.
    assert float((layer.weight - before).abs().median()) == pytest.approx(0.01 * step, rel=1e-2)


def test_scales_move_by_the_gradient_of_their_logarithm(tiny_vit, quant_model, images):
    """One step of plain gradient descent, against the same by hand."""
    seen = []
    distiller = _distiller(tiny_vit, quant_model, factory=torch.optim.SGD, learning_rate=1e-9, final_learning_rate=1e-9,
                           scale_learning_rate=1e-3, max_gradient_norm=None)  # fmt: skip
    before = [scale.detach().clone() for scale, _ in distiller.scales]
    step = distiller.optimizer.step

    def noted(*arguments, **named):
        seen.append([(scale.grad.clone(), logarithm.grad.clone()) for scale, logarithm in distiller.scales])
        return step(*arguments, **named)

    distiller.optimizer.step = noted
    distiller.train_epoch([images], _generator())
    rate = distiller.optimizer.param_groups[-1]["lr"]
    for (scale, logarithm), old, (of_scale, of_logarithm) in zip(distiller.scales, before, seen[0], strict=True):
        assert torch.allclose(of_logarithm, of_scale * old)
        assert torch.allclose(scale, old * (-rate * of_logarithm).clamp(-0.2, 0.2).exp())
        assert not logarithm.any()
