"""Loading by name: weights arrive unchanged, and everything that does not fit says so."""

import re
from importlib import resources

import pytest
import safetensors.torch
import timm
import torch
import torchvision.models
from timm.layers import Attention

from maskaq_brevitas.errors import CheckpointError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.models.zoo import available_models
from maskaq_brevitas.models.zoo import load_model

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def vit_weights():
    """Random weights of a timm ViT-Tiny."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return timm.create_model(NAME).state_dict()


def write(folder, weights):
    """Path of a safetensors file with these weights."""
    path = folder / "weights.safetensors"
    safetensors.torch.save_file(weights, path)
    return path


def test_digits_vit_is_the_shipped_file(digits_vit):
    file = resources.files("maskaq_brevitas.models") / "checkpoints" / "digits_vit.safetensors"
    stored = safetensors.torch.load(file.read_bytes())
    state = digits_vit.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[key], stored[key]) and stored[key].dtype == torch.float32 for key in stored)
    assert 0.4e6 < sum(parameter.numel() for parameter in digits_vit.parameters()) < 0.7e6
    assert not digits_vit.training and digits_vit.num_classes == 10
    assert all(type(block.attn) is Attention for block in digits_vit.blocks)


def test_digits_vit_carries_its_preprocessing(digits_vit):
    config = timm.data.resolve_model_data_config(digits_vit)
    assert config["input_size"] == (3, 32, 32)
    assert config["crop_pct"] == 1.0
    assert config["mean"] == (0.3, 0.3, 0.3)
    assert config["std"] == (0.35, 0.35, 0.35)


def test_timm_model_from_a_file(tmp_path, vit_weights):
    model = load_model(NAME, checkpoint=write(tmp_path, vit_weights))
    assert not model.training
    assert all(torch.equal(value, vit_weights[key]) for key, value in model.state_dict().items())
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.5, 0.5, 0.5)


def test_classes_are_read_from_the_head_in_the_file(tmp_path, vit_weights):
    head = {"head.weight": torch.randn(7, 192), "head.bias": torch.randn(7)}
    path = write(tmp_path, {**vit_weights, **head})
    model = load_model(NAME, checkpoint=path)
    assert model.num_classes == 7 and model.pretrained_cfg["num_classes"] == 7
    assert torch.equal(model.head.weight, head["head.weight"])
    with pytest.raises(CheckpointError, match=re.escape("shape of 'head.weight': expected (1000, 192), got (7, 192)")):
        load_model(NAME, checkpoint=path, num_classes=1000)


def test_digits_vit_from_a_file(tmp_path, digits_vit):
    weights = {**digits_vit.state_dict(), "head.weight": torch.ones(3, 96), "head.bias": torch.ones(3)}
    model = load_model("digits_vit", checkpoint=write(tmp_path, weights))
    assert model.num_classes == 3 and model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(CheckpointError, match=re.escape("shape of 'head.weight': expected (4, 96), got (10, 96)")):
        load_model("digits_vit", num_classes=4)


def test_random_state_is_left_alone(tmp_path, vit_weights):
    path = write(tmp_path, vit_weights)
    before = torch.get_rng_state()
    load_model("digits_vit")
    load_model(NAME, checkpoint=path)
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_name_lists_close_matches():
    with pytest.raises(ModelError, match=r"got 'vit_tinny_patch16_224'\. Close matches: .*vit_tiny_patch16_224"):
        load_model("vit_tinny_patch16_224")
    with pytest.raises(ModelError, match=r"got 'digit_vit'\. Close matches: digits_vit"):
        load_model("digit_vit")
    with pytest.raises(ModelError, match=r"got '\?'\. available_models\(\) lists them all"):
        load_model("?")
    with pytest.raises(ModelError, match=r"tag that timm has for .*augreg_in21k_ft_in1k.* got 'nonsense'"):
        load_model(NAME + ".nonsense")


def test_missing_unexpected_and_reshaped_keys_are_named(tmp_path, vit_weights):
    expected = r"shape of 'cls_token': expected \(1, 1, 384\), got \(1, 1, 192\).* more\."
    with pytest.raises(CheckpointError, match=expected):
        load_model("vit_small_patch16_224", checkpoint=write(tmp_path, vit_weights))
    weights = {key: value for key, value in vit_weights.items() if key != "norm.bias"}
    with pytest.raises(CheckpointError, match=r"missing 'norm\.bias'; unexpected 'extra'\."):
        load_model(NAME, checkpoint=write(tmp_path, {**weights, "extra": torch.ones(1)}))
    # Another input size: timm alone would interpolate the position embedding and say nothing.
    with pytest.raises(CheckpointError, match=r"shape of 'pos_embed': expected \(1, 577, 192\), got \(1, 197, 192\)"):
        load_model("vit_tiny_patch16_384", checkpoint=write(tmp_path, vit_weights))


def test_files_that_are_not_whole_safetensors(tmp_path, vit_weights):
    path = write(tmp_path, vit_weights)
    content = path.read_bytes()
    for damaged in (b"", b"x", content[:100], content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"whole safetensors file, cannot read .*weights\.safetensors"):
            load_model(NAME, checkpoint=path)
    with pytest.raises(CheckpointError, match=r"found none at '.*absent\.safetensors'"):
        load_model(NAME, checkpoint=tmp_path / "absent.safetensors")
    pickled = tmp_path / "weights.pth"
    torch.save(vit_weights, pickled)
    for name in (NAME, "digits_vit"):
        with pytest.raises(CheckpointError, match=r"Expected a '\.safetensors' file, got '.*weights\.pth'.*save_file"):
            load_model(name, checkpoint=pickled)


def test_failed_download_names_the_option(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"got OSError: no network here.*--checkpoint"):
        load_model(NAME)


def test_pretrained_head_is_never_replaced_by_a_random_one(monkeypatch, tiny_vit):
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: tiny_vit)
    assert load_model(NAME, num_classes=10) is tiny_vit
    with pytest.raises(CheckpointError, match=r"Expected num_classes=10, .* got 5\. Pass a checkpoint"):
        load_model(NAME, num_classes=5)


def test_available_models():
    names = available_models()
    assert names[0] == "digits_vit" and NAME in names and len(names) == len(set(names))
    assert "torchvision:vit_b_16" in names and "torchvision:swin_v2_t" in names and "torchvision:resnet18" not in names


def test_torchvision_model_from_a_file(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        weights = torchvision.models.swin_t(num_classes=7).state_dict()
    path = write(tmp_path, weights)
    model = load_model("torchvision:swin_t", checkpoint=path)
    assert not model.training and all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    geometry = read_geometry(model)
    assert geometry.num_classes == 7 and geometry.input_size == (3, 224, 224) and geometry.std == (0.229, 0.224, 0.225)
    config = timm.data.resolve_model_data_config(model)
    # torchvision resizes to 232 pixels for these weights and cuts 224 out.
    assert config["interpolation"] == "bicubic" and config["crop_pct"] == pytest.approx(224 / 232)
    with pytest.raises(
        CheckpointError, match=r"fit 'torchvision:swin_t', got others .*head.weight': expected \(9, 768\)"
    ):
        load_model("torchvision:swin_t", checkpoint=path, num_classes=9)
    with pytest.raises(CheckpointError, match="fit 'torchvision:swin_v2_t'"):
        load_model("torchvision:swin_v2_t", checkpoint=path)


def test_torchvision_names_and_downloads(monkeypatch):
    with pytest.raises(ModelError, match="got 'torchvision:vit_b_17'. Close matches: .*torchvision:vit_b_16"):
        load_model("torchvision:vit_b_17")
    with pytest.raises(CheckpointError, match="Expected num_classes=1000, .* got 5"):
        load_model("torchvision:vit_b_16", num_classes=5)

    def offline(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(
        CheckpointError, match="Expected torchvision to download .*got OSError: no network here.*--checkpoint"
    ):
        load_model("torchvision:vit_b_16")


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (
            lambda weights: {**weights, "head.weight": weights["head.weight"].long()},
            "dtype of 'head.weight': expected fl",
        ),
        (
            lambda weights: {**weights, "pos_embed": torch.zeros(1, 2_000_000, 96)},
            r"shape of 'pos_embed': expected \(1",
        ),
        (
            lambda weights: {**weights, "norm.bias": weights["norm.bias"].to(torch.float8_e4m3fn)},
            "dtype of 'norm.bias'",
        ),
    ),
)
def test_a_file_of_other_dtypes_or_sizes_is_refused_unread(change, message, digits_vit, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(change(dict(digits_vit.state_dict())), path)
    monkeypatch.setattr(safetensors.torch, "load_file", lambda path: pytest.fail("its data were read"))
    with pytest.raises(CheckpointError, match=message):
        load_model("digits_vit", checkpoint=path)


@pytest.mark.parametrize("name", ("digits_vit", "vit_tiny_patch16_224"))
def test_a_header_bomb_is_refused(name, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_model(name, checkpoint=path)
