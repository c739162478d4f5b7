"""Saved states of quant models: what does not fit or is broken is refused."""

import pytest
import torch
from torch import nn

from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.tuning.state import load_quant_state


def test_states_of_other_models_and_broken_ones_are_refused():
    model = nn.Linear(2, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RunDirectoryError, match="is broken: weight holds values that are not finite"):
        load_quant_state(model, {**before, "weight": torch.full((3, 2), torch.nan)})
    for other in (nn.Linear(2, 4), nn.Linear(2, 3, bias=False)):
        with pytest.raises(RunDirectoryError, match="does not fit this model and scheme"):
            load_quant_state(model, other.state_dict())
    assert all(value.isfinite().all() for value in model.state_dict().values())
