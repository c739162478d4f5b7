import pytest
import torch

from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.synthesis.tokens import DrawnTokens
from maskaq_brevitas.synthesis.tokens import KeptTokens

GEOMETRY = Geometry(
    input_size=(1, 12, 20), grid=(3, 5), prefix_tokens=2, class_token=True, num_classes=10, mean=(0.5,), std=(0.5,)
)


def patches(images):
    """Patch by patch, rows first, ``(batch, patches, pixels)``."""
    return images.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(images), 15, 16)


@pytest.mark.parametrize("flipped", (False, True))
@pytest.mark.parametrize(("down", "right"), ((0, 0), (4, 8), (-4, -12), (1, -1), (9, 6)))
def test_tokens_follow_their_patches_through_roll_and_mirror(down, right, flipped):
    kept = KeptTokens(GEOMETRY, 2, 0.4)
    kept.cut(torch.rand(2, 15, generator=torch.Generator().manual_seed(0)), 1.0)
    assert kept.places.shape == (2, 6) and all(len(set(row)) == 6 for row in kept.places.tolist())
    images = torch.arange(15.0).view(1, 1, 3, 5).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(2, 1, 12, 20)
    moved = torch.roll(images, (down, right), (2, 3))
    tokens = kept.tokens(down, right, flipped)
    assert (tokens[:, :2] == torch.tensor([0, 1])).all()
    seen = patches(moved.flip(-1) if flipped else moved)
    seen = seen.gather(1, (tokens[:, 2:] - 2).unsqueeze(-1).expand(-1, -1, 16))
    # At least half of the pixels in each direction are those of the patch, all of them for whole steps.
    share = (seen == kept.places.unsqueeze(-1)).float().mean(dim=-1)
    assert share.min() == 1 if down % 4 == right % 4 == 0 else share.min() >= 0.25


def test_the_patches_that_receive_least_are_dropped_in_equal_ratios():
    kept = KeptTokens(GEOMETRY, 2, 0.4)
    assert not kept.is_due(0.05) and kept.is_due(0.1)
    received = torch.arange(15.0).repeat(2, 1)
    received[1] = received[1].flip(0)
    sizes = []
    for progress in (0.1, 0.2, 0.3, 0.4):
        assert kept.is_due(progress)
        kept.cut(received.gather(1, kept.places), progress)
        assert not kept.is_due(progress)
        sizes.append(kept.places.shape[1])
    assert sizes == [round(15 * 0.4 ** (cut / 4)) for cut in (1, 2, 3, 4)]
    assert sorted(kept.places[0].tolist()) == list(range(9, 15)) and sorted(kept.places[1].tolist()) == list(range(6))
    assert not kept.is_due(1.0)


def test_all_are_kept_by_default():
    kept = KeptTokens(GEOMETRY, 1, 1.0)
    assert not kept.is_due(1.0)
    assert kept.tokens(0, 0, False).tolist() == [list(range(17))]


def test_for_views_patches_are_drawn_anew_each_time():
    drawn, generator = DrawnTokens(GEOMETRY, 2, 0.4), torch.Generator().manual_seed(0)
    state = generator.get_state()
    drawn.draw(generator)
    assert torch.equal(generator.get_state(), state)  # all are kept: nothing to draw
    assert drawn.tokens(0, 0, False).tolist() == [list(range(17))] * 2
    assert drawn.is_due(1.0)
    drawn.cut(torch.zeros(2, 15), 1.0)
    assert not drawn.is_due(1.0)
    found = []
    for _ in range(40):
        drawn.draw(generator)
        tokens = drawn.tokens(3, 5, False)
        assert tokens.shape == (2, 8) and tokens[:, :2].tolist() == [[0, 1]] * 2
        assert all(len(set(row)) == 8 for row in tokens.tolist())
        found.append(tokens[:, 2:] - 2)
    counts = torch.bincount(torch.cat(found).flatten(), minlength=15)  # of 80 draws of 6 in 15
    assert counts.min() > 15 and counts.max() < 50
