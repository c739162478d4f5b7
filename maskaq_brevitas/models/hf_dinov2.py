"""Hugging Face transformers' DINOv2 (``Dinov2ForImageClassification``, ``Dinov2Model``, ``Dinov2Backbone``)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention
from transformers.models.dinov2.modeling_dinov2 import Dinov2Backbone
from transformers.models.dinov2.modeling_dinov2 import Dinov2ForImageClassification
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
from transformers.models.dinov2.modeling_dinov2 import Dinov2MLP
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2.modeling_dinov2 import Dinov2SwiGLUFFN

from maskaq_brevitas.models.family import ChannelPlace
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import has_affine
from maskaq_brevitas.models.hf_common import ExplicitHFAttention
from maskaq_brevitas.models.hf_common import class_features
from maskaq_brevitas.models.hf_common import hf_places
from maskaq_brevitas.models.hf_common import hf_traits
from maskaq_brevitas.models.hf_common import timm_mlp

__all__ = ["FAMILY"]


def _places(name: str, block: Any) -> list[ChannelPlace]:
    places = hf_places("norm1", "norm2")(name, block)
    if isinstance(block.mlp, Dinov2SwiGLUFFN) and has_affine(block.norm2):
        places.append(ChannelPlace(f"{name}.norm2", None, (f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")))
    return places


def _head(model: Any) -> Callable[[Tensor], Tensor] | None:
    """The class token; of a classifier also the mean of the patches."""
    if not isinstance(model, Dinov2ForImageClassification):
        return class_features(model)
    trunk: Any = model.base_model

    def features(tokens: Tensor) -> Tensor:
        tokens = trunk.layernorm(tokens)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)

    return features


def _whole_grid(model: Any) -> str:
    laid_out = isinstance(model, Dinov2Backbone) and model.config.reshape_hidden_states
    return "it lays its tokens out as maps of the whole grid" if laid_out else ""


_SMALL = dict(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, num_labels=10
)  # fmt: skip

FAMILY = Family(
    name="transformers DINOv2",
    examples={
        "transformers:Dinov2ForImageClassification": _SMALL,
        "transformers:Dinov2Model": _SMALL,
        "transformers:Dinov2Backbone": dict(_SMALL, num_hidden_layers=2, out_indices=[1, 2]),
    },
    attention={Dinov2Attention: ExplicitHFAttention},
    blocks=(Dinov2Layer,),
    places=_places,
    rewrites={Dinov2MLP: timm_mlp},
    whole_grid=_whole_grid,
    head=_head,
    **hf_traits(Dinov2ForImageClassification, without_classes=(Dinov2Model, Dinov2Backbone), prefix=1),
)
