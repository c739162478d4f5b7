"""Starting images: which of them a label gets, and that nothing else depends on it."""

import dataclasses

import pytest
import torch
from torch import nn

from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.synthesis import synthesizer
from maskaq_brevitas.synthesis.starts import assigned
from maskaq_brevitas.synthesis.starts import draw_start
from maskaq_brevitas.synthesis.starts import suited_starts

SIZE = (3, 16, 16)
LOW, HIGH = -torch.ones(3, 1, 1), torch.ones(3, 1, 1)


class Reddish(nn.Module):
    """Class 0, 1 or 2 by the strongest of three channels."""

    def forward(self, images):
        self.seen = getattr(self, "seen", 0) + len(images)
        return 10 * images.mean(dim=(2, 3))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def suited(labels, model=None, seed=0, start_views=3):
    source = generator(seed)
    drawn = draw_start("scenes", (len(labels), *SIZE), LOW, HIGH, source)
    return suited_starts(torch.tensor(labels), model or Reddish(), drawn, start_views, source, "float32")


def chance(images, labels):
    return Reddish()(images).softmax(-1).gather(1, torch.tensor(labels)[:, None]).mean()


def test_each_label_gets_another_candidate_and_the_surest_pair_comes_first():
    scores = torch.randn(12, 5, generator=generator())
    chosen = assigned(scores)
    assert len(chosen.unique()) == 5
    assert scores.max() == max(scores[candidate, label] for label, candidate in enumerate(chosen))
    # The best that is left, pair by pair, found by sorting instead of by striking out.
    left, wanted = sorted(((float(scores[c, k]), c, k) for c in range(12) for k in range(5)), reverse=True), {}
    for _, candidate, label in left:
        if label not in wanted and candidate not in wanted.values():
            wanted[label] = candidate
    assert chosen.tolist() == [wanted[label] for label in range(5)]


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_what_the_model_cannot_judge_is_taken_last(bad):
    assert assigned(torch.tensor([[bad, bad], [1.0, 2.0], [0.0, -5.0]])).tolist() == [2, 1]
    assert assigned(torch.full((3, 3), bad)).sort().values.tolist() == [0, 1, 2]


def test_labels_start_from_what_the_model_takes_for_them():
    labels = [0, 1, 2, 2, 1, 0, 0, 1]
    random = draw_start("scenes", (8, *SIZE), LOW, HIGH, generator())
    among_eight, among_many = suited(labels, start_views=0), suited(labels, start_views=7)
    assert among_many.shape == random.shape
    assert chance(random, labels) + 0.1 < chance(among_eight, labels) < chance(among_many, labels)
    # Without views the same images in another order.
    assert sorted(among_eight.mean(dim=(1, 2, 3)).tolist()) == sorted(random.mean(dim=(1, 2, 3)).tolist())
    assert suited(labels).min() >= -1 and suited(labels).max() <= 1


def test_the_model_sees_every_candidate_once_and_no_gradient_is_kept():
    model = Reddish()
    images = suited([0, 1, 2, 0], model, start_views=2)
    assert model.seen == 4 * (1 + 2) and not images.requires_grad


def test_the_same_seed_gives_the_same_images():
    assert torch.equal(suited([0, 1, 2]), suited([0, 1, 2]))
    assert not torch.equal(suited([0, 1, 2]), suited([0, 1, 2], seed=1))


def test_views_are_a_number_from_zero():
    with pytest.raises(ConfigurationError, match="start_views"):
        SynthesisConfig(start_views=-1)
    assert SynthesisConfig(start_views=0).start_views == 0 and SynthesisConfig().start_views is None


def test_synthesis_begins_with_them_unless_there_are_no_classes(monkeypatch, tiny_vit):
    asked = []
    monkeypatch.setattr(synthesizer, "suited_starts", lambda *given: asked.append(given[0]) or suited_starts(*given))
    geometry = read_geometry(tiny_vit)
    config = SynthesisConfig(steps=1, batch_size=2, start_views=1)

    def run(geometry, config, **options):
        labels = torch.tensor([1, 0])
        return synthesizer.synthesize(
            float_snapshot(tiny_vit), None, geometry, labels, config, generator=generator(), **options
        ).images

    found = run(geometry, config)
    assert len(asked) == 1 and asked[0].tolist() == [1, 0]
    assert not torch.equal(found, run(geometry, dataclasses.replace(config, start_views=None)))
    run(geometry, config, start=torch.zeros(2, *geometry.input_size))
    run(dataclasses.replace(geometry, num_classes=0), config)
    assert len(asked) == 1
