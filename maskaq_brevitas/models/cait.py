"""timm's CaiT: heads that talk to each other, and class attention behind the blocks."""

from __future__ import annotations

from typing import Any

from timm.models.cait import Cait
from timm.models.cait import ClassAttn
from timm.models.cait import LayerScaleBlock
from timm.models.cait import LayerScaleBlockClassAttn
from timm.models.cait import TalkingHeadAttn
from torch import Tensor
from torch import nn

from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import block_places
from maskaq_brevitas.models.layout import AttentionLayout
from maskaq_brevitas.models.vit import SMALL

__all__ = ["CAIT", "ExplicitClassAttention", "ExplicitTalkingHeads"]


class ExplicitTalkingHeads(ExplicitAttention):
    """``TalkingHeadAttn``, written out: ``(batch, tokens, dim)`` to the same.

    Logits and softmax outputs are mixed over the heads by a linear layer each.
    """

    mixes_probabilities = True
    unsigned_layers = ("proj_w",)

    def __init__(self, source: TalkingHeadAttn):
        super().__init__(source)
        self.scale = source.scale
        self.qkv = source.qkv
        self.proj_l = source.proj_l
        self.proj_w = source.proj_w
        self.add_places(source.attn_drop)
        self.proj = source.proj
        self.proj_drop = source.proj_drop

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.qkv(x), 3).unbind(0)
        return self.proj_drop(self.proj(self.attend(q * self.scale, k, v)))

    def mix_logits(self, logits: Tensor) -> Tensor:
        return _over_heads(self.proj_l, logits)

    def mix_probabilities(self, attention: Tensor) -> Tensor:
        return _over_heads(self.proj_w, attention)


def _over_heads(layer: nn.Module, maps: Tensor) -> Tensor:
    """A linear layer on the heads of ``(batch, heads, queries, keys)``, as rows of ``(batch, queries * keys, heads)``.
    """
    mixed = layer(maps.flatten(2).transpose(1, 2))
    return mixed.transpose(1, 2).unflatten(2, maps.shape[2:])


class ExplicitClassAttention(ExplicitAttention):
    """``ClassAttn``, written out: ``(batch, tokens, dim)`` to the class token's ``(batch, 1, dim)``."""

    def __init__(self, source: ClassAttn):
        super().__init__(source)
        self.scale = source.scale
        self.q, self.k, self.v = source.q, source.k, source.v
        self.add_places(source.attn_drop)
        self.proj = source.proj
        self.proj_drop = source.proj_drop

    def forward(self, x: Tensor) -> Tensor:
        (q,), (k,), (v,) = self.heads(self.q(x[:, :1])), self.heads(self.k(x)), self.heads(self.v(x))
        return self.proj_drop(self.proj(self.attend(q * self.scale, k, v)))


def _layouts(model: Cait) -> tuple[AttentionLayout, ...]:
    embedding: Any = model.patch_embed
    grid = tuple(embedding.grid_size)
    whole, pooled = AttentionLayout(grid=grid), AttentionLayout(grid=grid, prefix=1, class_token=True, pooling=1)
    return (*[whole] * len(model.blocks), *[pooled] * len(model.blocks_token_only))


CAIT = Family(
    name="CaiT",
    examples={"cait_xxs24_224": dict(SMALL, depth_token_only=1)},
    models=(Cait,),
    attention={TalkingHeadAttn: ExplicitTalkingHeads, ClassAttn: ExplicitClassAttention},
    blocks=(LayerScaleBlock,),
    places=block_places,
    other_places=(LayerScaleBlockClassAttn,),
    layouts=_layouts,
    prefix=lambda model: 0,
    whole_grid="it has no place behind its position embedding where tokens could be left out",
    tail="a class token that the blocks do not have joins behind them",
)
