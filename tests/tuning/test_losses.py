"""The tuning losses against an independent numpy computation, loop by loop."""

import numpy as np
import pytest
import torch

from maskaq_brevitas.errors import InputError
from maskaq_brevitas.tuning.losses import centred_error
from maskaq_brevitas.tuning.losses import context_distance
from maskaq_brevitas.tuning.losses import temperature_divergence
from maskaq_brevitas.tuning.losses import token_weights


def _softmax(row: np.ndarray) -> np.ndarray:
    shifted = np.exp(row - row.max())
    return shifted / shifted.sum()


def _divergence(p: np.ndarray, q: np.ndarray, temperature: float) -> float:
    total = 0.0
    for ours, theirs in zip(p, q, strict=True):
        a, b = _softmax(ours / temperature), _softmax(theirs / temperature)
        total += float((a * np.log(a / b)).sum())
    return temperature**2 * total / len(p)


def _distance(float_layers: list[np.ndarray], quant_layers: list[np.ndarray], first: int) -> float:
    values = []
    for p, q in zip(float_layers, quant_layers, strict=True):
        batch, heads, tokens, channels = p.shape
        for image in range(batch):
            activity = np.abs(p[image, :, first:]).mean(axis=(0, 2))
            chosen = np.argsort(-activity)[: max(1, round(0.1 * (tokens - first)))]
            weight = np.ones(tokens - first)
            weight[chosen] = 2
            weight /= weight.sum()
            for head in range(heads):
                for channel in range(channels):
                    a, b = p[image, head, first:, channel], q[image, head, first:, channel]
                    a, b = a - (weight * a).sum(), b - (weight * b).sum()
                    covariance = (weight * a * b).sum()
                    variances = (weight * a * a).sum() + (weight * b * b).sum()
                    values.append(1 - (2 * covariance + 0.03**2) / (variances + 0.03**2))
    return float(np.mean(values))


def _contexts(layers: int = 2, tokens: int = 31) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    p = [torch.randn(2, 3, tokens, 4, generator=generator, dtype=torch.float64) * 0.1 for _ in range(layers)]
    q = [layer + 0.05 * torch.randn(layer.shape, generator=generator, dtype=torch.float64) for layer in p]
    return p, q


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_divergence_equals_numpy(temperature: float):
    p, q = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(1)) * 3
    expected = _divergence(p.double().numpy(), q.double().numpy(), temperature)
    assert float(temperature_divergence(p, q, temperature)) == pytest.approx(expected, rel=1e-5)


def test_divergence_of_equal_logits_is_zero():
    logits = torch.randn(4, 10)
    assert float(temperature_divergence(logits, logits)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("include_prefix", "first"), [(False, 1), (True, 0)])
def test_distance_equals_numpy(include_prefix: bool, first: int):
    p, q = _contexts()
    expected = _distance([layer.numpy() for layer in p], [layer.numpy() for layer in q], first)
    found = context_distance(p, q, prefix=1, include_prefix=include_prefix)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_distance_ignores_a_constant_per_channel_and_sees_the_sign():
    p, _ = _contexts()
    shifted = [layer + torch.arange(4.0) for layer in p]
    assert float(context_distance(p, shifted)) == pytest.approx(0, abs=1e-5)
    large = [layer * 100 for layer in p]
    assert float(context_distance(large, [-layer for layer in large])) == pytest.approx(2, abs=1e-3)


def test_prefix_only_counts_when_included():
    p, _ = _contexts()
    q = [layer.clone() for layer in p]
    for layer in q:
        layer[:, :, 0] += 10 * torch.randn(4, generator=torch.Generator().manual_seed(0))
    assert float(context_distance(p, q, prefix=1)) == pytest.approx(0, abs=1e-6)
    assert float(context_distance(p, q, prefix=1, include_prefix=True)) > 0.1


def test_weights_double_the_most_active_tenth():
    context = torch.zeros(1, 2, 20, 3)
    context[:, :, [4, 7]] = -5
    weights = token_weights(context)
    assert weights.sum() == pytest.approx(1)
    assert set(torch.nonzero(weights[0] > weights[0, 0]).flatten().tolist()) == {4, 7}
    assert float(weights[0, 4] / weights[0, 0]) == pytest.approx(2)


def test_centred_error_counts_what_tells_images_apart():
    target = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    common = 100 * torch.ones(8)
    mean = target.mean(dim=0).expand_as(target)
    assert float(centred_error(target, target)) == 0
    # All images alike: as wrong as can be without a constant part, and with a large one too.
    spread = float((target - mean).square().sum())
    expected = spread / (spread + 0.1 * float(target.square().sum()))
    assert float(centred_error(mean, target)) == pytest.approx(expected, rel=1e-5)
    shifted = target + common
    expected = spread / (spread + 0.1 * float(shifted.square().sum()))
    assert float(centred_error(mean + common, shifted)) == pytest.approx(expected, rel=1e-4)
    assert float(centred_error(torch.ones(2, 3), torch.zeros(2, 3))) > 1e6  # finite


def test_shapes_are_checked():
    with pytest.raises(InputError, match="logits of one shape"):
        temperature_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    p, q = _contexts()
    with pytest.raises(InputError, match="same shapes for both networks"):
        context_distance(p, q[:1])
    with pytest.raises(InputError, match="one context"):
        context_distance([], [])
