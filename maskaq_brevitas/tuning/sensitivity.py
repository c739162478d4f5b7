"""What each quantized place costs by itself: everything in float but that place (METHOD.md, section 6)."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import InputError
from maskaq_brevitas.models.families import has_classes
from maskaq_brevitas.quant.snapshot import FakeQuantize
from maskaq_brevitas.quant.snapshot import FrozenLayer
from maskaq_brevitas.quant.snapshot import frozen_snapshot
from maskaq_brevitas.tuning.losses import output_divergence
from maskaq_brevitas.tuning.ranges import mean_weight_error

__all__ = ["Sensitivity", "Switches", "place_blocks", "place_kinds", "place_layers", "sensitivity"]


#: Weight and bias of a layer.
_Affine = tuple[Tensor, nn.Parameter | None]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What quantizing one group of places costs.

    Attributes:
        name: of the group.
        places: how many quantizers it has.
        divergence: KL divergence of the float model's output from that of the model with only this group quantized, in
            nats, mean over images; of a model without classes, the relative squared error of its features.
        agreement: share of images with the float model's top-1, 0-1.
    """

    name: str
    places: int
    divergence: float
    agreement: float


class Switches:
    """A frozen copy of a calibrated quant model in which every quantizer can be switched on alone.

    Switches are named ``<layer>.weight``, ``<layer>.input`` and ``<attention>.<operand>``. What a bias holds for the
    rounding of its weight (bias correction, and what tuning made of it) goes with that weight.

    Args:
        quant_model: calibrated; not changed.
    """

    def __init__(self, quant_model: nn.Module):
        self.model = frozen_snapshot(quant_model)
        self._quantizers: dict[str, tuple[nn.Module, str, nn.Module]] = {}
        self._weights: dict[str, tuple[FrozenLayer, _Affine, _Affine]] = {}
        for name, module in list(self.model.named_modules()):
            if isinstance(module, FakeQuantize):
                parent, _, child = name.rpartition(".")
                switch = f"{parent}.input" if child == "input_quant" else name
                self._quantizers[switch] = (self.model.get_submodule(parent), child, module)
                if child == "input_quant":
                    layer = cast(FrozenLayer, self.model.get_submodule(parent))
                    source: QuantWeightBiasInputOutputLayer = quant_model.get_submodule(parent)
                    weight, bias = source.weight.detach(), layer.bias
                    if bias is not None and hasattr(source, "input_mean"):
                        bias = nn.Parameter(bias - mean_weight_error(source), requires_grad=False)
                    self._weights[f"{parent}.weight"] = (layer, (layer.weight, layer.bias), (weight, bias))
        self.set(())

    @property
    def names(self) -> list[str]:
        """All switches: weights first, then activations, each in the model's order."""
        return [*self._weights, *self._quantizers]

    def set(self, on: Iterable[str]) -> None:
        """Quantize exactly the places named; the others compute in float.

        Raises:
            InputError: if a name is no switch.
        """
        chosen = set(on)
        if unknown := chosen.difference(self.names):
            raise InputError(
                f"Unknown switches: {', '.join(sorted(unknown))}. Expected names such as {self.names[0]!r}."
            )
        for name, (parent, child, quantizer) in self._quantizers.items():
            setattr(parent, child, quantizer if name in chosen else nn.Identity())
        for name, (layer, quantized, plain) in self._weights.items():
            layer.weight, layer.bias = quantized if name in chosen else plain


def place_kinds(names: Sequence[str]) -> dict[str, list[str]]:
    """Switches grouped by what they are in a block: ``"mlp.fc2 input"``, ``"attn.probabilities"`` ..."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = [part for part in name.split(".") if not part.isdigit()]
        kind = ".".join(parts[parts.index("blocks") + 1 :] if "blocks" in parts else parts)
        for suffix in ("weight", "input"):
            kind = kind.replace(f".{suffix}", f" {suffix}")
        groups.setdefault(kind, []).append(name)
    return groups


def place_layers(names: Sequence[str]) -> dict[str, list[str]]:
    """Switches grouped by layer or attention module."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return groups


def place_blocks(names: Sequence[str]) -> dict[str, list[str]]:
    """Switches grouped by transformer block; those outside by layer."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        inside = parts.index("blocks") + 2 if "blocks" in parts else 0  # stages hold their blocks in Swin
        key = ".".join(parts[:inside]) or name.rpartition(".")[0]
        groups.setdefault(key, []).append(name)
    return groups


@torch.no_grad()
def sensitivity(
    quant_model: nn.Module,
    float_snapshot: nn.Module,
    batches: Sequence[Tensor],
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    inverted: bool = False,
    on_group: Callable[[Sensitivity], None] | None = None,
) -> list[Sensitivity]:
    """Measure each group of quantizers by itself, on images without labels.

    Args:
        quant_model: calibrated.
        float_snapshot: float model on the same device.
        batches: normalised images, ``(batch, channels, height, width)`` each.
        groups: name -> switches (:class:`Switches`); ``None`` groups by kind (:func:`place_kinds`), with a last group
            of all.
        inverted: switch each group *off* and leave all others on, instead.
        on_group: called with each figure when it is known.

    Raises:
        InputError: if there is no image, or a switch is unknown.
    """
    if not batches:
        raise InputError("Sensitivity needs at least one batch of images, got none.")
    switches = Switches(quant_model)
    if groups is None:
        groups = {**place_kinds(switches.names), "all": switches.names}
    targets = torch.cat([float_snapshot(images) for images in batches])
    found = []
    for name, members in groups.items():
        switches.set(set(switches.names).difference(members) if inverted else members)
        output = torch.cat([switches.model(images) for images in batches])
        divergence = output_divergence(targets, output, has_classes(float_snapshot), 1.0)
        found.append(Sensitivity(
            name=name, places=len(members), divergence=float(divergence),
            agreement=float((output.argmax(-1) == targets.argmax(-1)).float().mean()),
        ))  # fmt: skip
        if on_group is not None:
            on_group(found[-1])
    return found
