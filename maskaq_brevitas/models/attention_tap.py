"""Hands out the attention of any model, float or quantized, while a context is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from typing import Literal
from typing import cast

from torch import Tensor
from torch import nn

from maskaq_brevitas.models.attention import Tap
from maskaq_brevitas.models.families import attention_modules
from maskaq_brevitas.models.families import explicit_form
from maskaq_brevitas.models.graph_attention import graph_taps
from maskaq_brevitas.models.graph_attention import is_graph_module

__all__ = ["AttentionRecord", "TapPoint", "attention_tap"]

TapPoint = Literal["logits", "probabilities", "context"]

# ``probabilities`` are read behind the softmax, before any quantizer: rounding them would hide their gradient.
_PLACES: dict[TapPoint, str] = {"logits": "logits", "probabilities": "attention", "context": "context"}


@dataclass
class AttentionRecord:
    """What one forward pass of a tapped model left behind; each new pass overwrites it.

    Attributes:
        logits, probabilities: one ``(batch, heads, tokens, tokens)`` per layer, input side first.
        context: one ``(batch, heads, tokens, head_dim)`` per layer: the product of probabilities and values.
    """

    logits: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    context: list[Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the tensors (and with them their graph)."""
        for point in _PLACES:
            getattr(self, point).clear()


@contextmanager
def attention_tap(model: nn.Module, *points: TapPoint) -> Iterator[AttentionRecord]:
    """A context in which every forward pass of ``model`` records its attention.

    Foreign attention modules are written out for the duration (same parameters, same function up to the last bits of a
    fused kernel) and put back on exit, also after an error; no hook stays behind. In an FX-traced model the places are
    found in its graph (:mod:`maskaq_brevitas.models.graph_attention`), which is put back likewise.

    Args:
        model: a float model, one with quantized twins, or an FX-traced one, float or quantized by Brevitas.
        points: what to record; nothing else is kept alive.

    Raises:
        ModelError: if the model has no known attention.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2)
        >>> with attention_tap(model, "logits") as record, torch.no_grad():
        ...     _ = model(torch.zeros(1, 3, 32, 32))
        >>> len(record.logits), record.logits[0].shape
        (2, torch.Size([1, 3, 5, 5]))
    """
    record = AttentionRecord()
    opened: list[tuple[Tap, list[Tensor]]] = []
    written_out = graph_taps if is_graph_module(model) else _written_out
    with ExitStack() as stack:
        places = stack.enter_context(written_out(model))
        stack.callback(model.register_forward_pre_hook(lambda *_: record.clear()).remove)
        try:
            for point in points:
                for place in places:
                    tap, listener = cast(Tap, place.get_submodule(_PLACES[point])), getattr(record, point)
                    tap.open(listener)
                    opened.append((tap, listener))
            yield record
        finally:
            for tap, listener in opened:
                tap.close(listener)


@contextmanager
def _written_out(model: nn.Module) -> Iterator[list[nn.Module]]:
    """A context in which all attention modules of a model are explicit; yields them, input side first."""
    originals: list[tuple[nn.Module, str, nn.Module]] = []
    places: list[nn.Module] = []
    try:
        for name, module in attention_modules(model).items():
            explicit = explicit_form(module)
            if explicit is not module:
                parent = model.get_submodule(name.rpartition(".")[0])
                originals.append((parent, name.rpartition(".")[2], module))
                setattr(parent, name.rpartition(".")[2], explicit)
            places.append(explicit)
        yield places
    finally:
        for parent, child, module in originals:
            module.training = getattr(parent, child).training  # train() or eval() of the model while it was away
            setattr(parent, child, module)
