"""The state of a quant model, as it is kept and put back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.models.health import not_finite

__all__ = ["copied_state", "load_quant_state", "put_state"]


def copied_state(quant_model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters, scales and buffers, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in quant_model.state_dict().items()}


def put_state(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` of a quant model or a part of it, which stays where it is.

    Brevitas makes each quantizer anew when it loads one, on the CPU.
    """
    device = next(part.parameters()).device
    try:
        part.load_state_dict(dict(state))
    finally:
        part.to(device)


def load_quant_state(quant_model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a saved state into a quant model that was swapped in the same way.

    Raises:
        RunDirectoryError: if names or shapes differ, or a value is not finite.
    """
    for name in not_finite(state):
        raise RunDirectoryError(f"The saved quant model is broken: {name} holds values that are not finite.")
    try:
        put_state(quant_model, state)
    except RuntimeError as error:
        raise RunDirectoryError(f"The saved quant model does not fit this model and scheme: {error}") from error
