"""timm's Swin Transformer: attention inside shifted windows with a relative position bias, four grids of tokens."""

from __future__ import annotations

from typing import Any
from typing import cast

from timm.models.swin_transformer import PatchMerging
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer import WindowAttention
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.family import ChannelPlace
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import attention_place
from maskaq_brevitas.models.family import has_affine
from maskaq_brevitas.models.family import mlp_places
from maskaq_brevitas.models.layout import AttentionLayout

__all__ = ["SWIN", "ExplicitWindowAttention", "WINDOWS_NEED_ALL", "merging_passages", "window_layouts"]

WINDOWS_NEED_ALL = "its windows and the merging of neighbouring patches need the whole grid"


class ExplicitWindowAttention(ExplicitAttention):
    """Swin's ``WindowAttention``, written out: ``(batch * windows, tokens, dim)`` to the same.

    The bias is looked up in its table in every pass, so the table can be trained.
    """

    relative_position_index: Tensor

    def __init__(self, source: WindowAttention):
        super().__init__(source)
        self.scale = source.scale
        self.window_area: int = source.window_area
        self.relative_position_bias_table = source.relative_position_bias_table
        self.register_buffer("relative_position_index", source.get_buffer("relative_position_index"), persistent=False)
        self.qkv = source.qkv
        self.add_places(source.attn_drop)
        self.proj = source.proj
        self.proj_drop = source.proj_drop

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(self.qkv(x), 3).unbind(0)
        x = self.attend(q * self.scale, k, v, window_bias(self.position_bias(), mask))
        return self.proj_drop(self.proj(x))

    def position_bias(self) -> Tensor:
        """``(heads, tokens, tokens)``."""
        return table_bias(self.relative_position_bias_table, self.relative_position_index, self.window_area)


class FlatPatchMerging(nn.Module):
    """Swin's ``PatchMerging``: ``(batch, rows, columns, channels)`` to half of both, its linear layer on three axes.

    Brevitas' bias correction and GPTQ compute wrong shapes for a Linear with inputs of four dimensions (0.13.4).
    """

    def __init__(self, source: PatchMerging):
        super().__init__()
        self.norm = source.norm
        self.reduction = source.reduction
        self.training = source.training

    def forward(self, x: Tensor) -> Tensor:
        merged, rows, columns = merged_patches(x)
        return self.reduction(self.norm(merged)).unflatten(1, (rows, columns))


def merged_patches(x: Tensor) -> tuple[Tensor, int, int]:
    """The channels of two by two patches in one token, ``(batch, tokens, 4 * channels)``, and the rows and columns."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    x = x.reshape(batch, rows, 2, columns, 2, channels).permute(0, 1, 3, 4, 2, 5)
    return x.reshape(batch, rows * columns, 4 * channels), rows, columns


def table_bias(table: Tensor, index: Tensor, tokens: int) -> Tensor:
    """The bias of each pair of the ``tokens`` in a window, ``(heads, tokens, tokens)``.

    Args:
        table: ``(distances, heads)``.
        index: of the distance of each pair, tokens * tokens of them in any shape.
    """
    return table[index.flatten()].unflatten(0, (tokens, tokens)).permute(2, 0, 1)


def window_bias(position: Tensor, mask: Tensor | None) -> Tensor:
    """Bias of the logits: ``(heads, tokens, tokens)``, or with masks of windows ``(windows, heads, tokens, tokens)``.
    """
    return position if mask is None else position.unsqueeze(0) + mask.unsqueeze(1)


def window_layouts(model: nn.Module) -> tuple[AttentionLayout, ...]:
    """Of each block, Swin or Swin V2."""
    blocks = [block for _, stage in _stages(model) for block in stage.blocks]
    return tuple(
        AttentionLayout(
            grid=tuple(block.input_resolution), window=tuple(block.window_size), shift=tuple(block.shift_size)
        )
        for block in blocks
    )


def merging_passages(model: nn.Module) -> dict[str, str]:
    """The first block of each stage, and the patch merging in front of it."""
    return {
        f"{name}.blocks.0": f"{name}.downsample"
        for name, stage in _stages(model)
        if not isinstance(stage.downsample, nn.Identity)
    }


def _stages(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and modules of the stages; timm's feature extractors hold them under other names than its classifiers."""
    return [
        (name, part) for name, part in model.named_modules() if hasattr(part, "blocks") and hasattr(part, "downsample")
    ]


def _places(name: str, module: nn.Module) -> list[ChannelPlace]:
    if not isinstance(module, SwinTransformerBlock):
        reduction = (f"{name}.reduction",)
        return [ChannelPlace(f"{name}.norm", None, reduction)] if has_affine(module.norm) else []
    grid = cast(tuple[int, int], module.input_resolution)
    fits = all(side % part == 0 for side, part in zip(grid, module.window_size, strict=True))
    # Windows that do not fit are filled up with zeros behind the LayerNorm, and a shifted channel's zero is another.
    return [*(attention_place(name, module) if fits else []), *mlp_places(name, module)]


SWIN = Family(
    name="Swin",
    examples={
        "swin_tiny_patch4_window7_224": dict(
            img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2), num_classes=10
        )
    },  # fmt: skip
    models=(SwinTransformer,),
    attention={WindowAttention: ExplicitWindowAttention},
    blocks=(SwinTransformerBlock,),
    places=_places,
    other_places=(PatchMerging, FlatPatchMerging),
    rewrites={PatchMerging: FlatPatchMerging},
    layouts=window_layouts,
    passages=merging_passages,
    whole_grid=WINDOWS_NEED_ALL,
)
