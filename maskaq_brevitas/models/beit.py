"""timm's BEiT: a ViT with a relative position bias, in each block or shared by all."""

from __future__ import annotations

from timm.models.beit import Attention
from timm.models.beit import Beit
from timm.models.beit import Block
from timm.models.beit import RelativePositionBias
from torch import Tensor

from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.attention import joined_linear
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import block_places
from maskaq_brevitas.models.vit import SMALL

__all__ = ["BEIT", "ExplicitBeitAttention"]


class ExplicitBeitAttention(ExplicitAttention):
    """BEiT's ``Attention``, written out: ``(batch, tokens, dim)`` to the same."""

    relative_position_index: Tensor

    def __init__(self, source: Attention):
        super().__init__(source)
        self.scale = source.scale
        self.relative_position_bias_table = source.relative_position_bias_table
        self.register_buffer("relative_position_index", source.relative_position_index, persistent=False)
        self.qkv = source.qkv
        if source.q_bias is not None:
            self.qkv = joined_linear(source.qkv.weight, source.q_bias, source.get_buffer("k_bias"), source.v_bias)
        self.add_places(source.attn_drop)
        self.proj = source.proj
        self.proj_drop = source.proj_drop

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(self.qkv(x), 3).unbind(0)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            # (tokens, tokens, heads) -> (heads, tokens, tokens)
            own = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
            bias = own if bias is None else own + bias
        return self.proj_drop(self.proj(self.attend(q * self.scale, k, v, bias)))


BEIT = Family(
    name="BEiT",
    examples={"beit_base_patch16_224": SMALL},
    models=(Beit,),
    attention={Attention: ExplicitBeitAttention},
    blocks=(Block,),
    places=block_places,
    tables=(RelativePositionBias,),
    whole_grid="its relative position bias is of the whole grid",
)
