"""A backbone inside a larger model, seen as a network from images to one tensor, and put back."""

import copy

import pytest
import timm
import torch
from larger_models import Segmenter
from larger_models import TokenReader
from larger_models import detector
from larger_models import drawn
from small_models import build
from torch import nn

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.backbone import HostedBackbone
from maskaq_brevitas.models.backbone import tensors_in
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.models.token_choice import why_all_tokens


def noise(*shape, seed=1):
    return torch.randn(*(shape or (4, 3, 32, 32)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ("vit", "swin", "swin_v2"))
def test_features_are_all_maps_of_the_backbone_at_the_same_power(name):
    model = drawn(lambda: Segmenter(name))
    maps = model.encoder(noise())
    if name == "vit":  # as tokens
        maps = [part.flatten(2).transpose(1, 2) for part in maps]
    maps = [part.flatten(1) for part in maps]
    found = HostedBackbone(model, "encoder").network(noise()).split([part.shape[1] for part in maps], dim=1)
    for part, wanted in zip(found, maps, strict=True):
        scale = float((part * wanted).sum() / wanted.square().sum())
        torch.testing.assert_close(part, wanted * scale)
        assert float(part.square().sum(dim=1).mean()) == pytest.approx(
            1, abs=0.3
        )  # other noise than it was measured on


def test_a_vit_without_classifier_gives_its_tokens_and_what_it_pools_from_them():
    model = drawn(TokenReader)
    network = HostedBackbone(model, "trunk").network
    tokens = model.trunk.forward_features(noise())
    found = network(noise()).split([tokens.flatten(1).shape[1], 32], dim=1)
    for part, wanted in zip(found, (tokens.flatten(1), model.trunk(noise())), strict=True):
        torch.testing.assert_close(part / part.norm(), wanted / wanted.norm())
    assert network.num_classes == read_geometry(network).num_classes == 0 and why_all_tokens(network) == ""


def test_a_backbone_with_a_classifier_gives_its_logits():
    options = dict(img_size=32, depth=1, num_classes=5)
    model = drawn(lambda: nn.Sequential(nn.Identity(), timm.create_model("vit_tiny_patch16_224", **options)))
    hosted = HostedBackbone(model, "1")
    assert torch.equal(hosted.network(noise()), model[1](noise())) and read_geometry(hosted.network).num_classes == 5
    assert not list(hosted.layers_outside())


def test_the_network_is_the_backbone_itself_and_the_larger_model_is_not_changed():
    model = drawn(lambda: Segmenter("vit"))
    before, attributes = copy.deepcopy(model.state_dict()), set(vars(model.encoder.model))
    model.encoder.train()
    hosted = HostedBackbone(model, "encoder")
    assert hosted.network.blocks is model.encoder.model.blocks and hosted.trunk_name == "encoder.model"
    assert (
        type(model.encoder.model) is timm.models.VisionTransformer
        and type(hosted.network).__name__ == "VisionTransformer"
    )
    assert model.encoder.model.training and set(vars(model.encoder.model)) == attributes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ("vit", "swin", "swin_v2"))
def test_what_is_hosted_is_one_with_the_larger_model_that_hosts_it(name):
    model = drawn(lambda: Segmenter(name))
    hosted = HostedBackbone(model, "encoder")
    network = copy.deepcopy(hosted.network)
    larger = hosted.host(network)
    assert type(larger.encoder) is type(model.encoder) and torch.equal(larger(noise()), model(noise()))
    shared = {id(parameter) for parameter in model.parameters()} & {id(parameter) for parameter in larger.parameters()}
    assert not shared and hosted.network_of(larger)(noise()).equal(network(noise()))
    first = next(next(network.children()).parameters())
    first.data += 1
    assert not torch.equal(larger(noise()), model(noise()))
    network._modules = copy.deepcopy(hosted.network)._modules  # as a calibrator does when it chooses other widths
    assert torch.equal(larger(noise()), model(noise()))


def test_a_backbone_under_two_names_is_replaced_under_both():
    model = drawn(lambda: Segmenter("vit"))
    model.also = nn.ModuleList([model.encoder])
    larger = HostedBackbone(model, "encoder").host(copy.deepcopy(HostedBackbone(model, "encoder").network))
    assert larger.also[0] is larger.encoder and larger.encoder is not model.encoder


@pytest.mark.parametrize("name", ("swin", "swin_v2"))
def test_stages_of_a_feature_extractor_lie_on_the_image_as_those_of_the_classifier(name):
    geometry = read_geometry(HostedBackbone(drawn(lambda: Segmenter(name)), "encoder").network)
    options = dict(img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2))
    kind = "swin_tiny_patch4_window7_224" if name == "swin" else "swinv2_tiny_window8_256"
    assert geometry.layouts == read_geometry(timm.create_model(kind, **options)).layouts != ()
    assert (geometry.input_size, geometry.grid, geometry.num_classes) == ((3, 32, 32), (8, 8), 0)


def test_geometry_of_other_channels_and_sides():
    geometry = read_geometry(HostedBackbone(drawn(lambda: Segmenter("vit_pair")), "encoder").network)
    assert geometry.input_size == (5, 16, 32) and geometry.grid == (2, 4) and len(geometry.mean) == 5


def test_layers_outside_are_named():
    hosted = HostedBackbone(detector("retina"), "backbone.body")
    outside = [(name, type(layer).__name__) for name, layer in hosted.layers_outside()]
    assert ("backbone.fpn.inner_blocks.0.0", "Conv2d") in outside and len(outside) == 14
    assert not [name for name, _ in outside if name.startswith("backbone.body")]


def test_tensors_in():
    one, two = torch.ones(1), torch.zeros(2)
    assert [len(part) for part in tensors_in({"a": one, "b": (None, [two, torch.arange(3)]), "c": "text"})] == [1, 2]


class Mobile(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = timm.create_model("mobilevit_xxs", num_classes=0)


@pytest.mark.parametrize(
    ("larger", "name", "message"),
    (
        (lambda: Segmenter("vit"), "nothing", r"Segmenter has no module 'nothing'. Backbones in it: encoder\."),
        (lambda: Segmenter("vit"), "", r"has no module ''"),
        (lambda: Segmenter("swin"), "head", r"'head' of Segmenter: .*has no attention.*Backbones in it: encoder\."),
        (
            lambda: detector("retina"),
            "backbone",
            r"of RetinaNet is Pyramid; expected .* Backbones in it: backbone.body\.",
        ),
        (lambda: Segmenter("vit"), "encoder.model", r"is VisionTransformer; expected .* Backbones in it: encoder\."),
        (
            lambda: nn.ModuleDict({"vit": build("hf_deit")}),
            "vit",
            r"'vit' is DeiTForImageClassificationWithTeacher, a whole classifier.*made of: vit.deit\.",
        ),
        (Mobile, "body", r"'body' of Mobile: .*MobileViT: its attention sees every n-th pixel.*Backbones in it: none"),
    ),
)
def test_what_is_no_backbone_is_refused(larger, name, message):
    with pytest.raises(ModelError, match=message):
        HostedBackbone(drawn(larger), name)


def test_a_quant_model_of_another_shape_is_refused():
    hosted = HostedBackbone(drawn(lambda: Segmenter("vit")), "encoder")
    with pytest.raises(
        ModelError, match="Expected VisionTransformer at 'encoder.model' of Segmenter.*got no such module"
    ):
        hosted.network_of(drawn(lambda: Segmenter("swin")))
