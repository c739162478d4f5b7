"""The optimisation loop: what it reaches, what it leaves alone, and how it deals with NaN."""

import dataclasses

import pytest
import torch
from borrowed import hooks
from timm.models.vision_transformer import VisionTransformer

from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import SynthesisError
from maskaq_brevitas.models.attention_tap import attention_tap
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.quant.snapshot import frozen_snapshot
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.synthesis import augment
from maskaq_brevitas.synthesis import iteration
from maskaq_brevitas.synthesis import masks
from maskaq_brevitas.synthesis.synthesizer import masked_alignment
from maskaq_brevitas.synthesis.synthesizer import synthesize
from maskaq_brevitas.synthesis.tokens import KeptTokens
from maskaq_brevitas.tuning.calibrate import calibrate

LABELS = torch.tensor([3, 0, 7])
SHORT = SynthesisConfig.published(steps=4, batch_size=3)


@pytest.fixture
def tiny_vit():
    """As the fixture of that name in conftest.py, and smaller still: width 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=10)
        for block in model.blocks:
            block.attn.qkv.weight.data.mul_(5)  # attention that prefers some patches
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return model.eval()


@pytest.fixture
def pair(tiny_vit):
    """Frozen float and quant snapshots, and the geometry."""
    quant_model, _ = swap_layers(tiny_vit, "w4a8")
    calibrate(quant_model, [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))])
    return float_snapshot(tiny_vit), frozen_snapshot(quant_model), read_geometry(tiny_vit)


def run(pair, config=SHORT, seed=0, **options):
    return synthesize(*pair, LABELS, config, generator=torch.Generator().manual_seed(seed), **options)


def state(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad is None for parameter in model.parameters()],
        [(name, type(module), module.training) for name, module in model.named_modules()],
        hooks(model),
    )


def same_state(one, other):
    return one[1:] == other[1:] and all(torch.equal(one[0][name], other[0][name]) for name in one[0])


@pytest.mark.parametrize("kept", (1.0, 0.5))
def test_images_made_in_views_are_recognised_whole_and_in_parts(digits_vit, kept):
    """What only fits at its place and size does not survive being cut out and turned."""
    geometry, snapshot = read_geometry(digits_vit), float_snapshot(digits_vit)
    labels = torch.arange(10).repeat(2)
    shares = []
    for area in (0.5, 1.0):
        config = SynthesisConfig(
            steps=30, learning_rate=0.1, view_area=area, kept_tokens=kept, jitter=0, late_jitter=0, align_weight=0
        )
        batch = synthesize(
            snapshot, None, geometry, labels, config, generator=torch.Generator().manual_seed(0)
        )
        assert batch.trace["class"][1] < 0.7 * batch.trace["class"][0]
        lines = augment.draw_crops(tuple(batch.images.shape), 0.5, 10, 0, torch.Generator().manual_seed(1))
        with torch.no_grad():
            seen = snapshot(augment.cut_out(batch.images, lines)).argmax(dim=1)
        shares.append(float((seen == labels).float().mean()))
    assert shares[0] > shares[1] + 0.1, shares


@pytest.mark.parametrize("parameterization", ("pixel", "spectrum"))
def test_trained_model_objective_falls_and_labels_are_seen(digits_vit, parameterization):
    geometry = read_geometry(digits_vit)
    config = SynthesisConfig(
        steps=30, batch_size=3, jitter=1, late_jitter=1, colour_shift=0.1, parameterization=parameterization
    )
    seen = []
    batch = synthesize(
        float_snapshot(digits_vit), None, geometry, LABELS, config, generator=torch.Generator().manual_seed(0),
        on_step=lambda step, objective: seen.append((step, objective)),
    )  # fmt: skip
    assert [step for step, _ in seen] == list(range(1, 31))
    for name in ("objective", "class"):
        first, last = batch.trace[name]
        assert last < 0.7 * first, name
    assert batch.trace["objective"] == (seen[0][1], seen[-1][1])
    assert "align" not in batch.trace and batch.redrawn == 0
    with torch.no_grad():
        assert torch.equal(digits_vit(batch.images).argmax(dim=1), LABELS)


@pytest.mark.parametrize("parameterization", ("pixel", "spectrum"))
def test_images_stay_in_the_pixel_range(pair, parameterization):
    config = dataclasses.replace(SHORT, learning_rate=5.0, final_learning_rate=5.0, parameterization=parameterization)
    batch = run(pair, config)
    assert batch.images.shape == (3, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.images.min() >= -1 and batch.images.max() <= 1  # mean and deviation of tiny_vit are 0.5
    assert (batch.images.abs() == 1).any() or parameterization == "spectrum"


def test_informative_patches_are_those_of_the_finished_images(pair):
    batch = run(pair)
    ours, _, geometry = pair
    with attention_tap(ours, SHORT.mask_attention.removeprefix("raw_")) as record, torch.no_grad():
        ours(batch.images)
    expected = masks.informative_mask(masks.received_attention(record.logits, 1, True).mean(dim=0), SHORT.mask_end)
    assert torch.equal(batch.informative, expected) and batch.informative.shape == (3, geometry.patches)


def test_same_seed_same_bytes(pair):
    one, two, other = run(pair), run(pair), run(pair, seed=1)
    assert torch.equal(one.images, two.images) and torch.equal(one.informative, two.informative)
    assert one.trace == two.trace
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize(
    "change",
    (
        {"align_weight": 0.0}, {"align_every": 3}, {"mask_per_layer": True},
        {"mask_enabled": False}, {"entropy_rows": 4}, {"head_rows": 4},
        {"kept_tokens": 0.5}, {"flip": True},
        {"head_attention": "probabilities"}, {"align_attention": "probabilities"}, {"init": "low_frequency"},
        {"init": "dead_leaves"},
        {"tv_norm": "l1"}, {"precision": "bfloat16"}, {"mask_drop": 0.0}, {"colour_shift": 0.0}, {"jitter": 0},
        {"parameterization": "spectrum"}, {"align_attention": "logits"}, {"mask_attention": "probabilities"},
        {"mask_start": 1.0}, {"entropy_attention": "logits"}, {"class_weight": 0.0}, {"head_weight": 0.0},
        {"entropy_weight": 0.0}, {"tv_weight": 0.0},
    ),
)  # fmt: skip
def test_every_option_changes_the_images(pair, change):
    base = dataclasses.replace(SHORT, steps=3, align_weight=10.0, tv_weight=1.0)  # large enough to move the pixels
    images = run(pair, dataclasses.replace(base, **change)).images
    assert torch.isfinite(images).all() and not torch.equal(images, run(pair, base).images)


@pytest.mark.parametrize("classes, asked", ((10, [0, 3, 6, 7]), (0, [0, 1, 2, 3, 4, 5, 6, 7])))
def test_quant_model_is_asked_in_every_nth_iteration_and_the_last(tiny_vit, classes, asked):
    """Without classes it is asked in each: the class loss is the distance of both networks' features then."""
    tiny_vit.reset_classifier(classes)
    ours, theirs, geometry = float_snapshot(tiny_vit), float_snapshot(tiny_vit), read_geometry(tiny_vit)
    seen, passes, objectives = [0], [], []
    theirs.register_forward_pre_hook(lambda *_: passes.append(seen[0]))

    def note(step, objective):
        seen[0] = step
        objectives.append(objective)

    batch = synthesize(
        ours, theirs, geometry, LABELS, dataclasses.replace(SHORT, steps=8, align_every=3),
        generator=torch.Generator().manual_seed(0), on_step=note,
    )  # fmt: skip
    assert passes[2:] == asked  # two passes measure what a graph takes
    assert "align" in batch.trace and (objectives[0], objectives[-1]) == batch.trace["objective"]


def test_gradient_of_the_alignment_is_taken_as_often_as_it_stands_for(pair):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    config = dataclasses.replace(SHORT, align_weight=10.0)
    found = []
    with iteration.networks(*pair, config, images) as both:
        for align in (0, 1, 3):
            found.append(iteration.objective_gradient(
                images, LABELS, both, KeptTokens(pair[2], 3, 1.0), 0.0, torch.Generator().manual_seed(0), align=align
            ))  # fmt: skip
    without, once, thrice = found
    assert "align" not in without.terms and torch.equal(once.objective, thrice.objective)
    pull = once.images - without.images
    assert pull.abs().max() > 0.05 * without.images.abs().max()
    torch.testing.assert_close(thrice.images, without.images + 3 * pull, rtol=1e-4, atol=1e-6)


def test_all_attention_kinds_agree_on_which_is_which(pair):
    """Raw logits are logits times sqrt(head width): the alignment distance scales with them."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    distance = {
        kind: masked_alignment(*pair, images, SynthesisConfig(align_attention=kind, mask_attention="logits"))
        for kind in ("logits", "raw_logits", "probabilities")
    }
    torch.testing.assert_close(distance["raw_logits"], distance["logits"] * 8**0.5)
    assert (distance["probabilities"] < distance["logits"]).all() and (distance["probabilities"] > 0).all()
    assert not masked_alignment(pair[0], pair[0], pair[2], images, SynthesisConfig()).any()


def test_start_and_overrides(pair):
    start = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    kept = start.clone()
    steps = []
    batch = run(pair, start=start, steps=2, learning_rate=1e-3, on_step=lambda step, _: steps.append(step))
    assert steps == [1, 2] and torch.equal(start, kept)
    assert 0 < float((batch.images - start).abs().max()) <= 2 * 1e-3 * 1.01  # two AdamW steps
    with pytest.raises(InputError, match=r"start: expected images of shape \(3, 3, 32, 32\), got \(2, 3, 32, 32\)"):
        run(pair, start=start[:2])


def test_everything_borrowed_is_given_back(pair):
    before = state(pair[0]), state(pair[1])
    rng = torch.get_rng_state()
    run(pair)
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled()
    assert all(same_state(one, state(model)) for one, model in zip(before, pair[:2], strict=True))


@pytest.mark.parametrize("which", (0, 1))
def test_everything_borrowed_is_given_back_after_an_error(pair, which):
    before = state(pair[0]), state(pair[1])
    rng = torch.get_rng_state()

    def fail(*_):
        raise RuntimeError("inside the model")

    handle = pair[which].blocks[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside the model"):
        run(pair)
    handle.remove()
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled()
    assert all(same_state(one, state(model)) for one, model in zip(before, pair[:2], strict=True))


def spoil(model, image, calls):
    """Make the output of one image NaN in the iterations numbered ``calls``."""
    count = [-1 - 2]  # two passes measure what a graph takes

    def hook(_module, _inputs, output):
        count[0] += 1
        if count[0] in calls:
            factor = torch.ones(len(output), 1)
            factor[image] = float("nan")
            return output * factor
        return None

    return model.register_forward_hook(hook)


@pytest.mark.parametrize("config", (SHORT, dataclasses.replace(SHORT, parameterization="spectrum"),
                                    dataclasses.replace(SHORT, kept_tokens=0.5)))  # fmt: skip
@pytest.mark.parametrize("call", (0, 2, 3))  # 3: the last one
def test_an_image_that_turns_nan_is_drawn_again_and_its_neighbours_do_not_notice(pair, config, call):
    clean = run(pair, config)
    handle = spoil(pair[0], 1, {call})
    batch = run(pair, config)
    handle.remove()
    assert clean.redrawn == 0 and batch.redrawn == 1
    assert torch.equal(batch.images[[0, 2]], clean.images[[0, 2]])
    assert torch.isfinite(batch.images).all() and not torch.equal(batch.images[1], clean.images[1])
    again = run(pair, config)
    assert torch.equal(again.images, clean.images)


def test_a_drawn_image_gets_a_full_run(pair):
    """Its objective falls as far as that of its neighbours, even if it broke in the last iteration."""
    config = dataclasses.replace(SHORT, steps=12, head_weight=0.0, entropy_weight=0.0, align_weight=0.0, tv_weight=1.0)
    handle = spoil(pair[0], 1, {11})
    batch = run(pair, config)
    handle.remove()
    assert batch.redrawn == 1
    noise = run(pair, config, steps=1, learning_rate=1e-9).images
    rough = [(images[..., 1:] - images[..., :-1]).square().mean(dim=(1, 2, 3)) for images in (batch.images, noise)]
    assert (rough[0] < 0.5 * rough[1].mean()).all()


def test_fewer_steps_than_draws_do_not_hide_a_nan(pair):
    handle = spoil(pair[0], slice(None), set(range(100)))
    with pytest.raises(SynthesisError, match="not finite after"):
        run(pair, steps=1)
    handle.remove()


def test_trace_leaves_out_what_was_not_finite(pair):
    handle = spoil(pair[0], 1, {0})
    trace = run(pair).trace
    handle.remove()
    assert all(first == first and last == last for first, last in trace.values())


def test_redrawing_is_seeded(pair):
    found = []
    for seed in (0, 0, 1):
        handle = spoil(pair[0], 1, {1})
        found.append(run(pair, seed=seed).images[1])
        handle.remove()
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_an_image_that_stays_nan_is_an_error(pair):
    before = state(pair[0])
    handle = spoil(pair[0], 2, set(range(100)))
    with pytest.raises(SynthesisError, match=r"1 image\(s\) is not finite after as many new draws.*raise max_redraws"):
        run(pair, dataclasses.replace(SHORT, max_redraws=2))
    handle.remove()
    assert same_state(before, state(pair[0]))


@pytest.mark.parametrize(
    "layout", ({"class_token": False, "global_pool": "avg"}, {"reg_tokens": 3}, {"num_classes": 0})
)
def test_other_layouts(layout):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(img_size=(24, 16), patch_size=8, embed_dim=16, depth=1, num_heads=2, **layout).eval()
    batch = synthesize(
        float_snapshot(model), float_snapshot(model), read_geometry(model), LABELS, SHORT,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert batch.images.shape == (3, 3, 24, 16) and batch.informative.shape == (3, 6)
    assert ("class" in batch.trace) == ("num_classes" not in layout)
    assert batch.informative.sum(dim=1).tolist() == [1, 1, 1]
