"""What counts as a stage of tuning."""

import pytest

from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.tuning.stages import tuning_stages


def test_only_tuning_configurations_are_stages():
    reconstruct, distill = ReconstructConfig(), DistillConfig()
    assert tuning_stages(None) == () and tuning_stages(distill) == (distill,)
    assert tuning_stages([reconstruct, distill]) == (reconstruct, distill)
    for wrong in (["distill"], [{"epochs": 3}]):
        with pytest.raises(ConfigurationError, match="tuning: expected DistillConfig or ReconstructConfig, got"):
            tuning_stages(wrong)
