"""Hugging Face transformers' DeiT (``DeiTForImageClassification``, ``DeiTForImageClassificationWithTeacher``,
``DeiTModel``).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.models.deit.modeling_deit import DeiTAttention
from transformers.models.deit.modeling_deit import DeiTForImageClassification
from transformers.models.deit.modeling_deit import DeiTForImageClassificationWithTeacher
from transformers.models.deit.modeling_deit import DeiTLayer
from transformers.models.deit.modeling_deit import DeiTMLP
from transformers.models.deit.modeling_deit import DeiTModel

from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.hf_common import SMALL
from maskaq_brevitas.models.hf_common import ExplicitHFAttention
from maskaq_brevitas.models.hf_common import class_features
from maskaq_brevitas.models.hf_common import hf_places
from maskaq_brevitas.models.hf_common import hf_traits
from maskaq_brevitas.models.hf_common import timm_mlp

__all__ = ["FAMILY"]

def _head(model: Any) -> Callable[[Tensor], Tensor] | None:
    """The class token; with two classifiers the mean of what they read, as timm's distilled DeiT has it."""
    if not hasattr(model, "distillation_classifier"):
        return class_features(model)
    return lambda tokens: model.base_model.layernorm(tokens)[:, :2].mean(dim=1)


FAMILY = Family(
    name="transformers DeiT",
    examples={
        "transformers:DeiTForImageClassification": SMALL,
        "transformers:DeiTForImageClassificationWithTeacher": SMALL,
        "transformers:DeiTModel": SMALL,
    },
    attention={DeiTAttention: ExplicitHFAttention},
    blocks=(DeiTLayer,),
    places=hf_places("layernorm_before", "layernorm_after"),
    rewrites={DeiTMLP: timm_mlp},
    head=_head,
    **hf_traits(
        DeiTForImageClassification, DeiTForImageClassificationWithTeacher, without_classes=(DeiTModel,), prefix=2
    ),
)
