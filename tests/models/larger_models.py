"""Small models for other tasks than classification, on backbones of timm or transformers, with all parameters drawn at
random.
"""

from collections import OrderedDict

import timm
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops import MultiScaleRoIAlign

_VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
_SWIN = dict(img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2))
#: Name -> timm model, its arguments, and the channels of its feature maps.
ENCODERS = {
    "vit": ("vit_tiny_patch16_224", dict(_VIT, features_only=True, out_indices=(0, 1)), (32, 32)),
    "vit_pair": (
        "vit_tiny_patch16_224",
        dict(_VIT, depth=1, img_size=(16, 32), in_chans=5, features_only=True, out_indices=(0,)),
        (32,)
    ),
    "swin": ("swin_tiny_patch4_window7_224", dict(_SWIN, features_only=True, out_indices=(0, 1)), (16, 32)),
    "swin_v2": (
        "swinv2_tiny_window8_256", dict(_SWIN, features_only=True, out_indices=(0, 1), feature_cls="getter"), (16, 32)
    ),
}  # fmt: skip


class Segmenter(nn.Module):
    """An encoder, and a head of one convolution for each of its feature maps: to logits of each pixel."""

    def __init__(self, name: str):
        super().__init__()
        model, options, channels = ENCODERS[name]
        self.encoder = timm.create_model(model, **options)
        self.head = nn.ModuleList([nn.Conv2d(count, 4, 1) for count in channels])

    def forward(self, images):
        maps = self.encoder(images)
        if getattr(self.encoder, "output_fmt", "NCHW") == "NHWC":
            maps = [part.permute(0, 3, 1, 2) for part in maps]
        return sum(
            F.interpolate(layer(part), size=images.shape[2:]) for layer, part in zip(self.head, maps, strict=True)
        )


class TokenReader(nn.Module):
    """Reads the patch tokens of a ViT without classifier, as many models for dense tasks do."""

    def __init__(self):
        super().__init__()
        self.trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, **_VIT)
        self.head = nn.Linear(32, 4)

    def forward(self, images):
        return self.head(self.trunk.forward_features(images)[:, self.trunk.num_prefix_tokens :])


class Pyramid(nn.Module):
    """torchvision's feature pyramid on a Swin Transformer of timm's."""

    def __init__(self):
        super().__init__()
        self.body = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, out_indices=(0, 1), **_SWIN)
        self.fpn = FeaturePyramidNetwork([16, 32], 16)
        self.out_channels = 16

    def forward(self, images):
        return self.fpn(
            OrderedDict((str(index), part.permute(0, 3, 1, 2)) for index, part in enumerate(self.body(images)))
        )


def detector(kind: str) -> nn.Module:
    """``"faster_rcnn"`` or ``"retina"`` of torchvision, 32 x 32 pixels, three classes, no detection left out by its
    score.
    """
    anchors = AnchorGenerator(sizes=((8,), (16,)), aspect_ratios=((1.0,),) * 2)
    sides = dict(min_size=32, max_size=32, fixed_size=(32, 32), num_classes=3)
    if kind == "retina":
        return drawn(lambda: RetinaNet(Pyramid(), anchor_generator=anchors, score_thresh=0.0, **sides))
    pool = MultiScaleRoIAlign(["0", "1"], 4, 2)
    return drawn(
        lambda: FasterRCNN(Pyramid(), rpn_anchor_generator=anchors, box_roi_pool=pool, box_score_thresh=0.0, **sides)
    )


def transformers_model(kind: str, *, depths: tuple[int, ...] = (2, 2, 1, 1), image_size: int = 32) -> nn.Module:
    """``"upernet_swin"`` (segmentation), ``"mask2former_swin"`` (instances) or ``"depth_anything"`` (on DINOv2) of
    transformers, square images of 32 pixels.

    Args:
        depths, image_size: of Swin, whose windows are 3 x 3 patches of 4 x 4.
    """
    swin = transformers.SwinConfig(
        image_size=image_size, patch_size=4, window_size=3, embed_dim=16, depths=depths, num_heads=[2] * len(depths),
        out_indices=list(range(1, len(depths) + 1)),
    )  # fmt: skip
    if kind == "upernet_swin":
        options = dict(hidden_size=16, pool_scales=[1, 2], num_labels=4, use_auxiliary_head=False)
        return drawn(
            lambda: transformers.UperNetForSemanticSegmentation(
                transformers.UperNetConfig(backbone_config=swin, **options)
            )
        )
    if kind == "mask2former_swin":
        options = dict(
            hidden_dim=32, feature_size=32, mask_feature_size=32, num_attention_heads=2, encoder_layers=1,
            decoder_layers=2, encoder_feedforward_dim=32, dim_feedforward=32, num_queries=5, num_labels=3,
        )  # fmt: skip
        return drawn(
            lambda: transformers.Mask2FormerForUniversalSegmentation(
                transformers.Mask2FormerConfig(backbone_config=swin, **options)
            )
        )
    dinov2 = transformers.Dinov2Config(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2,
        out_indices=[1, 2], reshape_hidden_states=False,
    )  # fmt: skip
    options = dict(
        patch_size=8, reassemble_hidden_size=32, reassemble_factors=[2, 1], neck_hidden_sizes=[8, 16],
        fusion_hidden_size=16, head_hidden_size=8,
    )  # fmt: skip
    return drawn(
        lambda: transformers.DepthAnythingForDepthEstimation(
            transformers.DepthAnythingConfig(backbone_config=dinov2, **options)
        )
    )


def drawn(build) -> nn.Module:
    """What ``build`` gives, with all parameters drawn at random from a fixed seed, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)
