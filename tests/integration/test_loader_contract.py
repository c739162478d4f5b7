"""What users feed loaders to: every way of iterating the calibrator gives the pool, and, after a refresh, the new one.

What the calibrator alone promises (length, batches, early break, two iterators) is in tests/test_calibrator.py.
"""

import dataclasses
import itertools

import accelerate
import pytest
import torch
from borrowed import hooks
from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_gptq
from brevitas_examples.imagenet_classification.ptq.ptq_common import calibrate
from torch.utils.data import DataLoader

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import resolve_scheme

IMAGES, BATCH = 6, 4
SCHEME = dataclasses.replace(resolve_scheme("w4a4"), weight_range="minmax")


def make(model, **changes):
    synthesis = SynthesisConfig(steps=1, warmup_steps=1, batch_size=BATCH, procedural_share=0.0)
    options = {"scheme": SCHEME, "num_images": IMAGES, "batch_size": BATCH, "held_back": 0, "synthesis": synthesis}
    return DataFreeCalibrator(model, progress=False, **{**options, **changes})


def plain(loader):
    return [(images.clone(), labels.clone()) for images, labels in loader]


def prefetching(loader):
    """As Lightning's fetcher does: one batch ahead, to know the last one before it is handed out."""
    iterator = iter(loader)
    found, ahead = [], next(iterator)
    for following in itertools.chain(iterator, [None]):
        found.append((ahead, following is None))
        ahead = following
    assert [last for _, last in found] == [False] * (len(loader) - 1) + [True]
    return [(images.clone(), labels.clone()) for (images, labels), _ in found]


def after_a_sanity_check(loader):
    """As Lightning's validation before training: two batches (or fewer) are read, the iterator is dropped."""
    assert len(list(itertools.islice(iter(loader), 2))) == 2
    return plain(loader)


def after_a_peek(loader):
    """As scripts do that need one batch for shapes or for a trace; here also from the middle of a pass."""
    first = next(iter(loader))
    found = []
    for images, labels in loader:
        peeked = next(iter(loader))
        assert all(torch.equal(a, b) for a, b in zip(peeked, first, strict=True))
        found.append((images.clone(), labels.clone()))
    return found


def prepared(calibrator):
    calibrator.ensure_images()
    return accelerate.Accelerator(cpu=True).prepare(calibrator)


# Who wraps the calibrator, with which of its arguments: a loader that lives on across refreshes.
WRAPPED = {
    "itself": ({}, lambda calibrator: calibrator),
    "two workers": ({"num_workers": 2}, lambda calibrator: calibrator),
    "accelerate": ({}, prepared),
    "accelerate, two workers": ({"num_workers": 2}, prepared),
    "another DataLoader": (
        {}, lambda calibrator: DataLoader(calibrator.ensure_images(), batch_size=BATCH, num_workers=2)
    ),
}  # fmt: skip
READERS = (plain, prefetching, after_a_sanity_check, after_a_peek)


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_every_reader_sees_the_pool_and_each_refresh(tiny_vit, wrapped):
    options, wrap = WRAPPED[wrapped]
    calibrator = make(tiny_vit, **options)
    loader = wrap(calibrator)
    assert len(loader) == 2
    seen = []
    for reader in READERS:
        found = reader(loader)
        images, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        assert [len(part) for part, _ in found] == [4, 2]
        assert torch.equal(images, calibrator.pool.images()) and torch.equal(labels, calibrator.pool.labels)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert not any(torch.equal(images, before) for before in seen)
        seen.append(images)
        calibrator.refresh(start="noise", steps=1)
    assert calibrator.version == 1 + len(READERS)


def test_a_refresh_in_the_middle_of_a_pass(tiny_vit):
    """The pass keeps its length; what it has not handed out yet is new."""
    calibrator = make(tiny_vit)
    calibrator.calibrate()
    iterator = iter(calibrator)
    old = calibrator.pool.images()
    first, _ = next(iterator)
    calibrator.refresh(start="noise", steps=1)
    second, _ = next(iterator)
    assert torch.equal(first, old[:BATCH])
    assert torch.equal(second, calibrator.pool.images()[BATCH:]) and not torch.equal(second, old[BATCH:])
    with pytest.raises(StopIteration):
        next(iterator)


def test_brevitas_gives_the_same_model_by_every_loader(tiny_vit):
    """Calibration reads the loader once, GPTQ once per layer; then a refresh goes against what they have made."""
    results = []
    for name in ("itself", "accelerate", "another DataLoader"):
        options, wrap = WRAPPED[name]
        calibrator = make(tiny_vit, **options)
        loader, quant_model = wrap(calibrator), calibrator.quant_model
        calibrate(loader, quant_model)
        with torch.no_grad():
            quant_model(next(iter(loader))[0])
            before = quant_model.blocks[0].attn.qkv.weight.clone()
            apply_gptq(loader, quant_model)
            assert not torch.equal(quant_model.blocks[0].attn.qkv.weight, before)
            results.append(quant_model(calibrator.pool.images()))
            assert torch.equal(calibrator.freeze()(calibrator.pool.images()), results[-1])
        entry = calibrator.refresh(steps=1)
        assert entry["version"] == 2 and entry["alignment_before"] > 0 and hooks(quant_model) == 0
    assert all(torch.equal(results[0], other) for other in results[1:])
