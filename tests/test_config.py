import dataclasses
import json
import subprocess
import sys

import pytest

from maskaq_brevitas.config import EFFORTS
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import LayerBits
from maskaq_brevitas.config import Scheme
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import from_mapping
from maskaq_brevitas.config import parse_bits
from maskaq_brevitas.config import resolve_effort
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.config import to_mapping
from maskaq_brevitas.errors import ConfigurationError


@pytest.mark.parametrize("weight", range(2, 9))
@pytest.mark.parametrize("activation", range(2, 9))
def test_every_width_from_2_to_8(weight, activation):
    name = f"w{weight}a{activation}"
    assert parse_bits(name) == LayerBits(weight, activation) and str(parse_bits(name)) == name
    scheme, strict = resolve_scheme(name), resolve_scheme(f"strict-{name}")
    assert scheme.bits == strict.bits == strict.patch_embed == strict.head == LayerBits(weight, activation)
    assert scheme.patch_embed == scheme.head == LayerBits(8, 8)
    assert scheme.resolved_probability_bits == 8 and strict.resolved_probability_bits == activation
    assert scheme.name == name and strict.name == f"strict-{name}"


@pytest.mark.parametrize("text", ("w9a4", "w4a1", "w4", "W4A4", "w4a4 ", "w44a4", "", None, 4))
def test_malformed_bits(text):
    with pytest.raises(ConfigurationError, match="wXaY with 2 <= X, Y <= 8"):
        parse_bits(text)


@pytest.mark.parametrize("scheme", ("int4", "strict-", "w4a4-strict", None, 4, "strict-w1a1"))
def test_unknown_scheme(scheme):
    with pytest.raises(ConfigurationError, match="Unknown scheme .* for example w8a8, w6a6"):
        resolve_scheme(scheme)


def test_a_scheme_resolves_to_itself():
    scheme = dataclasses.replace(resolve_scheme("w4a8"), gelu="signed", probability_bits=5)
    assert resolve_scheme(scheme) is scheme and scheme.resolved_probability_bits == 5


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"bits": LayerBits(1, 8)}, r"Scheme.bits: expected widths from 2 to 8 bits, got w1a8"),
        ({"head": LayerBits(8, 9)}, r"Scheme.head: expected widths from 2 to 8 bits, got w8a9"),
        ({"bits": "w4a4"}, r"Scheme.bits: expected LayerBits\(weight, activation\), got 'w4a4'"),
        ({"probability_bits": 9}, "Scheme.probability_bits: expected 2 to 8 bits or None, got 9"),
        ({"patch_tokens": 1}, "Scheme.patch_tokens: expected a whole number >= 2, got 1"),
        ({"patch_tokens": 9}, "Scheme.patch_tokens: expected 2 to 8 bits or None, got 9"),
        ({"probability_bits": "8"}, "Scheme.probability_bits: expected a whole number"),
        ({"weight_range": "max"}, "weight_range: expected one of minmax, mse, got 'max'"),
        ({"weight_levels": "most"}, "weight_levels: expected one of all, symmetric, got 'most'"),
        ({"activation_range": "kl"}, "activation_range: expected one of percentile, minmax, mse, search"),
        ({"gelu": "unsigned"}, "gelu: expected one of"),
        ({"softmax": "log2"}, "softmax: expected one of"),
        ({"equalize": "no"}, "equalize: expected true or false, got 'no'"),
    ),
)
def test_scheme_out_of_range(change, message):
    with pytest.raises(ConfigurationError, match=message):
        dataclasses.replace(resolve_scheme("w4a4"), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"steps": 0}, "steps: expected a whole number >= 1, got 0"),
        ({"steps": 2.0}, "steps: expected a whole number"),
        ({"batch_size": True}, "batch_size: expected a whole number >= 1, got True"),
        ({"jitter": -1}, "jitter: expected a whole number >= 0"),
        ({"entropy_rows": 1}, "entropy_rows: expected a whole number >= 2"),
        ({"head_rows": 0}, "head_rows: expected a whole number >= 1"),
        ({"warmup_steps": 0}, "warmup_steps: expected a whole number >= 1"),
        ({"learning_rate": 0}, "learning_rate: expected a positive number, got 0"),
        ({"learning_rate": "1e-3"}, "learning_rate: expected a positive number, got '1e-3'"),
        ({"final_learning_rate": float("nan")}, "final_learning_rate: expected a positive number, got nan"),
        ({"tv_weight": float("inf")}, "tv_weight: expected a number >= 0, got inf"),
        ({"class_weight": -1.0}, "class_weight: expected a number >= 0, got -1.0"),
        ({"mask_start": 0.0}, r"mask_start: expected a share in \(0, 1\], got 0.0"),
        ({"mask_end": 1.1}, r"mask_end: expected a share in \(0, 1\], got 1.1"),
        ({"mask_drop": 1.0}, r"mask_drop: expected a share in \[0, 1\), got 1.0"),
        ({"head_attention": "softmax"}, "head_attention: expected one of logits, raw_logits, probabilities"),
        ({"init": "zeros"}, "init: expected one of gaussian, low_frequency"),
        ({"tv_norm": "l3"}, "tv_norm: expected one of"),
        ({"precision": "float16"}, "precision: expected one of"),
        ({"parameterization": "gan"}, "parameterization: expected one of"),
        ({"flip": "no"}, "flip: expected true or false, got 'no'"),
        (
            {"head_weight": 0, "class_weight": 0, "tv_weight": 0, "entropy_weight": 0},
            "Expected at least one of head_weight",
        ),
    ),
)
def test_synthesis_out_of_range(change, message):
    with pytest.raises(ConfigurationError, match=message):
        SynthesisConfig(**change)


def test_configurations_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SynthesisConfig().steps = 3
    with pytest.raises(TypeError):
        SynthesisConfig(300)
    with pytest.raises(TypeError):
        Scheme("mine")


def test_published_values():
    config = SynthesisConfig.published()
    assert (config.steps, config.batch_size, config.learning_rate, config.final_learning_rate) == (2000, 16, 0.1, 1e-3)
    assert (config.head_weight, config.class_weight, config.align_weight, config.entropy_weight) == (1.0, 1.0, 0.1, 1.0)
    assert config.tv_weight == pytest.approx(2.5e-5 * 16**0.5)
    assert (config.mask_start, config.mask_end, config.mask_drop) == (0.5, 0.1, 0.3)
    assert (config.jitter, config.late_jitter, config.entropy_rows, config.init) == (8, 16, 64, "gaussian")
    assert {config.head_attention, config.entropy_attention, config.align_attention, config.mask_attention} == {
        "raw_logits"
    }
    assert SynthesisConfig.published(steps=10).steps == 10


def test_warmup_is_a_quarter_unless_said():
    assert SynthesisConfig(steps=40).resolved_warmup_steps == 10
    assert SynthesisConfig(steps=2).resolved_warmup_steps == 1
    assert SynthesisConfig(steps=40, warmup_steps=3).resolved_warmup_steps == 3


@pytest.mark.parametrize("config", (SynthesisConfig(steps=7, flip=True), resolve_scheme("strict-w3a3")))
def test_round_trip_through_json(config):
    assert from_mapping(type(config), json.loads(json.dumps(to_mapping(config)))) == config


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    (
        (SynthesisConfig, {"step": 3}, "SynthesisConfig: unknown key 'step'. Did you mean 'steps'?"),
        (SynthesisConfig, {"zzz": 3}, "SynthesisConfig: unknown key 'zzz'. Known keys: steps, "),
        (SynthesisConfig, {3: 3}, "SynthesisConfig: unknown key 3"),
        (SynthesisConfig, [3], "SynthesisConfig: expected a mapping of options, got list"),
        (SynthesisConfig, None, "expected a mapping of options, got NoneType"),
        (SynthesisConfig, {"learning_rate": "fast"}, "learning_rate: expected a positive number, got 'fast'"),
        (Scheme, {"name": "mine"}, "Scheme: .*missing 3 required"),
        (
            Scheme,
            {"name": "a", "bits": {"weight": 4, "activations": 4}},
            "LayerBits: unknown key 'activations'. Did you",
        ),
        (Scheme, {"name": "a", "bits": {"weight": "4", "activation": 4}}, "LayerBits.weight: expected a whole number"),
    ),
)
def test_bad_mapping(cls, values, message):
    with pytest.raises(ConfigurationError, match=message):
        from_mapping(cls, values)


def test_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import importlib.util as u, types\n" \
        "p = types.ModuleType('maskaq_brevitas'); p.__path__ = [sys.argv[1]]; sys.modules['maskaq_brevitas'] = p\n" \
        "import maskaq_brevitas.config"
    import maskaq_brevitas

    subprocess.run([sys.executable, "-c", code, maskaq_brevitas.__path__[0]], check=True)


def test_scheme_families_differ_in_their_scales():
    assert resolve_scheme("w4a4").input_scales == "channel"
    for name in ("tensor-w4a4", "strict-w4a4"):
        assert resolve_scheme(name).input_scales == "tensor"
    assert resolve_scheme("tensor-w4a4").head == LayerBits(8, 8)
    with pytest.raises(ConfigurationError, match="Unknown scheme 'channel-w4a4'. Expected wXaY, tensor-wXaY"):
        resolve_scheme("channel-w4a4")


def test_the_finn_scheme_is_the_tensor_scheme_with_its_restrictions():
    tensor, finn = resolve_scheme("tensor-w4a8"), resolve_scheme("finn-w4a8")
    assert (finn.gelu, finn.softmax, finn.patch_tokens) == ("signed", "signed", 8)
    assert (tensor.weight_levels, finn.weight_levels) == ("all", "symmetric")
    same = {"gelu": tensor.gelu, "softmax": tensor.softmax, "patch_tokens": None, "name": "tensor-w4a8"}
    same["weight_levels"] = "all"
    assert dataclasses.replace(finn, **same) == tensor


def test_efforts_grow():
    fast, default, best = (resolve_effort(name) for name in EFFORTS)
    assert list(EFFORTS) == ["fast", "default", "best"] and fast.tuning is None
    assert best.num_images > default.num_images >= fast.num_images
    assert best.tuning.epochs > default.tuning.epochs
    with pytest.raises(ConfigurationError, match="effort: expected one of fast, default, best, got 'bst'"):
        resolve_effort("bst")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(steps_per_epoch=0), "steps_per_epoch: expected a whole number >= 1"),
        (dict(drawn_images=-1), "drawn_images: expected a whole number >= 0"),
        (dict(feature_weight=-1.0), "feature_weight: expected a number >= 0"),
        (dict(last_feature_weight=-1.0), "last_feature_weight: expected a number >= 0"),
        (dict(kept_tokens=0.0), r"kept_tokens: expected a share in \(0, 1\], got 0.0"),
        (dict(kept_tokens=1.5), r"kept_tokens: expected a share in \(0, 1\], got 1.5"),
        (dict(drop=1.5), r"drop: expected a probability in \[0, 1\], got 1.5"),
        (dict(weight_learning_rate=-1e-3), "weight_learning_rate: expected a number >= 0 or None, got -0.001"),
        (dict(compile="maybe"), "compile: expected one of auto, always, never"),
    ],
)
def test_new_tuning_options_are_checked(values, message):
    with pytest.raises(ConfigurationError, match=message):
        DistillConfig(**values)
