"""Hugging Face transformers' ViT (``ViTForImageClassification``, ``ViTModel``)."""

from transformers.models.vit.modeling_vit import ViTAttention
from transformers.models.vit.modeling_vit import ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTLayer
from transformers.models.vit.modeling_vit import ViTMLP
from transformers.models.vit.modeling_vit import ViTModel

from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.hf_common import SMALL
from maskaq_brevitas.models.hf_common import ExplicitHFAttention
from maskaq_brevitas.models.hf_common import class_features
from maskaq_brevitas.models.hf_common import hf_places
from maskaq_brevitas.models.hf_common import hf_traits
from maskaq_brevitas.models.hf_common import timm_mlp

__all__ = ["FAMILY"]

FAMILY = Family(
    name="transformers ViT",
    examples={"transformers:ViTForImageClassification": SMALL, "transformers:ViTModel": SMALL},
    attention={ViTAttention: ExplicitHFAttention},
    blocks=(ViTLayer,),
    places=hf_places("layernorm_before", "layernorm_after"),
    rewrites={ViTMLP: timm_mlp},
    head=class_features,
    # As Google's checkpoints, and as ViTImageProcessor if nothing else is said.
    **hf_traits(
        ViTForImageClassification, without_classes=(ViTModel,), prefix=1,
        data=dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    ),
)
