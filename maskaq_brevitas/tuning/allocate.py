"""Mixed precision: which layer gets how many bits, by what each costs on images without labels."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch import nn

from maskaq_brevitas.config import LayerBits
from maskaq_brevitas.config import Scheme
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.models.families import attention_modules
from maskaq_brevitas.quant.attention import OPERANDS
from maskaq_brevitas.quant.cost import multiply_accumulates
from maskaq_brevitas.quant.swap import plan_bits
from maskaq_brevitas.tuning.sensitivity import Switches
from maskaq_brevitas.tuning.sensitivity import place_layers
from maskaq_brevitas.tuning.sensitivity import sensitivity

__all__ = ["allocate_widths", "bit_operations", "candidate_widths", "choose_widths", "width_losses", "width_overrides"]


def candidate_widths(average_bits: float) -> list[int]:
    """Widths that are tried, in bits: from one below the average to two above it, and 8."""
    lowest = int(average_bits)
    return sorted({width for width in (lowest - 1, lowest, lowest + 1, lowest + 2, 8) if 2 <= width <= 8})


def allocate_widths(
    float_model: nn.Module,
    float_snapshot: nn.Module,
    scheme: Scheme,
    overrides: Mapping[str, str],
    batches: Sequence[Tensor],
    calibrated: Callable[[Scheme], nn.Module],
    on_width: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Widths of the layers that a scheme leaves open, within the bit operations of ``scheme.average_bits`` everywhere.

    Args:
        float_model, float_snapshot: the same model; the snapshot on the device.
        scheme: with ``average_bits``.
        overrides: widths that are given, see :func:`~maskaq_brevitas.quant.swap.plan_bits`.
        batches: normalised images, ``(batch, channels, height, width)`` each.
        calibrated: scheme -> quant model of it, calibrated.
        on_width: called with each width when it is measured.

    Returns:
        Overrides: name of a layer or operand -> ``wXaX``.

    Raises:
        ConfigurationError: if the smallest widths exceed the budget, or the scheme has no average.
    """
    if scheme.average_bits is None:
        raise ConfigurationError("Expected a scheme with average_bits, for example auto-4.5.")
    plan = plan_bits(float_model, scheme, overrides)
    attentions = list(attention_modules(float_model))
    held = plan_bits(float_model, replace(scheme, bits=LayerBits(8, 8)), overrides)
    operands = {f"{name}.{operand}" for name in attentions for operand in OPERANDS}
    chosen = [name for name in plan if name not in operands and plan[name] != held[name]]
    chosen += [name for name in attentions if plan[f"{name}.query"] != held[f"{name}.query"]]
    widths = candidate_widths(scheme.average_bits)
    losses = width_losses(
        lambda width: calibrated(replace(scheme, bits=LayerBits(width, width))), float_snapshot, batches, widths,
        chosen,
        on_width,
    )  # fmt: skip
    macs, fixed = multiply_accumulates(float_model), scheme.probability_bits
    costs = {name: {width: bit_operations(name, macs, width, fixed) for width in widths} for name in chosen}
    budget = sum(bit_operations(name, macs, scheme.average_bits, fixed) for name in chosen)
    return width_overrides(choose_widths(losses, costs, budget), attentions, fixed is None)


def width_losses(
    calibrated: Callable[[int], nn.Module],
    float_snapshot: nn.Module,
    batches: Sequence[Tensor],
    widths: Sequence[int],
    chosen: Sequence[str],
    on_width: Callable[[int], None] | None = None,
) -> dict[str, dict[int, float]]:
    """KL divergence that each layer or attention module costs by itself at each width, in nats.

    Args:
        calibrated: width -> quant model with weights and activations at that width, calibrated.
        float_snapshot: float model on the same device.
        batches: normalised images, ``(batch, channels, height, width)`` each.
        widths: in bits.
        chosen: names of layers and attention modules whose width is open.
        on_width: called with each width when it is measured.
    """
    losses: dict[str, dict[int, float]] = {name: {} for name in chosen}
    for width in widths:
        quant_model = calibrated(width)
        groups = place_layers(Switches(quant_model).names)
        groups = {name: _open_switches(name, members) for name, members in groups.items() if name in losses}
        for entry in sensitivity(quant_model, float_snapshot, batches, groups):
            losses[entry.name][width] = entry.divergence
        if on_width is not None:
            on_width(width)
    return losses


def bit_operations(name: str, macs: Mapping[str, int], width: float, probability_bits: int | None) -> float:
    """Bit operations of one image in a layer, or in both matmuls of an attention module, at a width.

    Args:
        name: of a layer or attention module.
        macs: multiply-accumulates by name; ``<attention>.query`` and ``<attention>.probabilities`` for matmuls.
        width: of weights, activations and operands, in bits.
        probability_bits: width of the probabilities; ``None``: as the other operands.
    """
    if f"{name}.query" not in macs:
        return macs.get(name, 0) * width * width
    other = width if probability_bits is None else probability_bits
    return macs[f"{name}.query"] * width * width + macs[f"{name}.probabilities"] * width * other


def choose_widths(
    losses: Mapping[str, Mapping[int, float]], costs: Mapping[str, Mapping[int, float]], budget: float
) -> dict[str, int]:
    """One width per name, greedily: always the step that saves most loss per cost and still fits.

    Losses of layers are taken to add up; a width that costs more and loses more than a smaller one is never chosen.

    Args:
        losses, costs: per name and width.
        budget: sum of costs that may not be exceeded.

    Raises:
        ConfigurationError: if the smallest widths together exceed the budget.
    """
    chosen = {name: min(widths) for name, widths in losses.items()}
    spent = sum(costs[name][width] for name, width in chosen.items())
    if spent > budget:
        raise ConfigurationError(
            f"Expected a budget of at least {spent:.4g} (all at {min(chosen.values())} bits), got {budget:.4g}."
        )
    while True:
        best: tuple[float, str, int] | None = None
        for name, width in chosen.items():
            for wider in (found for found in losses[name] if found > width):
                price = costs[name][wider] - costs[name][width]
                gain = losses[name][width] - losses[name][wider]
                if gain > 0 and spent + price <= budget:
                    rate = gain / max(price, 1e-12)
                    if best is None or rate > best[0]:
                        best = (rate, name, wider)
        if best is None:
            return chosen
        _, name, wider = best
        spent += costs[name][wider] - costs[name][chosen[name]]
        chosen[name] = wider


def width_overrides(widths: Mapping[str, int], attentions: Sequence[str], with_probabilities: bool) -> dict[str, str]:
    """The widths as per-layer overrides of :func:`~maskaq_brevitas.quant.swap.swap_layers`."""
    overrides = {}
    for name, width in widths.items():
        bits = f"w{width}a{width}"
        if name not in attentions:
            overrides[name] = bits
            continue
        for operand in OPERANDS:
            if with_probabilities or operand != "probabilities":
                overrides[f"{name}.{operand}"] = bits
    return overrides


def _open_switches(name: str, members: Sequence[str]) -> list[str]:
    """Without the probabilities, whose width the scheme fixes."""
    return [member for member in members if member != f"{name}.probabilities"]
