"""What is kept of a tuning, and that a note which is lost or damaged is named instead of taken."""

import pytest
import torch

from maskaq_brevitas.errors import DamagedFileError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.tuning.checkpoint import has_checkpoint
from maskaq_brevitas.tuning.checkpoint import load_checkpoint
from maskaq_brevitas.tuning.checkpoint import save_checkpoint

NOTE = "state/tuning.json"


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run", {"seed": 0})


def test_the_last_checkpoint_comes_back_and_the_one_before_is_gone(run):
    assert not has_checkpoint(run) and load_checkpoint(run) is None
    for done in (1, 2):
        tensors = {"model": {"a.weight": torch.full((2,), float(done))}, "optimizer": {"0.step": torch.tensor(done)}}
        save_checkpoint(run, 1, done, {"history": [done]}, tensors)
    found = load_checkpoint(run)
    assert has_checkpoint(run) and (found.stage, found.done, found.note) == (1, 2, {"history": [2]})
    assert torch.equal(found.tensors["model"]["a.weight"], torch.full((2,), 2.0)) and found.tensors["optimizer"]
    assert len(list(run.path.glob("state/*.safetensors"))) == 1


def test_a_lost_note_is_named_unless_nothing_was_done_yet(run):
    run.write_tensors("state/tuning-0-0000.safetensors", {"model:a": torch.zeros(1)})
    assert not has_checkpoint(run)  # died between the two files
    run.write_tensors("state/tuning-0-0001.safetensors", {"model:a": torch.zeros(1)})
    with pytest.raises(DamagedFileError, match="tuning.json is missing, but a tuning had begun"):
        has_checkpoint(run)


@pytest.mark.parametrize("key", ("stage", "done", "tensors"))
def test_a_note_without_a_key_is_damaged(run, key):
    save_checkpoint(run, 0, 1, {}, {"model": {"a": torch.zeros(1)}})
    note = run.read_json(NOTE)
    del note[key]
    run.write_json(NOTE, note)
    with pytest.raises(RunDirectoryError, match=f"is damaged: '{key}' is missing. Start the run again"):
        load_checkpoint(run)
