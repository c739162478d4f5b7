"""The loader contract of DataFreeCalibrator, its public methods, and that foreign state is only borrowed."""

import copy
import dataclasses
import itertools
import json
import warnings

import pytest
import torch
from borrowed import hooks
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.nn import QuantLinear
from brevitas.quant import Int8ActPerTensorFloat
from brevitas.quant import Int8WeightPerChannelFloat
from brevitas.quant.scaled_int import Int8ActPerTensorFloatMSE
from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.config import EFFORTS
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.errors import SynthesisError
from maskaq_brevitas.errors import UncoupledWarning
from maskaq_brevitas.files import load_json
from maskaq_brevitas.files import save_json
from maskaq_brevitas.modes import fitting_precision
from maskaq_brevitas.tuning.calibrate import is_calibrated

FAST = SynthesisConfig(steps=2, warmup_steps=1, batch_size=4, procedural_share=0.0)
SCHEME = dataclasses.replace(resolve_scheme("w4a4"), weight_range="minmax")


def make(model, quant_model=None, **changes):
    options = dict(scheme=SCHEME, num_images=6, batch_size=4, held_back=2, synthesis=FAST, progress=False)
    return DataFreeCalibrator(model, quant_model, **{**options, **changes})


def batches(loader):
    return [(images.clone(), labels.clone()) for images, labels in loader]


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True)
    )


def probe(seed=0):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tiny_vit():
    """As the fixture of that name in conftest.py, and smaller still: width 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=10)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return model.eval()


@pytest.fixture
def calibrator(tiny_vit):
    return make(tiny_vit)


def test_is_a_loader(calibrator):
    assert isinstance(calibrator, DataLoader) and len(calibrator) == 2 and calibrator.batch_size == 4
    assert calibrator.version == 0
    found = batches(calibrator)
    assert calibrator.version == 1
    assert [images.shape for images, _ in found] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    for images, labels in found:
        assert images.dtype == torch.float32 and labels.dtype == torch.int64 and labels.ndim == 1
        assert images.device.type == "cpu" and images.min() >= -1 and images.max() <= 1
    assert torch.cat([labels for _, labels in found]).unique().numel() == 6  # six of ten classes, none twice


def test_iterates_again_and_again_over_the_same_bytes(calibrator):
    first = batches(calibrator)
    assert equal(batches(calibrator), first)
    for _ in calibrator:
        break
    assert equal([next(iter(calibrator))], first[:1])
    one, two = iter(calibrator), iter(calibrator)
    interleaved = [next(one), next(two), next(two), next(one)]
    assert equal(interleaved, [first[0], first[0], first[1], first[1]])
    assert calibrator.version == 1


def test_loader_arguments(tiny_vit):
    plain = batches(make(tiny_vit))
    assert equal(batches(make(tiny_vit, num_workers=1)), plain)
    assert [len(labels) for _, labels in make(tiny_vit, drop_last=True)] == [4]
    shuffled = torch.cat([images for images, _ in make(tiny_vit, shuffle=True)])
    everything = torch.cat([images for images, _ in plain])
    assert sorted(image.sum().item() for image in shuffled) == sorted(image.sum().item() for image in everything)


def test_bad_arguments(tiny_vit):
    for count in (0, -3, 2.0, True):
        with pytest.raises(InputError, match="num_images: expected a whole number >= 1"):
            make(tiny_vit, num_images=count)
    with pytest.raises(ConfigurationError, match="persistent_workers=True would go on serving the images of before"):
        make(tiny_vit, num_workers=1, persistent_workers=True)
    with pytest.raises(ConfigurationError, match="Unknown scheme"):
        make(tiny_vit, scheme="w1a1")
    with pytest.raises(ConfigurationError, match="matches nothing"):
        make(tiny_vit, overrides={"blocks.9.*": "w8a8"})
    with pytest.raises(ModelError, match="has no attention"):
        make(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_effort_sets_what_is_not_given(tiny_vit):
    best = EFFORTS["best"]
    calibrator = DataFreeCalibrator(tiny_vit, effort="best", progress=False)
    computed = fitting_precision("auto", torch.device("cpu"))
    assert len(calibrator.pool) == best.num_images
    assert calibrator.tuning == (dataclasses.replace(best.tuning, precision=computed),)
    assert calibrator.synthesis == dataclasses.replace(best.synthesis, precision=computed)
    assert calibrator.identity()["synthesis"]["precision"] == computed  # what it comes to on this machine
    calibrator = DataFreeCalibrator(tiny_vit, effort="best", num_images=9, steps=3, tuning=[], progress=False)
    assert (len(calibrator.pool), calibrator.synthesis.steps, calibrator.tuning) == (9, 3, ())
    assert len(DataFreeCalibrator(tiny_vit, progress=False).pool) == EFFORTS["fast"].num_images
    with pytest.raises(ConfigurationError, match="effort: expected one of fast, default, best"):
        DataFreeCalibrator(tiny_vit, effort="more")


def test_refused_arguments_leave_no_run_directory(tiny_vit, tmp_path):
    for changes in (
        {"num_images": 0},
        {"overrides": {"x": "w8a8"}},
        {"persistent_workers": True},
        {"run_mode": "again"},
    ):
        with pytest.raises((InputError, ConfigurationError)):
            make(tiny_vit, run_dir=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_seeds(tiny_vit):
    first = batches(make(tiny_vit))
    torch.rand(3)  # the global state does not matter
    assert equal(batches(make(tiny_vit)), first)
    for seed in (1, 2**31 - 1, -1):
        assert not equal(batches(make(tiny_vit, seed=seed)), first)


def state(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(id(parameter), parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()],
        [(name, id(module), module.training) for name, module in model.named_modules()],
        hooks(model),
    )


def surroundings():
    return (
        torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


METHODS = {
    "ensure_images": lambda calibrator, path: calibrator.ensure_images(),
    "calibrate": lambda calibrator, path: calibrator.calibrate(),
    "quantize": lambda calibrator, path: calibrator.quantize(),
    "refresh": lambda calibrator, path: calibrator.refresh(),
    "refresh_noise": lambda calibrator, path: calibrator.refresh(start="noise", share=0.5),
    "epochs": lambda calibrator, path: list(calibrator.epochs(2, refresh_every=1)),
    "freeze": lambda calibrator, path: (calibrator.calibrate(), calibrator.freeze()),
    "calibrated_on": lambda calibrator, path: calibrator.calibrated_on(probe()),
    "save_load": lambda calibrator, path: (calibrator.calibrate(), calibrator.save(path), calibrator.load(path)),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_only_borrows(tiny_vit, tmp_path, method):
    tiny_vit.train()
    tiny_vit.blocks[0].eval()
    tiny_vit.head.requires_grad_(False)
    before = state(tiny_vit)
    calibrator = make(tiny_vit)
    training = {name: module.training for name, module in calibrator.quant_model.named_modules()}
    around = surroundings()
    METHODS[method](calibrator, tmp_path / "run")
    assert surroundings() == around
    after = state(tiny_vit)
    assert after[1:] == before[1:] and all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert hooks(calibrator.quant_model) == 0
    assert all(
        module.training == training[name] for name, module in calibrator.quant_model.named_modules() if name in training
    )


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", ("ensure_images", "calibrate", "refresh"))
@pytest.mark.parametrize("call", (1, 4, 7))
def test_every_method_only_borrows_also_when_the_model_raises(tiny_vit, tmp_path, method, call):
    count = itertools.count(1)

    class Fragile(nn.Identity):
        def forward(self, x):
            if next(count) == call:
                raise Interrupted
            return x

    tiny_vit.norm_pre = Fragile()
    before, around = state(tiny_vit), surroundings()
    calibrator = make(tiny_vit)
    with pytest.raises(Interrupted):
        METHODS[method](calibrator, tmp_path / "run")
    assert surroundings() == around and hooks(calibrator.quant_model) == 0
    after = state(tiny_vit)
    assert after[1:] == before[1:] and all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    METHODS[method](calibrator, tmp_path / "run")  # and it can go on
    assert calibrator.version >= 1


def test_calibrate_and_freeze(calibrator):
    quant_model = calibrator.calibrate()
    assert quant_model is calibrator.quant_model and is_calibrated(quant_model)
    frozen = calibrator.freeze()
    with torch.no_grad():
        assert torch.equal(frozen(probe()), quant_model(probe()))
        assert not torch.equal(frozen(probe()), calibrator.float_model(probe()))
    assert [stage["stage"] for stage in calibrator.stages] == ["synthesis", "calibration"]


def test_a_large_pool_is_calibrated_on_a_part_of_it(tiny_vit, monkeypatch):
    """The same part each time, with drawn and with optimised images."""
    monkeypatch.setattr("maskaq_brevitas.tuning.model_maker._CALIBRATED_ON", 8)
    calibrator = DataFreeCalibrator(tiny_vit, num_images=16, steps=1, held_back=0, batch_size=4, progress=False)
    seen, calibrate = [], calibrator.quant_maker.calibrate

    def watched(model, batches):
        seen.append(batches)
        return calibrate(model, batches)

    monkeypatch.setattr(calibrator.quant_maker, "calibrate", watched)
    calibrator.calibrate()
    part = torch.cat(seen[-1])
    assert [len(batch) for batch in seen[-1]] == [4, 4]
    places = [int((calibrator.pool.images() == image).flatten(1).all(1).nonzero()) for image in part]
    assert places == sorted(set(places)) and {place % 2 for place in places} == {0, 1}  # every second one is drawn
    again = calibrator.calibrated_on()
    assert torch.equal(torch.cat(seen[-1]), part)
    with torch.no_grad():
        assert torch.equal(again(part), calibrator.freeze()(part))


def test_calibrating_twice_does_not_drift(calibrator):
    """Equalisation starts from the equalised model then: not the same bytes, but as close to the float model."""
    with torch.no_grad():
        expected = calibrator.float_model(probe())
        errors = [float((calibrator.calibrate()(probe()) - expected).norm()) for _ in range(3)]
    assert max(errors) < 2 * errors[0]


def test_refresh_is_seen_through_loaders_that_exist_already(calibrator):
    calibrator.calibrate()
    outside = DataLoader(calibrator.dataset, batch_size=6)
    (before, _), storage = next(iter(outside)), calibrator.pool.pixels.data_ptr()
    entry = calibrator.refresh(start="noise", steps=1)
    after, _ = next(iter(outside))
    assert calibrator.version == entry["version"] == 2 and entry["images"] == 6
    assert (before != after).flatten(1).any(dim=1).all() and calibrator.pool.pixels.data_ptr() == storage
    assert equal(
        [(after, calibrator.pool.labels)], [(torch.cat([images for images, _ in calibrator]), calibrator.pool.labels)]
    )
    assert entry["alignment_before"] > 0 and entry["alignment_after"] > 0


def test_partial_refresh_takes_its_turn(calibrator):
    calibrator.calibrate()
    replaced = []
    for _ in range(3):
        before = calibrator.pool.pixels.clone()
        assert calibrator.refresh(share=1 / 3, start="noise", steps=1)["images"] == 2
        replaced.append((calibrator.pool.pixels != before).flatten(1).any(dim=1).nonzero().flatten().tolist())
    assert replaced == [[0, 1], [2, 3], [4, 5]]
    for share in (0, 1.5):
        with pytest.raises(InputError, match=r"share: expected a number in \(0, 1\]"):
            calibrator.refresh(share=share)


def test_warm_refresh_keeps_labels_and_stays_closer_than_noise(tiny_vit):
    distances = {}
    for start in ("images", "noise"):
        calibrator = make(tiny_vit)
        calibrator.calibrate()
        before, labels = calibrator.pool.images(), calibrator.pool.labels.clone()
        calibrator.refresh(start=start, steps=1)
        distances[start] = float((calibrator.pool.images() - before).norm())
        assert sorted(calibrator.pool.labels.tolist()) == sorted(labels.tolist())
        assert torch.equal(calibrator.pool.labels, labels) or start == "noise"
    assert 0 < distances["images"] < distances["noise"]


def test_a_refresh_that_does_not_see_the_quant_model_warns(tiny_vit):
    calibrator = make(tiny_vit, synthesis=dataclasses.replace(FAST, align_weight=0.0))
    with pytest.warns(UncoupledWarning, match="do not follow the quant model: .*align_weight is 0"):
        calibrator.refresh(steps=1)
    calibrator = make(tiny_vit)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncoupledWarning)
        calibrator.refresh(steps=1)


def test_held_back_images_are_others_and_stay(calibrator):
    calibrator.calibrate()
    held = calibrator.held_back.pixels.clone()
    assert held.shape == (2, 3, 32, 32) and held.any()
    assert not (held[:, None] == calibrator.pool.pixels[None]).flatten(2).all(dim=2).any()
    calibrator.refresh(start="noise", steps=1)
    assert torch.equal(calibrator.held_back.pixels, held)


def test_without_held_back_images(tiny_vit):
    calibrator = make(tiny_vit, held_back=0)
    calibrator.calibrate()
    assert calibrator.held_back is None and calibrator.refresh(steps=1)["version"] == 2


def test_accelerate(calibrator):
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.Accelerator(cpu=True).prepare(calibrator)
    with pytest.raises(SynthesisError, match=r"have not been made yet. Call ensure_images\(\)"):
        next(iter(prepared))
    calibrator.calibrate()
    first = batches(prepared)
    assert equal(first, batches(calibrator))
    calibrator.refresh(start="noise", steps=1)
    assert equal(batches(prepared), batches(calibrator)) and not equal(batches(prepared), first)


def test_epochs(calibrator):
    calibrator.calibrate()
    versions = [(epoch, calibrator.version) for epoch in calibrator.epochs(5, refresh_every=2, steps=1)]
    assert versions == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 3)]
    assert list(calibrator.epochs(2)) == [0, 1] and calibrator.version == 3
    for arguments in (dict(count=0), dict(count=2, refresh_every=0)):
        with pytest.raises(InputError, match="Expected whole numbers >= 1"):
            list(calibrator.epochs(**arguments))


def test_save_and_load(tiny_vit, tmp_path):
    calibrator = make(tiny_vit)
    calibrator.calibrate()
    calibrator.refresh(steps=1)
    calibrator.save(tmp_path / "run")
    assert not [path for path in (tmp_path / "run").rglob("*.partial")]
    other = make(tiny_vit)
    other.load(tmp_path / "run")
    assert other.version == 2 and is_calibrated(other.quant_model)
    assert equal(batches(other), batches(calibrator))
    assert torch.equal(other.held_back.pixels, calibrator.held_back.pixels)
    with torch.no_grad():
        assert torch.equal(other.quant_model(probe()), calibrator.quant_model(probe()))
        assert torch.equal(other.freeze()(probe()), calibrator.freeze()(probe()))


def test_load_of_a_run_from_before_an_option_of_schemes(tiny_vit, tmp_path):
    calibrator = make(tiny_vit)
    calibrator.calibrate()
    calibrator.save(tmp_path / "run")
    manifest = load_json(tmp_path / "run" / "run.json")

    def without(option):
        text = json.dumps(manifest)
        assert option in text
        save_json(tmp_path / "run" / "run.json", json.loads(text.replace(option, "")))

    without(', "patch_tokens": null')
    make(tiny_vit).load(tmp_path / "run")
    # All levels were not in use before there was a choice.
    without(', "weight_levels": "all"')
    with pytest.raises(RunDirectoryError, match="holds another run: scheme is .*'weight_levels': 'symmetric'"):
        make(tiny_vit).load(tmp_path / "run")
    symmetric = dataclasses.replace(SCHEME, weight_levels="symmetric")
    make(tiny_vit, scheme=symmetric).load(tmp_path / "run")


def test_load_of_something_else(tiny_vit, tmp_path):
    calibrator = make(tiny_vit)
    with pytest.raises(RunDirectoryError, match=r"load\(\) needs a path"):
        calibrator.load()
    with pytest.raises(RunDirectoryError, match=r"save\(\) needs a path"):
        calibrator.save()
    with pytest.raises(RunDirectoryError, match="holds no run"):
        calibrator.load(tmp_path)
    calibrator.calibrate()
    calibrator.save(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="holds another run: scheme"):
        make(tiny_vit, scheme="w8a8").load(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="holds another run: num_images is 6, expected 7"):
        make(tiny_vit, num_images=7).load(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="holds another run: overrides"):
        make(tiny_vit, overrides={"head": "w4a4"}).load(tmp_path / "run")
    path = tmp_path / "run" / "quant_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunDirectoryError, match="quant_model.safetensors cannot be read"):
        make(tiny_vit).load(tmp_path / "run")
    tiny_vit.head.bias.data.add_(1)
    with pytest.raises(RunDirectoryError, match="holds another run: weights"):
        make(tiny_vit).load(tmp_path / "run")


def test_run_directory(tiny_vit, tmp_path):
    calibrator = make(tiny_vit, run_dir=tmp_path)
    first = batches(calibrator)
    with pytest.raises(RunDirectoryError, match="--resume, replace it with --overwrite"):
        make(tiny_vit, run_dir=tmp_path)
    with pytest.raises(RunDirectoryError, match=r"Differing: .*seed: 0 -> 1"):
        make(tiny_vit, run_dir=tmp_path, run_mode="resume", seed=1)
    resumed = make(tiny_vit, run_dir=tmp_path, run_mode="resume")
    assert equal(batches(resumed), first) and not resumed.stages  # read, not made again
    fresh = make(tiny_vit, run_dir=tmp_path, run_mode="overwrite", seed=1)
    assert not (tmp_path / "images.safetensors").exists()
    assert not equal(batches(fresh), first)


def test_interrupted_synthesis_goes_on_with_the_same_bytes(tiny_vit, tmp_path, monkeypatch):
    import maskaq_brevitas.synthesis.maker as module

    whole = batches(make(tiny_vit))
    calls, real = itertools.count(), module.synthesize

    def dies(*arguments, **options):
        if next(calls) == 2:  # warm-up, first batch, then the end
            raise Interrupted
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "synthesize", dies)
        with pytest.raises(Interrupted):
            make(tiny_vit, run_dir=tmp_path).ensure_images()
    assert len(list(tmp_path.glob("state/images-*"))) == 1 and not (tmp_path / "images.safetensors").exists()
    count = []
    monkeypatch.setattr(module, "synthesize", lambda *a, **o: (count.append(1), real(*a, **o))[1])
    assert equal(batches(make(tiny_vit, run_dir=tmp_path, run_mode="resume")), whole)
    assert len(count) == 3  # warm-up, second batch, held-back batch
    assert not list(tmp_path.glob("state/images-*"))


def given(model, act_quant=Int8ActPerTensorFloat, weight_quant=Int8WeightPerChannelFloat):
    """A quant model that a user made with Brevitas alone."""
    layers = {nn.Linear: (QuantLinear, dict(
        input_quant=act_quant, weight_quant=weight_quant, bias_quant=None, return_quant_tensor=False,
    ))}  # fmt: skip
    return layerwise_quantize(copy.deepcopy(model), layers).eval()


def test_a_quant_model_that_was_given(tiny_vit):
    mine = given(tiny_vit)
    calibrator = make(tiny_vit, mine)
    assert calibrator.quant_model is mine and calibrator.swap_record is None
    calibrator.ensure_images()
    assert not is_calibrated(mine)  # provisional scales for the alignment are taken back
    assert calibrator.calibrate() is mine and is_calibrated(mine)
    with torch.no_grad():
        expected = tiny_vit(probe())
        assert 0 < (mine(probe()) - expected).norm() < 0.1 * expected.norm()
        assert torch.equal(calibrator.freeze()(probe()), mine(probe()))
    assert calibrator.refresh(steps=1)["alignment_before"] > 0
    with pytest.raises(ConfigurationError, match="this quant model was given"):
        calibrator.calibrated_on(probe())


@pytest.mark.parametrize("off", (torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("quantizers", (None, (), (Int8ActPerTensorFloatMSE, Int8WeightPerChannelFloatMSE)))
def test_a_brevitas_calibration_loop(tiny_vit, quantizers, off):
    """The drop-in use: the images are made at the first batch, in the middle of the user's calibration."""
    calibrators = [make(tiny_vit, None if quantizers is None else given(tiny_vit, *quantizers)) for _ in range(2)]
    calibrators[1].ensure_images()
    outputs = []
    for calibrator in calibrators:
        quant_model = calibrator.quant_model
        with off(), calibration_mode(quant_model):
            for images, _ in calibrator:
                quant_model(images)
        assert is_calibrated(quant_model)
        with torch.no_grad():
            outputs.append(quant_model(probe()))
    assert torch.equal(*outputs)
    with torch.no_grad():
        assert not torch.equal(outputs[0], tiny_vit(probe()))
