import pytest
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.geometry import read_geometry


def build(**options):
    return VisionTransformer(
        **{**dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5), **options}
    )


@pytest.mark.parametrize(
    ("options", "grid", "prefix", "class_token"),
    (
        ({}, (4, 4), 1, True),
        ({"patch_size": 4}, (8, 8), 1, True),
        ({"patch_size": 16}, (2, 2), 1, True),
        ({"img_size": (32, 64)}, (4, 8), 1, True),
        ({"reg_tokens": 4}, (4, 4), 5, True),
        ({"class_token": False, "global_pool": "avg"}, (4, 4), 0, False),
        ({"class_token": False, "reg_tokens": 2, "global_pool": "avg"}, (4, 4), 2, False),
        ({"global_pool": "avg"}, (4, 4), 1, True),
    ),
)
def test_layout_is_what_the_tokens_say(options, grid, prefix, class_token):
    model = build(**options)
    geometry = read_geometry(model)
    assert (geometry.grid, geometry.prefix_tokens, geometry.class_token) == (grid, prefix, class_token)
    assert geometry.num_classes == 5 and geometry.input_size == (3, 32, options.get("img_size", (0, 32))[1])
    tokens = model.forward_features(torch.zeros(1, *geometry.input_size)).shape[1]
    assert tokens == geometry.prefix_tokens + geometry.patches


def test_distilled_model_has_two_prefix_tokens():
    geometry = read_geometry(timm.create_model("deit_tiny_distilled_patch16_224", img_size=48, depth=1))
    assert (geometry.prefix_tokens, geometry.grid, geometry.class_token) == (2, (3, 3), True)
    assert geometry.mean == (0.485, 0.456, 0.406) and geometry.std == (0.229, 0.224, 0.225)


def test_no_classifier():
    assert read_geometry(build(num_classes=0)).num_classes == 0


def test_one_channel_gets_the_mean_of_the_configuration():
    model = build(in_chans=1)
    model.pretrained_cfg = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.3), "input_size": (3, 32, 32)}
    geometry = read_geometry(model)
    assert geometry.input_size == (1, 32, 32)
    assert geometry.mean == pytest.approx((0.4,)) and geometry.std == pytest.approx((0.2,))


def test_normalisation(tiny_vit):
    geometry = read_geometry(tiny_vit)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(geometry.normalize(pixels), pixels * 2 - 1)
    torch.testing.assert_close(geometry.denormalize(geometry.normalize(pixels)), pixels)
    low, high = geometry.bounds(pixels)
    assert low.shape == high.shape == (3, 1, 1) and (low == -1).all() and (high == 1).all()


def test_models_without_what_is_needed():
    with pytest.raises(ModelError, match="has no attention.*Expected a Vision Transformer"):
        read_geometry(timm.create_model("resnet10t"))
    model = build()
    model.patch_embed = torch.nn.Identity()
    with pytest.raises(ModelError, match="no patch_embed.grid_size to read the patch grid from"):
        read_geometry(model)
    with pytest.raises(ModelError, match="its attention .*MultiScaleAttention.* is of a family that is not registered"):
        read_geometry(timm.create_model("mvitv2_tiny", img_size=64))


@pytest.mark.parametrize("name", ("swin3d_t", "mvit_v1_b"))
def test_video_models_are_refused_by_name(name):
    model = getattr(torchvision.models.video, name)()
    with pytest.raises(
        ModelError, match=rf"{type(model).__name__} cannot be quantized: its attention \(.*\) .* not registered"
    ):
        read_geometry(model)
