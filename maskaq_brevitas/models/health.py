"""What is wrong with the numbers of a model, by name, before and after it is quantized."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ModelError

__all__ = ["check_finite", "not_finite"]


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]


def check_finite(model: nn.Module, what: str) -> None:
    """Refuse a model with NaN or infinity among its parameters and buffers.

    Args:
        what: names the model in the message, for example ``"float_model"``.

    Raises:
        ModelError: naming the first three tensors that are affected, and how many of their values.
    """
    state = model.state_dict()
    broken = [
        f"{name} ({int((~state[name].isfinite()).sum())} of {state[name].numel()} values)" for name in not_finite(state)
    ]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ModelError(
            f"{what}: expected finite numbers, got NaN or infinity in {', '.join(broken[:3])}{more}. Load weights that "
            "are whole."
        )
