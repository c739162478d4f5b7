"""What is kept of a tuning, and that a note or a state which does not fit is named instead of taken."""

import pytest
import torch
from torch import nn

from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import DamagedFileError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.tuning.checkpoint import has_checkpoint
from maskaq_brevitas.tuning.checkpoint import load_checkpoint
from maskaq_brevitas.tuning.checkpoint import save_checkpoint
from maskaq_brevitas.tuning.stages import tuning_stages
from maskaq_brevitas.tuning.state import load_quant_state

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


def test_states_of_other_models_and_broken_ones_are_refused():
    model = nn.Linear(2, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RunDirectoryError, match="is broken: weight holds values that are not finite"):
        load_quant_state(model, {**before, "weight": torch.full((3, 2), torch.nan)})
    for other in (nn.Linear(2, 4), nn.Linear(2, 3, bias=False)):
        with pytest.raises(RunDirectoryError, match="does not fit this model and scheme"):
            load_quant_state(model, other.state_dict())
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_only_tuning_configurations_are_stages():
    reconstruct, distill = ReconstructConfig(), DistillConfig()
    assert tuning_stages(None) == () and tuning_stages(distill) == (distill,)
    assert tuning_stages([reconstruct, distill]) == (reconstruct, distill)
    for wrong in (["distill"], [{"epochs": 3}]):
        with pytest.raises(ConfigurationError, match="tuning: expected DistillConfig or ReconstructConfig, got"):
            tuning_stages(wrong)
