"""Every term against plain numpy with explicit loops, and its gradient where it could break."""

import numpy as np
import numpy_objectives as reference
import pytest
import torch

from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.quant.snapshot import frozen_snapshot
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.synthesis import iteration
from maskaq_brevitas.synthesis import objectives
from maskaq_brevitas.synthesis.tokens import KeptTokens
from maskaq_brevitas.tuning.calibrate import calibrate


@pytest.fixture
def attention():
    """3 layers of (batch 2, heads 3, tokens 7, tokens 7), about as large as logits."""
    return list(torch.randn(3, 2, 3, 7, 7, generator=torch.Generator().manual_seed(0)) * 3)


@pytest.fixture
def images():
    return torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))


def per_image(function, layers, *arguments):
    arrays = [layer.double().numpy() for layer in layers]
    return torch.tensor([function([layer[image] for layer in arrays], *arguments) for image in range(len(arrays[0]))])


def check(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, torch.as_tensor(np.asarray(expected)).float(), rtol=tolerance, atol=tolerance)


def test_class_loss():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    expected = [reference.class_loss(row.double().numpy(), label) for row, label in zip(logits, (4, 0, 2), strict=True)]
    check(objectives.class_loss(logits, torch.tensor([4, 0, 2])), expected)


def test_total_variation(images):
    check(objectives.total_variation(images), [reference.total_variation(image.double().numpy()) for image in images])
    expected = [reference.total_variation_l1(image.double().numpy()) for image in images]
    check(objectives.total_variation_l1(images), expected)


def test_total_variation_of_one_image_ignores_its_neighbours(images):
    check(objectives.total_variation(images)[1:], objectives.total_variation(images[1:]), tolerance=0)


@pytest.mark.parametrize("prefix", (0, 1, 2))
def test_head_coherence(attention, prefix):
    check(objectives.head_coherence_loss(attention, prefix), per_image(reference.head_coherence, attention, prefix))


def test_head_coherence_at_its_ends(attention):
    alike = [layer[:, :1].expand(-1, 3, -1, -1) for layer in attention]
    assert objectives.head_coherence_loss(alike, 1).abs().max() < 1e-5
    assert torch.equal(objectives.head_coherence_loss([layer[:, :1] for layer in attention], 1), torch.zeros(2))


@pytest.mark.parametrize("prefix", (0, 2))
@pytest.mark.parametrize("rows", (None, [3, 0, 2]))
def test_entropy(attention, prefix, rows):
    index = None if rows is None else torch.tensor(rows)
    expected = per_image(lambda layers: reference.similarity_entropy(layers[0], prefix, rows), attention)
    check(objectives.similarity_entropy(attention[0], prefix, index), expected)
    expected = per_image(reference.entropy_loss, attention, prefix, rows)
    check(objectives.entropy_loss(attention, prefix, index), expected)


def test_masked_alignment():
    generator = torch.Generator().manual_seed(3)
    ours, theirs = torch.randn(2, 4, 2, 9, generator=generator)  # (layers, batch, patches) each
    shared = torch.rand(2, 9, generator=generator) < 0.5
    of_layers = torch.rand(4, 2, 9, generator=generator) < 0.5
    for mask in (shared, of_layers):
        expected = []
        for image in range(2):
            rows = mask[:, image] if mask.ndim == 3 else [mask[image]] * 4
            chosen = [set(row.nonzero().flatten().tolist()) for row in rows]
            expected.append(reference.masked_alignment(
                ours[:, image].double().numpy(), theirs[:, image].double().numpy(), chosen))  # fmt: skip
        check(objectives.masked_alignment_loss(ours, theirs, mask), expected)
    assert torch.equal(
        objectives.masked_alignment_loss(ours, theirs, torch.zeros(2, 9, dtype=torch.bool)), torch.zeros(2)
    )


def test_alignment_gradient_reaches_both_models_and_only_the_masked_patches():
    ours = torch.randn(2, 1, 4, requires_grad=True)
    theirs = torch.randn(2, 1, 4, requires_grad=True)
    mask = torch.tensor([[True, False, False, True]])
    objectives.masked_alignment_loss(ours, theirs, mask).sum().backward()
    for rows in (ours, theirs):
        assert torch.equal(rows.grad != 0, mask.expand(2, 1, 4))


@pytest.mark.parametrize("function", (objectives.total_variation, objectives.total_variation_l1))
def test_gradient_on_a_constant_image(function):
    image = torch.full((1, 3, 4, 4), 0.3, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(image).sum(), image)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("value", (0.0, 2.0))
def test_gradient_on_constant_attention(value):
    layers = [torch.full((1, 2, 5, 5), value, requires_grad=True)]
    for loss in (objectives.head_coherence_loss(layers, 1), objectives.entropy_loss(layers, 1)):
        (gradient,) = torch.autograd.grad(loss.sum(), layers[0])
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def raw_logits(model, image, query_key):
    """q k^T of every block, ``(heads, tokens, tokens)`` in float64; ``query_key`` gives q and k of a block."""
    kept = []
    hooks = [block.attn.register_forward_hook(query_key(kept)) for block in model.blocks]
    with torch.no_grad():
        logits = model(image)
    for hook in hooks:
        hook.remove()
    return kept, logits[0].double().numpy()


def from_weights(kept):
    def hook(attention, inputs, _output):
        tokens = inputs[0][0].double().numpy()
        weight, bias = attention.qkv.weight.detach().double().numpy(), attention.qkv.bias.detach().double().numpy()
        projected = tokens @ weight.T + bias
        width = projected.shape[1] // 3
        size = width // attention.num_heads
        kept.append(np.stack([
            projected[:, start : start + size] @ projected[:, width + start : width + start + size].T
            for start in range(0, width, size)]))  # fmt: skip

    return hook


def from_quantized_weights(kept):
    def hook(attention, inputs, _output):
        projected = attention.qkv(inputs[0])[0].detach()
        width, count = projected.shape[1] // 3, attention.num_heads
        size = width // count
        maps = []
        for head in range(count):
            query = projected[:, head * size : (head + 1) * size] * size**-0.5
            key = projected[:, width + head * size : width + (head + 1) * size]
            query, key = attention.query(query), attention.key(key)
            maps.append(query.double().numpy() @ key.double().numpy().T * size**0.5)
        kept.append(np.stack(maps))

    return hook


@pytest.mark.parametrize("progress", (0.0, 0.5, 1.0))
def test_published_objective_is_the_paper(tiny_vit, progress):
    """All five terms of METHOD.md, section 2, with q k^T taken by hand from the weights of both models."""
    config = SynthesisConfig.published(jitter=0, late_jitter=0, colour_shift=0.0, colour_scale=0.0, mask_drop=0.0)
    geometry = read_geometry(tiny_vit)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    quant_model, _ = swap_layers(tiny_vit, "w4a8")
    calibrate(quant_model, [image])
    ours, output = raw_logits(tiny_vit, image, from_weights)
    theirs, _ = raw_logits(quant_model, image, from_quantized_weights)
    rows = [reference.received(layer, 1, True) for layer in ours]
    chosen = reference.top_patches(sum(rows), 0.5 + (0.1 - 0.5) * progress)
    expected = {
        "class": (1.0, reference.class_loss(output, 3)),
        "tv": (1e-4, reference.total_variation(image[0].double().numpy())),  # 2.5e-5 * sqrt(16), see published()
        "head": (1.0, reference.head_coherence(ours, 1)),
        "entropy": (1.0, reference.entropy_loss(ours, 1)),
        "align": (0.1, reference.masked_alignment(
            rows, [reference.received(layer, 1, True) for layer in theirs], [chosen] * len(rows))),
    }  # fmt: skip
    float_model, frozen = float_snapshot(tiny_vit), frozen_snapshot(quant_model)
    with iteration.networks(float_model, frozen, geometry, config, image) as networks:
        found = iteration.objective_gradient(
            image, torch.tensor([3]), networks, KeptTokens(geometry, 1, 1.0), progress,
            torch.Generator().manual_seed(0),
        )  # fmt: skip
    assert found.terms.keys() == expected.keys()
    for name, (_, value) in expected.items():
        assert float(found.terms[name]) == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert float(found.objective) == pytest.approx(sum(weight * value for weight, value in expected.values()), rel=1e-5)


def test_windows_of_an_image_count_as_their_mean():
    """Two images of three windows each: every term is that of the windows alone, averaged per image."""
    layers = [torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for loss in (objectives.head_coherence_loss, objectives.entropy_loss):
        torch.testing.assert_close(loss(layers, 0, images=2), loss(layers, 0).view(2, 3).mean(dim=1))
    rows = [torch.tensor([0, 2]), torch.tensor([1, 3])]
    for loss in (objectives.head_coherence_loss, objectives.entropy_loss):
        alone = [loss([layer], 0, chosen) for layer, chosen in zip(layers, rows, strict=True)]
        torch.testing.assert_close(loss(layers, 0, rows), torch.stack(alone).mean(dim=0))


def test_a_layer_with_one_query_has_no_entropy():
    layers = [torch.randn(2, 2, tokens, 5, generator=torch.Generator().manual_seed(tokens)) for tokens in (5, 1)]
    torch.testing.assert_close(objectives.entropy_loss(layers, 0), objectives.entropy_loss(layers[:1], 0))
    assert objectives.entropy_loss(layers[1:], 0).tolist() == [0, 0]


def test_feature_alignment_is_relative_to_the_float_features():
    features = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    found = objectives.feature_alignment_loss(features, torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([16 / 25, 0.0]))
