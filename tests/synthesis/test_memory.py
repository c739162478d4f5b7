"""What autograd keeps is counted, batches are cut to fit, and running out of memory costs time only."""

import warnings

import pytest
import torch
from torch import nn

from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import MemoryWarning
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.quant.snapshot import frozen_snapshot
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.synthesis import memory
from maskaq_brevitas.synthesis.synthesizer import synthesize
from maskaq_brevitas.tuning.calibrate import calibrate

CPU = torch.device("cpu")


@pytest.fixture
def pair(tiny_vit):
    quant_model, _ = swap_layers(tiny_vit, "w4a8")
    geometry = read_geometry(tiny_vit)
    calibrate(quant_model, [torch.randn(2, *geometry.input_size, generator=torch.Generator().manual_seed(1))])
    return float_snapshot(tiny_vit), frozen_snapshot(quant_model), geometry


def run(pair, count=5, **changes):
    config = SynthesisConfig(steps=3, init="low_frequency", **changes)
    return synthesize(*pair, torch.arange(count) % 10, config, generator=torch.Generator().manual_seed(0))


def test_graph_bytes_of_layers_that_are_known():
    model = nn.Sequential(nn.Linear(12, 50, bias=False), nn.GELU(), nn.GELU(), nn.Linear(50, 3)).requires_grad_(False)
    # Each GELU keeps its input, 50 float32; a frozen linear layer keeps its weight alone, which is there anyway.
    assert memory.graph_bytes(model, torch.zeros(1, 12)) == 2 * 50 * 4


def test_a_batch_keeps_what_its_images_keep(pair):
    for model in pair[:2]:
        kept = []

        def note(tensor, kept=kept):
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(torch.randn(40, *pair[2].input_size).requires_grad_(True))
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        one = torch.randn(1, *pair[2].input_size)
        weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        whole = sum(size for address, size in storages.items() if address not in weights)
        assert 40 * memory.graph_bytes(model, one) == pytest.approx(whole, rel=0.05)
        assert memory.graph_bytes(model, one, precision="bfloat16") < memory.graph_bytes(model, one)


@pytest.mark.parametrize(
    ("count", "most", "sizes"), ((16, 16, [16]), (16, 10, [8, 8]), (7, 3, [3, 3, 1]), (7, 100, [7]), (3, 1, [1, 1, 1]))
)
def test_parts(count, most, sizes):
    parts = memory.parts(count, most)
    assert [part.stop - part.start for part in parts] == sizes
    assert [index for part in parts for index in range(count)[part]] == list(range(count))


def test_fitting():
    assert memory.fitting(2**20, CPU, 10) == 10
    assert memory.fitting(2**40, CPU) == 1
    assert memory.fitting(0, CPU, 1) == 2**20
    assert memory.fitting(64 * 2**20, CPU) == 10


def test_auto_batch_size(pair):
    image = torch.randn(1, *pair[2].input_size)
    assert memory.auto_batch_size(pair[0], image) == 16  # a CPU
    one = 3 * memory.graph_bytes(pair[0], image) / 2**20
    assert memory.auto_batch_size(pair[0], image, 1 + int(100 * one)) == 64
    assert memory.auto_batch_size(pair[0], image, 1) == 16 and memory.auto_batch_size(pair[0], image, 4096) == 256


@pytest.mark.parametrize(
    "changes",
    (
        {}, {"kept_tokens": 0.5}, {"mask_per_layer": True}, {"mask_per_layer": True, "mask_enabled": False},
        {"align_weight": 0.0}, {"parameterization": "pixel", "tv_norm": "l2"},
        {"head_rows": 4, "entropy_rows": 4, "flip": True},
    ),
)  # fmt: skip
def test_parts_change_nothing(pair, changes, monkeypatch):
    whole = run(pair, **changes)
    seen = []
    monkeypatch.setattr(memory, "_CPU_BYTES", 1)
    handle = pair[0].register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    single = run(pair, **changes)
    handle.remove()
    assert max(seen[2:-1]) == 1 and len(seen) == 2 + 3 * 5 + 1  # measuring, three iterations, the finished images
    # An optimiser step has nearly the size of the learning rate whatever the gradient: last bits can show.
    assert (single.images - whole.images).abs().mean() < 1e-3 * (whole.images - whole.images.mean()).abs().mean()
    assert torch.equal(single.informative, whole.informative)
    assert single.trace.keys() == whole.trace.keys()
    for name, (first, last) in whole.trace.items():
        assert single.trace[name] == pytest.approx((first, last), rel=1e-3, abs=1e-4), name


def test_a_limit_cuts_the_batch(pair):
    seen = []
    handle = pair[1].register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    run(pair, count=32, memory_mib=1)
    handle.remove()
    assert 2 < max(seen) < 32


@pytest.mark.parametrize(
    "error", (torch.OutOfMemoryError("device"), RuntimeError("DefaultCPUAllocator: can't allocate"))
)
def test_out_of_memory_halves_the_parts_and_goes_on(pair, error):
    def refuse(_, arguments):
        if len(arguments[0]) > 4:
            raise error

    expected = run(pair, count=8)
    handle = pair[1].register_forward_pre_hook(refuse)
    with pytest.warns(MemoryWarning, match="Out of memory: going on with 4 images at once") as seen:
        batch = run(pair, count=8)
    handle.remove()
    assert len([one for one in seen if one.category is MemoryWarning]) == 1, "said once, kept for the rest of the run"
    torch.testing.assert_close(batch.images, expected.images, rtol=0, atol=1e-2)


def test_too_little_memory_to_measure_means_one_image_at_once(pair):
    def refuse(_, arguments):
        if len(arguments[0]) > 1:
            raise torch.OutOfMemoryError("device")

    expected = run(pair)
    handle = pair[1].register_forward_pre_hook(refuse)
    with pytest.warns(MemoryWarning, match="going on with 1 images at once"):
        batch = run(pair)
    handle.remove()
    torch.testing.assert_close(batch.images, expected.images, rtol=0, atol=1e-2)


def test_out_of_memory_with_one_image_is_an_error(pair):
    def refuse(_, arguments):
        raise torch.OutOfMemoryError("device")

    handle = pair[1].register_forward_pre_hook(refuse)
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError, match="device"):
        warnings.simplefilter("ignore", MemoryWarning)
        run(pair)
    handle.remove()


def test_other_errors_are_not_taken_for_it(pair):
    def refuse(_, arguments):
        raise RuntimeError("something else")

    handle = pair[1].register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="something else"):
        run(pair)
    handle.remove()
