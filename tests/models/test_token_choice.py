import pytest
import torch
from torch import nn

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.token_choice import draw_tokens
from maskaq_brevitas.models.token_choice import patch_count
from maskaq_brevitas.models.token_choice import token_choice
from tests.quant.test_snapshot import images


def test_networks_see_the_chosen_tokens_at_their_own_positions(tiny_vit):
    seen = []
    handle = tiny_vit.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    original = tiny_vit.patch_drop
    with torch.no_grad(), token_choice([tiny_vit]) as choice:
        everything = tiny_vit(images())
        indices = draw_tokens(len(images()), patch_count(tiny_vit), 5, 1, torch.Generator().manual_seed(0))
        choice.indices = indices
        tiny_vit(images())
    handle.remove()
    assert tiny_vit.patch_drop is original
    assert seen[1].shape == (len(images()), 6, 64)
    for image in range(len(images())):
        assert torch.equal(seen[1][image], seen[0][image, indices[image]])
    with torch.no_grad():
        assert torch.equal(tiny_vit(images()), everything)


def test_all_tokens_give_the_same_output_in_any_order(tiny_vit):
    with torch.no_grad(), token_choice([tiny_vit]) as choice:
        expected = tiny_vit(images())
        choice.indices = draw_tokens(len(images()), 16, 16, 1, torch.Generator().manual_seed(0))
        torch.testing.assert_close(tiny_vit(images()), expected, rtol=1e-4, atol=1e-4)


def test_drawn_tokens_are_distinct_patches_and_every_prefix_token():
    drawn = draw_tokens(50, 9, 4, 2, torch.Generator().manual_seed(0))
    assert drawn.shape == (50, 6) and (drawn[:, :2] == torch.tensor([0, 1])).all()
    assert all(len(set(row)) == 6 for row in drawn.tolist())
    assert drawn[:, 2:].unique().tolist() == list(range(2, 11))


def test_models_without_the_place_are_refused(tiny_vit):
    tiny_vit.patch_drop = nn.Dropout()
    with pytest.raises(ModelError, match="no idle patch_drop module .* Use kept_tokens=1"), token_choice([tiny_vit]):
        pass
    with pytest.raises(ModelError, match="does not tell its number of patches"):
        patch_count(nn.Linear(1, 1))
