import numpy_objectives as reference
import pytest
import torch

from maskaq_brevitas.errors import InputError
from maskaq_brevitas.synthesis import masks


@pytest.mark.parametrize("class_token", (True, False))
@pytest.mark.parametrize("prefix", (1, 3))
def test_received_attention(class_token, prefix):
    layers = list(torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    received = masks.received_attention(layers, prefix, class_token)
    assert received.shape == (2, 2, 8 - prefix)
    for layer in range(2):
        for image in range(2):
            expected = reference.received(layers[layer][image].double().numpy(), prefix, class_token)
            torch.testing.assert_close(received[layer, image], torch.from_numpy(expected).float())


@pytest.mark.parametrize(("share", "count"), ((0.5, 8), (0.1, 2), (0.01, 1), (0.3, 5), (1.0, 16)))
def test_mask_holds_the_largest(share, count):
    received = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    mask = masks.informative_mask(received, share)
    for values, row in zip(received.tolist(), mask, strict=True):
        assert set(row.nonzero().flatten().tolist()) == reference.top_patches(values, share)
        assert row.sum() == count


@pytest.mark.parametrize("share", (0.0, -0.1, 1.5))
def test_share_outside_its_range(share):
    with pytest.raises(InputError, match=r"share: expected a number in \(0, 1\]"):
        masks.informative_mask(torch.zeros(1, 4), share)


def test_share_falls_linearly():
    assert [masks.mask_share(progress, 0.5, 0.1) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(
        [0.5, 0.4, 0.3, 0.1]
    )


def test_random_drop():
    mask = torch.zeros(500, 40, dtype=torch.bool)
    mask[:, :20] = True
    drawn = torch.rand(500, 40, generator=torch.Generator().manual_seed(0))
    kept = masks.drop_at_random(mask, 0.3, drawn)
    assert torch.equal(kept, mask & (drawn >= 0.3))  # no row of 20 is empty
    assert kept.sum() / mask.sum() == pytest.approx(0.7, abs=0.02)  # 10,000 draws: deviation 0.005
    assert torch.equal(masks.drop_at_random(mask, 0.0, drawn), mask)


def test_random_drop_leaves_no_row_empty():
    mask = torch.zeros(300, 8, dtype=torch.bool)
    mask[:, 2] = True
    drawn = torch.rand(300, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(masks.drop_at_random(mask, 0.9, drawn), mask)
