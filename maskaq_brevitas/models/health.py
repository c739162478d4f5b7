"""What is wrong with the numbers of a model, by name, before and after it is quantized."""

from __future__ import annotations

from torch import nn

from maskaq_brevitas.errors import ModelError

__all__ = ["check_finite"]


def check_finite(model: nn.Module, what: str) -> None:
    """Refuse a model with NaN or infinity among its parameters and buffers.

    Args:
        what: names the model in the message, for example ``"float_model"``.

    Raises:
        ModelError: naming the first three tensors that are affected, and how many of their values.
    """
    broken = [
        f"{name} ({int((~tensor.isfinite()).sum())} of {tensor.numel()} values)"
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ModelError(
            f"{what}: expected finite numbers, got NaN or infinity in {', '.join(broken[:3])}{more}. Load weights that "
            "are whole."
        )
