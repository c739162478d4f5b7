"""digits_vit, the shipped model of timm's class, as a model of torchvision and of transformers: the same weights."""

import re

import torchvision.models
from transformers import ViTConfig
from transformers import ViTForImageClassification

_TORCHVISION = {
    "^cls_token": "class_token", "^pos_embed": "encoder.pos_embedding", r"^patch_embed\.proj": "conv_proj",
    r"^norm\.": "encoder.ln.", r"^head\.": "heads.head.", r"^blocks\.": "encoder.layers.encoder_layer_",
    "norm1": "ln_1", "norm2": "ln_2", r"attn\.qkv\.": "self_attention.in_proj_",
    r"attn\.proj": "self_attention.out_proj",
    "fc1": "0", "fc2": "3",
}  # fmt: skip
_TRANSFORMERS = {
    "^cls_token": "vit.embeddings.cls_token", "^pos_embed": "vit.embeddings.position_embeddings",
    r"^patch_embed\.proj": "vit.embeddings.patch_embeddings.projection", r"^norm\.": "vit.layernorm.",
    r"^head\.": "classifier.", r"^blocks\.": "vit.layers.", "norm1": "layernorm_before", "norm2": "layernorm_after",
    r"attn\.proj": "attention.o_proj", r"attn\.(.)\.": r"attention.\1_proj.",
}  # fmt: skip


def as_torchvision(digits_vit):
    """The same function as torchvision's ``VisionTransformer``."""
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=4, num_layers=6, num_heads=3, hidden_dim=96, mlp_dim=288, num_classes=10
    )
    return _loaded(model, digits_vit.state_dict(), _TORCHVISION, digits_vit)


def as_transformers(digits_vit):
    """The same function as transformers' ``ViTForImageClassification``."""
    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=96, num_hidden_layers=6, num_attention_heads=3, intermediate_size=288,
        layer_norm_eps=1e-6, num_labels=10,
    )  # fmt: skip
    weights = {}
    for name, value in digits_vit.state_dict().items():
        if ".qkv." in name:
            weights |= {name.replace("qkv", letter): part for letter, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            weights[name] = value
    return _loaded(ViTForImageClassification(config), weights, _TRANSFORMERS, digits_vit)


def _loaded(model, weights, names, digits_vit):
    renamed = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = re.sub(old, new, name)
        renamed[name] = value
    model.load_state_dict(renamed)
    model.pretrained_cfg = {key: digits_vit.pretrained_cfg[key] for key in ("mean", "std", "crop_pct")}
    return model.eval()
