"""The outputs of blocks, and nothing left behind."""

import pytest
import torch
from borrowed import hooks

from maskaq_brevitas.models.block_tap import block_tap


def test_records_what_the_blocks_give(tiny_vit):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = tiny_vit.norm_pre(tiny_vit._pos_embed(tiny_vit.patch_embed(x)))
        first = tiny_vit.blocks[0](tokens)
        second = tiny_vit.blocks[1](first)
        with block_tap(tiny_vit) as outputs:
            tiny_vit(x[:1])
            tiny_vit(x)  # each pass replaces what the one before it left
            assert len(outputs) == 2 and torch.equal(outputs[0], first) and torch.equal(outputs[1], second)
        assert outputs == [] and hooks(tiny_vit) == 0


def test_hooks_go_also_after_an_error(tiny_vit):
    with pytest.raises(KeyError), block_tap(tiny_vit):
        raise KeyError
    assert hooks(tiny_vit) == 0
