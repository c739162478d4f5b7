"""torchvision's models, and PyTorch's MultiheadAttention on its own."""

import copy

import pytest
import torch
from small_models import build
from torch import nn

from maskaq_brevitas.config import LayerBits
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.families import attention_modules
from maskaq_brevitas.models.families import explicit_form
from maskaq_brevitas.models.families import family_of
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.models.windows import cut_windows
from maskaq_brevitas.models.windows import joined_windows
from maskaq_brevitas.models.windows import shift_mask
from maskaq_brevitas.models.windows import window_shift
from maskaq_brevitas.quant.swap import plan_bits


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "self": dict(),
    "cross": dict(kdim=6, vdim=10),
    "tokens_first": dict(batch_first=False),
    "no_bias": dict(bias=False),
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("mask", ("none", "causal", "per head", "padding", "both"))
def test_multihead_attention_computes_the_same(options, mask):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options}).eval()
        for parameter in attention.parameters():
            parameter.data += 0.5 * torch.randn(parameter.shape)
    query, key, value = (
        draw(3, 5, 8),
        draw(3, 7, options.get("kdim", 8), seed=1),
        draw(3, 7, options.get("vdim", 8), seed=2),
    )
    if not attention.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    masks = {}
    if mask in ("causal", "both"):
        masks["attn_mask"] = torch.ones(5, 7, dtype=torch.bool).triu(3)  # True: not attended to
    if mask == "per head":
        masks["attn_mask"] = draw(6, 5, 7, seed=3)
    if mask in ("padding", "both"):
        masks["key_padding_mask"] = torch.tensor([[False] * 7, [False] * 5 + [True] * 2, [False] * 6 + [True]])
    explicit = explicit_form(attention)
    for wanted in (dict(), dict(average_attn_weights=False), dict(need_weights=False)):
        expected = attention(query, key, value, **masks, **wanted)
        found = explicit(query, key, value, **masks, **wanted)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not explicit.attention.is_open


def test_multihead_attention_that_is_refused():
    with pytest.raises(ModelError, match="add_bias_kv or add_zero_attn cannot be quantized"):
        explicit_form(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    explicit = explicit_form(nn.MultiheadAttention(8, 2, batch_first=True))
    with pytest.raises(ModelError, match="without a batch axis"):
        explicit(draw(5, 8), draw(5, 8), draw(5, 8))


def test_a_model_around_multihead_attention_is_of_no_family():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
    assert family_of(model) is None and list(attention_modules(model)) == ["layers.0.self_attn"]
    with pytest.raises(ModelError, match="no patch_embed.grid_size to read the patch grid from"):
        read_geometry(model)
    with pytest.raises(ModelError, match="Expected a VisionTransformer"):
        read_geometry(build("tv_vit").encoder)


def test_vit_geometry_and_widths():
    model = build("tv_vit")
    geometry = read_geometry(model)
    assert geometry.input_size == (3, 32, 32) and geometry.grid == (4, 4) and geometry.num_classes == 5
    assert geometry.prefix_tokens == 1 and geometry.class_token and geometry.mean == (0.485, 0.456, 0.406)
    bits = plan_bits(model, resolve_scheme("w4a4"))
    outer = {name for name, found in bits.items() if found == LayerBits(8, 8)}
    assert {"conv_proj", "heads.head"} <= outer and "heads.pre_logits" not in outer
    assert bits["encoder.layers.encoder_layer_0.self_attention.q_proj"] == LayerBits(4, 4)


def test_swin_geometry_comes_from_the_configuration_that_may_be_set():
    model = build("tv_swin_padded")
    geometry = read_geometry(model)
    assert geometry.input_size == (3, 36, 28) and geometry.grid == (9, 7) and not geometry.class_token
    assert [layout.grid for layout in geometry.layouts] == [(9, 7), (9, 7), (5, 4), (5, 4)]
    assert [layout.shift for layout in geometry.layouts] == [(0, 0), (1, 2), (0, 0), (1, 0)]
    other = copy.deepcopy(model)
    other.pretrained_cfg = dict(input_size=(3, 48, 40), mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    geometry = read_geometry(other)
    assert geometry.input_size == (3, 48, 40) and geometry.grid == (12, 10)
    assert geometry.mean == (0.1, 0.2, 0.3) and geometry.std == (0.5, 0.5, 0.5)
    del other.pretrained_cfg
    assert read_geometry(other).input_size == (3, 224, 224)
    other = copy.deepcopy(build("tv_swin_v2"))
    del other.pretrained_cfg
    assert read_geometry(other).input_size == (3, 256, 256)


def test_windows_hold_neighbours_and_can_be_joined():
    grid, window = (5, 7), (2, 3)
    x = torch.arange(2 * 35.0).reshape(2, 5, 7, 1)
    shift = window_shift(grid, window, (1, 1))
    windows = cut_windows(x, window, shift)
    assert windows.shape == (2 * 9, 6, 1) and windows[0].flatten().tolist() == [8, 9, 10, 15, 16, 17]
    assert torch.equal(joined_windows(windows, grid, window, shift), x)
    mask = shift_mask(grid, window, shift, x)
    assert mask.shape == (9, 6, 6) and not mask[0].any() and set(mask.flatten().tolist()) == {0.0, -100.0}
    # The last window of a row holds the last column but one, what fills up, and the first column, which is no
    # neighbour.
    assert mask[2, 0].tolist() == [0, 0, -100, 0, 0, -100]
    assert window_shift((4, 7), (4, 3), (2, 1)) == (0, 1)
