"""Blocks called with tokens alone."""

import pytest
import torch
from small_models import build
from torch import nn

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.block_path import bound_arguments
from maskaq_brevitas.models.families import block_names
from maskaq_brevitas.models.families import block_passages
from maskaq_brevitas.models.families import features_behind


def image(seed, size=(3, 32, 32)):
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(seed))


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", ("vit", "swin", "swin_v2", "beit_shared", "eva02", "dinov3"))
def test_blocks_one_by_one_give_what_the_model_gives(name):
    model = build(name)
    names, passages = block_names(model), block_passages(model)
    first = []
    handle = model.get_submodule(names[0]).register_forward_pre_hook(lambda _block, inputs: first.append(inputs[0]))
    expected = model.forward_head(model.forward_features(image(1)), pre_logits=True)
    handle.remove()
    with bound_arguments(model, image(2)):
        tokens = first[0]
        for block in names:
            if block in passages:
                tokens = model.get_submodule(passages[block])(tokens)
            tokens = model.get_submodule(block)(tokens)
        torch.testing.assert_close(model.forward_head(model.norm(tokens), pre_logits=True), expected)
        start = model.get_submodule(names[0])(first[0])
        torch.testing.assert_close(features_behind(model, names[0])(start), expected)
        assert torch.equal(model(image(1)), model(image(1)))
    assert hooks(model) == 0


def test_without_it_rotary_positions_would_be_missing():
    model = build("eva02")
    names = block_names(model)
    with bound_arguments(model, image(2)):
        found = model.get_submodule(names[0])(torch.ones(1, 17, 32).cumsum(1))
    assert not torch.allclose(found, model.get_submodule(names[0])(torch.ones(1, 17, 32).cumsum(1)))


def test_models_whose_blocks_are_no_chain_are_refused():
    model = build("twins")
    with pytest.raises(ModelError, match="Twins: blocks.1.0 does not take what .* gives.*Use --tune distill"):
        with bound_arguments(model, image(1, (3, 32, 40))):
            pass
    assert hooks(model) == 0
    with pytest.raises(ModelError, match=r"Cait: its blocks alone do not lead to its features \(a class token"):
        features_behind(build("cait"), "blocks.0")


def test_arguments_that_depend_on_the_image_are_refused(tiny_vit):
    class Leans(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = tiny_vit

        def forward(self, x):
            tokens = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(x)))
            for block in self.vit.blocks:
                tokens = block(tokens, attn_mask=x.mean() * torch.eye(17))
            return tokens

    with pytest.raises(ModelError, match="beside its tokens depends on the image"), bound_arguments(Leans(), image(1)):
        pass
