"""Every family: written out it computes the same, its channels can be moved, and nothing is left in float unnamed."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from brevitas.graph.calibrate import quantization_status_manager
from small_models import MODELS
from small_models import build
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models import families
from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.attention_tap import attention_tap
from maskaq_brevitas.models.families import FAMILIES
from maskaq_brevitas.models.families import attention_modules
from maskaq_brevitas.models.families import block_names
from maskaq_brevitas.models.families import channel_places
from maskaq_brevitas.models.families import family_of
from maskaq_brevitas.models.families import read_logits
from maskaq_brevitas.models.families import register_family
from maskaq_brevitas.models.families import write_out
from maskaq_brevitas.models.families import written_out
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import block_places
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.quant.cost import multiply_accumulates
from maskaq_brevitas.quant.swap import swap_layers

every_model = pytest.mark.parametrize("name", MODELS)


def images(model, count=2):
    size = read_geometry(model).input_size
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


@every_model
def test_explicit_form_and_twin_give_the_float_output(name):
    model = build(name)
    x = images(model)
    expected = read_logits(model, model(x))
    spread = float((expected[0] - expected[1]).abs().max())
    assert spread > 1e-3  # the two images are told apart, so a wrong attention would show
    written = copy.deepcopy(model)
    write_out(written)
    assert [key for key, _ in written_out(model)] == [key for key, _ in written.named_modules()]
    torch.testing.assert_close(written(x), expected, rtol=1e-5, atol=1e-5)
    twin, record = swap_layers(model, "w4a4")
    assert record.skipped == ()
    off = quantization_status_manager(twin, disable_act_quant=True, disable_weight_quant=True, is_training=False)
    with off:
        torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)
    macs = multiply_accumulates(model)
    assert sum(macs.get(place.name, 0) for place in record.places) >= 0.99 * macs[""]


@every_model
def test_taps_and_layouts_fit_the_model(name):
    model = build(name)
    geometry = read_geometry(model)
    names = attention_modules(model)
    with attention_tap(model, "probabilities") as record:
        model(images(model, 3))
        assert len(record.probabilities) == len(names)
        for layout, maps in zip(geometry.layouts, record.probabilities, strict=bool(geometry.layouts)):
            received = layout.received(maps, geometry.grid)
            assert received.shape == (3, geometry.patches) and torch.isfinite(received).all()
            assert len(maps) == 3 * layout.count and layout.among_patches(maps).shape[2] == layout.queries
        if not geometry.layouts:
            tokens = geometry.prefix_tokens + geometry.patches
            assert all(maps.shape[2:] == (tokens, tokens) for maps in record.probabilities)
    assert all(type(model.get_submodule(key)) is type(module) for key, module in names.items())


@every_model
def test_channels_can_be_moved_at_every_place(name):
    """Shifting and scaling a LayerNorm's channels is undone in the layers that are said to read them."""
    model = copy.deepcopy(build(name))
    write_out(model)
    x = images(model)
    expected, places = model(x), channel_places(model)
    assert places
    generator = torch.Generator().manual_seed(2)
    for place in places:
        layers = [model.get_submodule(consumer) for consumer in place.consumers]
        channels = layers[0].in_features
        ratio = torch.rand(channels, generator=generator) + 0.5
        shift = torch.randn(channels, generator=generator)
        if place.norm is not None:
            norm = model.get_submodule(place.norm)
            norm.bias.data, norm.weight.data = (norm.bias - shift) / ratio, norm.weight / ratio
        else:
            parent, _, child = place.slot.rpartition(".")
            assert type(model.get_submodule(place.slot)) is nn.Identity
            setattr(model.get_submodule(parent), child, _Moved(shift, ratio))
        for layer in layers:
            bias = F.linear(shift, layer.weight)
            layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias + bias)
            layer.weight = nn.Parameter(layer.weight * ratio)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


class _Moved(nn.Module):
    def __init__(self, shift, ratio):
        super().__init__()
        self.shift, self.ratio = shift, ratio

    def forward(self, x):
        return (x - self.shift) / self.ratio


def test_geometry_is_read_from_the_model():
    wide = read_geometry(build("vit_wide"))
    assert wide.input_size == (5, 16, 48) and wide.grid == (2, 6) and len(wide.mean) == 5
    padded = read_geometry(build("swin_padded"))
    assert padded.input_size == (1, 36, 28) and padded.grid == (9, 7) and not padded.class_token
    assert [layout.grid for layout in padded.layouts] == [(9, 7), (9, 7), (5, 4), (5, 4)]
    assert [layout.shift for layout in padded.layouts] == [(0, 0), (1, 1)] * 2
    assert read_geometry(build("pvt")).grid == (8, 12) and read_geometry(build("tiny_vit")).grid == (5, 4)
    cait = read_geometry(build("cait"))
    assert cait.prefix_tokens == 0 and not cait.class_token and cait.layouts[-1].pooling == 1
    assert read_geometry(build("registers")).num_classes == 0


def test_families_by_class_and_by_attention():
    assert family_of(build("swin")).name == "Swin" and family_of(nn.Linear(1, 1)) is None
    wrapped = nn.Sequential(build("beit"))
    assert family_of(wrapped).name == "BEiT"
    assert len(block_names(build("swin"))) == 4 and len(block_names(build("map"))) == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    (
        ("xcit_nano_12_p16_224", "XCiT: its attention runs over channels"),
        ("mobilevit_xxs", "MobileViT: its attention sees every n-th pixel"),
        ("mobilevitv2_050", "MobileViTv2: its linear attention has no map"),
        ("mvitv2_tiny", r"its attention \(MultiScaleAttention.*\) is of a family that is not registered.*Swin V2"),
    ),
)
def test_families_that_are_refused_by_name(name, reason):
    with pytest.raises(ModelError, match=reason):
        swap_layers(timm.create_model(name), "w8a8")


class _DoubledAttention(nn.Module):
    """An attention that no family knows: logits count twice."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, 2 * (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, is_causal=False):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attention = (qkv[0] @ qkv[1].transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((attention @ qkv[2]).transpose(1, 2).flatten(2))


class _ExplicitDoubled(ExplicitAttention):
    def __init__(self, source):
        super().__init__(source)
        self.scale, self.qkv = source.scale, source.qkv
        self.add_places()
        self.proj = source.proj

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.heads(self.qkv(x), 3).unbind(0)
        return self.proj(self.attend(q * self.scale, k, v))


def test_a_family_is_added_by_one_registration(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", list(FAMILIES))
    monkeypatch.setattr(families, "EXPLICIT_FORMS", dict(families.EXPLICIT_FORMS))
    model = copy.deepcopy(build("vit"))
    for block in model.blocks:
        block.attn = _DoubledAttention(32, 2)
    with pytest.raises(ModelError, match="its attention .*_DoubledAttention"):
        swap_layers(model, "w8a8")
    register_family(
        Family(
            name="Doubled", examples={}, models=(), attention={_DoubledAttention: _ExplicitDoubled},
            blocks=(type(model.blocks[0]),), places=block_places,
        )  # fmt: skip
    )
    x = images(model)
    twin, record = swap_layers(model, "w8a8")
    assert record.skipped == () and "blocks.0.attn.query" in {place.name for place in record.places}
    off = quantization_status_manager(twin, disable_act_quant=True, disable_weight_quant=True, is_training=False)
    with off:
        torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_part_that_stays_in_float_is_named():
    model = copy.deepcopy(build("swin"))
    model.layers[0].blocks[0].extra_attention = _DoubledAttention(16, 2)
    with pytest.warns(UserWarning, match="layers.0.blocks.0.extra_attention .*matmuls stay float"):
        swap_layers(model, "w8a8")


def test_layouts_do_not_change_what_a_plain_model_receives():
    """A ViT described by layouts gives what one without them gives."""
    from maskaq_brevitas.models.layout import AttentionLayout
    from maskaq_brevitas.synthesis.iteration import received

    model = build("vit")
    plain = read_geometry(model)
    layout = AttentionLayout(grid=plain.grid, prefix=1, class_token=True)
    with attention_tap(model, "logits") as record:
        model(images(model))
        expected = received(record, "logits", plain, model)
        found = received(record, "logits", replace(plain, layouts=(layout,) * 2), model)
    torch.testing.assert_close(found, expected)
