"""timm's Swin Transformer V2: cosine attention inside shifted windows, positions from a small network, norms behind."""

from __future__ import annotations

import math

import torch
from timm.models.swin_transformer_v2 import PatchMerging
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.attention import joined_linear
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import mlp_places
from maskaq_brevitas.models.swin import WINDOWS_NEED_ALL
from maskaq_brevitas.models.swin import merged_patches
from maskaq_brevitas.models.swin import merging_passages
from maskaq_brevitas.models.swin import table_bias
from maskaq_brevitas.models.swin import window_bias
from maskaq_brevitas.models.swin import window_layouts

__all__ = ["SWIN_V2", "ExplicitCosineAttention"]


class ExplicitCosineAttention(ExplicitAttention):
    """Swin V2's ``WindowAttention``, written out: ``(batch * windows, tokens, dim)`` to the same.

    The position bias comes from a small network of coordinates alone; its output is computed once, and kept as a
    parameter.
    """

    def __init__(self, source: WindowAttention):
        super().__init__(source)
        self.logit_scale = source.logit_scale
        self.position_bias = nn.Parameter(_position_bias(source), requires_grad=source.proj.weight.requires_grad)
        self.qkv = source.qkv
        if source.q_bias is not None:
            self.qkv = joined_linear(source.qkv.weight, source.q_bias, source.get_buffer("k_bias"), source.v_bias)
        self.add_places(source.attn_drop)
        self.proj = source.proj
        self.proj_drop = source.proj_drop

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """Of each head, ``(heads, 1, 1)``."""
        return self.logit_scale.clamp(max=math.log(1.0 / 0.01)).exp()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(self.qkv(x), 3).unbind(0)
        q, k = F.normalize(q, dim=-1) * self.scale, F.normalize(k, dim=-1)
        return self.proj_drop(self.proj(self.attend(q, k, v, window_bias(self.position_bias, mask))))


@torch.no_grad()
def _position_bias(source: WindowAttention) -> Tensor:
    """``(heads, tokens, tokens)``."""
    table = source.cpb_mlp(source.relative_coords_table).view(-1, source.num_heads)
    area = source.window_size[0] * source.window_size[1]
    return 16 * torch.sigmoid(table_bias(table, source.get_buffer("relative_position_index"), area).contiguous())


class FlatPatchMerging(nn.Module):
    """Swin V2's ``PatchMerging``, its linear layer on ``(batch, tokens, channels)``; see that of Swin."""

    def __init__(self, source: PatchMerging):
        super().__init__()
        self.reduction = source.reduction
        self.norm = source.norm
        self.training = source.training

    def forward(self, x: Tensor) -> Tensor:
        merged, rows, columns = merged_patches(x)
        return self.norm(self.reduction(merged)).unflatten(1, (rows, columns))


SWIN_V2 = Family(
    name="Swin V2",
    examples={
        "swinv2_tiny_window8_256": dict(
            img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2), num_classes=10
        )
    },  # fmt: skip
    models=(SwinTransformerV2,),
    attention={WindowAttention: ExplicitCosineAttention},
    blocks=(SwinTransformerV2Block,),
    places=lambda name, block: mlp_places(name, block, norm=None),
    rewrites={PatchMerging: FlatPatchMerging},
    layouts=window_layouts,
    passages=merging_passages,
    whole_grid=WINDOWS_NEED_ALL,
)
