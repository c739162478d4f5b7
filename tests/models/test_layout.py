"""Attention inside windows, mapped back to the image."""

import pytest
import torch

from maskaq_brevitas.models.layout import AttentionLayout


def windows_of(layout, batch, seed=0, heads=2):
    area = layout.window[0] * layout.window[1]
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch * layout.count, heads, area, area, generator=generator)


def by_hand(layout, attention, batch):
    """Follows Swin token by token: roll, pad, cut, mean over heads and over the queries that are tokens of the image.
    """
    rows, columns = layout.grid
    height, width = layout.window
    _, across = layout.windows
    received = torch.zeros(batch, rows, columns)
    for image in range(batch):
        for row in range(rows):
            for column in range(columns):
                # where this token lies after the roll up and to the left
                r, c = (row - layout.shift[0]) % rows, (column - layout.shift[1]) % columns
                number = (r // height) * across + c // width
                key = (r % height) * width + c % width
                queries = [
                    i * width + j
                    for i in range(height)
                    for j in range(width)
                    if (r // height) * height + i < rows and (c // width) * width + j < columns
                ]
                maps = attention[image * layout.count + number]
                received[image, row, column] = maps[:, queries, key].mean()
    return received


@pytest.mark.parametrize("shift", ((0, 0), (1, 2)))
@pytest.mark.parametrize("grid", ((4, 6), (5, 7)), ids=("fits", "padded"))
def test_received_attention_of_windows(grid, shift):
    layout = AttentionLayout(grid=grid, window=(2, 3), shift=shift)
    attention = windows_of(layout, batch=2)
    found = layout.received(attention, grid)
    torch.testing.assert_close(found, by_hand(layout, attention, 2).flatten(1))


def test_coarser_grids_are_spread_over_the_patches_they_cover():
    layout = AttentionLayout(grid=(2, 2), window=(2, 2))
    attention = windows_of(layout, batch=1)
    found = layout.received(attention, (4, 6)).view(4, 6)
    coarse = by_hand(layout, attention, 1)[0]
    for row in range(4):
        for column in range(6):
            assert found[row, column] == pytest.approx(float(coarse[row // 2, column // 3]))


def test_class_token_prefix_and_pooling():
    attention = torch.rand(2, 3, 1, 7, generator=torch.Generator().manual_seed(0))
    pooled = AttentionLayout(grid=(2, 3), prefix=1, class_token=True, pooling=1)
    torch.testing.assert_close(pooled.received(attention, (2, 3)), attention[:, :, 0, 1:].mean(dim=1))
    assert pooled.among_patches(attention).shape == (2, 3, 1, 6) and pooled.queries == 1
    whole = AttentionLayout(grid=(2, 3), prefix=2)
    attention = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(whole.received(attention, (2, 3)), attention[:, :, 2:, 2:].mean(dim=(1, 2)))
    assert whole.queries == 6


def test_coarse_keys_are_received_by_the_patches_below_them():
    layout = AttentionLayout(grid=(2, 2), query_grid=(4, 4))
    attention = torch.rand(1, 2, 16, 4, generator=torch.Generator().manual_seed(0))
    found = layout.received(attention, (4, 4)).view(4, 4)
    assert found[3, 0] == pytest.approx(float(attention[0, :, :, 2].mean())) and layout.queries == 16


def test_a_shifted_window_layout_is_where_swin_rolls_tokens():
    """A mark in one token of the image comes out of timm's own roll and partition where the layout says."""
    from timm.models.swin_transformer import window_partition

    layout = AttentionLayout(grid=(4, 4), window=(2, 2), shift=(1, 1))
    image = torch.zeros(1, 4, 4, 1)
    image[0, 0, 3] = 1
    windows = window_partition(torch.roll(image, (-1, -1), dims=(1, 2)), (2, 2)).flatten(1)  # (windows, area)
    attention = windows[:, None, None, :].expand(-1, 1, 4, -1)  # every query attends the mark
    assert layout.received(attention, (4, 4)).view(4, 4).nonzero().tolist() == [[0, 3]]
