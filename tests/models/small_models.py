"""Small models of many architectures, with all parameters drawn at random."""

import functools

import timm
import torch

from maskaq_brevitas.models.families import known_families

VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
SWIN = dict(img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), num_classes=5)
PYRAMID = dict(embed_dims=(16, 32), depths=(1, 2), num_heads=(1, 2), mlp_ratios=(2, 2), num_classes=5)

TORCHVISION = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
WINDOWS = dict(patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 2], num_classes=5)
HF = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=5)
HF_SWIN = dict(patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), num_labels=5)

#: Name -> timm model or example of a family, arguments.
MODELS = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit_wide": ("vit_tiny_patch16_224", dict(VIT, img_size=(16, 48), in_chans=5)),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "deit3": ("deit3_small_patch16_224", VIT),
    "registers": ("vit_small_patch14_reg4_dinov2", dict(VIT, num_classes=0)),
    "map": ("vit_so150m_patch16_reg4_map_256", VIT),
    "siglip": ("vit_base_patch16_siglip_224", dict(VIT, num_classes=0)),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swin_padded": ("swin_tiny_patch4_window7_224", dict(SWIN, img_size=(36, 28), window_size=3, in_chans=1)),
    "swin_always": ("swin_tiny_patch4_window7_224", dict(SWIN, always_partition=True, strict_img_size=False)),
    "swin_v2": ("swinv2_tiny_window8_256", SWIN),
    "beit": ("beit_base_patch16_224", VIT),
    "beit_shared": (
        "beit_base_patch16_224", dict(VIT, use_rel_pos_bias=False, use_shared_rel_pos_bias=True, qkv_bias=False)
    ),
    "eva": ("eva_giant_patch14_224", dict(VIT, mlp_ratio=2)),
    "eva02": ("eva02_tiny_patch14_224", VIT),
    "eva02_normed": ("eva02_base_patch14_224", VIT),
    "eva_grouped": (
        "eva02_tiny_patch14_224", dict(VIT, num_heads=4, attn_type="rope", num_kv_heads=2, qkv_fused=False)
    ),
    "eva_postnorm": ("eva02_tiny_patch14_224", dict(VIT, use_post_norm=True)),
    "dinov3": ("vit_small_patch16_dinov3", dict(VIT, num_classes=0)),
    "cait": ("cait_xxs24_224", dict(VIT, depth_token_only=1)),
    "twins": ("twins_svt_small", dict(PYRAMID, img_size=(32, 40), sr_ratios=(2, 1), wss=(3, 2))),
    "pvt": ("pvt_v2_b0", dict(PYRAMID, sr_ratios=(2, 1), pretrained_cfg_overlay=dict(input_size=(3, 32, 48)))),
    "pvt_linear": (
        "pvt_v2_b2_li", dict(PYRAMID, sr_ratios=(2, 1), pretrained_cfg_overlay=dict(input_size=(3, 32, 32)))
    ),
    "tiny_vit": (
        "tiny_vit_5m_224",
        dict(
            embed_dims=(16, 32, 32), depths=(1, 1, 1), num_heads=(1, 2, 2), window_sizes=(4, 3, 4), num_classes=5,
            pretrained_cfg_overlay=dict(input_size=(3, 40, 32)),
        ),
    ),
    "tv_vit": ("torchvision:vit_b_16", dict(TORCHVISION, representation_size=24)),
    "tv_swin": ("torchvision:swin_t", dict(WINDOWS, img_size=(32, 32), window_size=[4, 4])),
    "tv_swin_padded": ("torchvision:swin_t", dict(WINDOWS, img_size=(36, 28), window_size=[3, 5])),
    "tv_swin_v2": ("torchvision:swin_v2_t", dict(WINDOWS, img_size=(36, 28), window_size=[4, 4])),
    "hf_vit": (
        "transformers:ViTForImageClassification",
        dict(HF, image_size=(16, 48), num_channels=5, hidden_act="relu", qkv_bias=False),
    ),
    "hf_deit": ("transformers:DeiTForImageClassificationWithTeacher", HF),
    "hf_dinov2": ("transformers:Dinov2ForImageClassification", dict(HF, num_labels=0, attn_implementation="eager")),
    "hf_dinov2_swiglu": ("transformers:Dinov2ForImageClassification", dict(HF, use_swiglu_ffn=True)),
    "hf_swin": ("transformers:SwinForImageClassification", dict(HF_SWIN, image_size=32, window_size=4)),
    "hf_swin_padded": ("transformers:SwinForImageClassification", dict(HF_SWIN, image_size=(36, 28), window_size=3)),
    "hf_vit_features": ("transformers:ViTModel", dict(HF, pooler_act="gelu")),
    "hf_dinov2_maps": ("transformers:Dinov2Backbone", dict(HF, out_indices=[0, 2])),
    "hf_dinov2_tokens": (
        "transformers:Dinov2Backbone", dict(HF, out_indices=[1, 2], reshape_hidden_states=False, apply_layernorm=False)
    ),
    "hf_swin_features": ("transformers:SwinModel", dict(HF_SWIN, image_size=32, window_size=4)),
    "hf_swin_maps": (  # windows of 5 x 5 on grids of 9 x 7 and 5 x 4, shifted on both
        "transformers:SwinBackbone", dict(HF_SWIN, image_size=(36, 28), window_size=5, out_indices=[0, 1, 2])
    ),
}  # fmt: skip


@functools.cache
def build(name):
    """One of :data:`MODELS`; shared by the tests, so copy it before changing it."""
    example, options = MODELS[name]
    creators = {known: family.create for family in known_families(optional=":" in example) for known in family.examples}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = creators.get(example, timm.create_model)(example, **options)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)
