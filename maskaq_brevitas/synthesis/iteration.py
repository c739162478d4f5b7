"""One iteration of synthesis: what is drawn for it, the terms of the objective, and the gradient to the images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.config import AttentionKind
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import MemoryWarning
from maskaq_brevitas.models.attention_tap import AttentionRecord
from maskaq_brevitas.models.attention_tap import TapPoint
from maskaq_brevitas.models.attention_tap import attention_tap
from maskaq_brevitas.models.families import attention_modules
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.models.token_choice import TokenChoice
from maskaq_brevitas.models.token_choice import token_choice
from maskaq_brevitas.modes import arithmetic
from maskaq_brevitas.synthesis import augment
from maskaq_brevitas.synthesis import masks
from maskaq_brevitas.synthesis import memory
from maskaq_brevitas.synthesis import objectives
from maskaq_brevitas.synthesis.tokens import KeptTokens

__all__ = [
    "Gradient",
    "Networks",
    "informative",
    "networks",
    "objective_gradient",
    "received",
    "tap_points",
]


@dataclass
class Networks:
    """Both networks, tapped, and what an objective of theirs depends on.

    Attributes:
        geometry: of the model.
        config: weights, kinds of attention, schedules.
        float_snapshot, quant_snapshot: frozen; without the second there is no alignment.
        seen_by_float, seen_by_quant: their attention in the last forward pass.
        choice: tells them which tokens to leave out; None if none is.
        graph_bytes: what autograd keeps for one image of all tokens, of both together.
        most: images that pass through them at once, at most; less after memory ran out.
    """

    geometry: Geometry
    config: SynthesisConfig
    float_snapshot: nn.Module
    quant_snapshot: nn.Module | None
    seen_by_float: AttentionRecord
    seen_by_quant: AttentionRecord | None
    choice: TokenChoice | None
    graph_bytes: int
    most: int

    def forget(self) -> None:
        """Let go of the recorded attention, and with it of the graphs of the last pass."""
        self.seen_by_float.clear()
        if self.seen_by_quant is not None:
            self.seen_by_quant.clear()


@dataclass
class Gradient:
    """What an iteration found, one row per image.

    Attributes:
        objective: ``(batch,)``.
        terms: each term that is switched on, without its weight, ``(batch,)``.
        images: gradient of the objective, ``(batch, channels, height, width)``.
        received: attention that each kept patch received from the float model, mean over layers, ``(batch, patches)``.
    """

    objective: Tensor
    terms: dict[str, Tensor]
    images: Tensor
    received: Tensor


@dataclass
class _Draws:
    """All that an iteration leaves to chance, drawn for the whole batch, so that no result depends on its parts."""

    crops: Tensor | None  # (batch, 2, 3); None: rolled by the offset, and perhaps mirrored
    down: int
    right: int
    flipped: bool
    factors: Tensor
    offsets: Tensor
    head_rows: list[Tensor | None] | None
    entropy_rows: list[Tensor | None] | None
    dropping: Tensor  # (batch, patches), or (layers, batch, patches) for a mask per layer


@contextmanager
def networks(
    float_snapshot: nn.Module,
    quant_snapshot: nn.Module | None,
    geometry: Geometry,
    config: SynthesisConfig,
    images: Tensor,
) -> Iterator[Networks]:
    """Both networks with their attention tapped, and told which tokens to leave out.

    Args:
        images: the batch; what the networks keep for its first image is measured.
    """
    points = tap_points(config)
    if config.align_weight == 0:
        quant_snapshot = None
    models = [float_snapshot] if quant_snapshot is None else [float_snapshot, quant_snapshot]
    with (
        attention_tap(float_snapshot, *points) as seen_by_float,
        nullcontext(None) if quant_snapshot is None else attention_tap(quant_snapshot, *points) as seen_by_quant,
        token_choice(models) if config.kept_tokens < 1 else nullcontext(None) as choice,
    ):
        both = Networks(
            geometry, config, float_snapshot, quant_snapshot, seen_by_float, seen_by_quant, choice, 0, most=len(images)
        )
        try:
            both.graph_bytes = sum(
                memory.graph_bytes(model, images[:1], precision=config.precision) for model in models
            )
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            both.most = 1
            _warn(both.most)
        both.forget()
        yield both


def objective_gradient(
    images: Tensor,
    labels: Tensor,
    both: Networks,
    tokens: KeptTokens,
    progress: float,
    generator: torch.Generator,
    *,
    align: float = 1.0,
) -> Gradient:
    """Objective and its gradient to the images, which pass through the networks in parts that fit into memory.

    Args:
        images: normalised, ``(batch, channels, height, width)``.
        labels: ``(batch,)``.
        tokens: the patches that are kept.
        progress: 0 at the first iteration, 1 at the last.
        generator: random source on the CPU.
        align: how many times the gradient of the alignment counts; 0 leaves the quantized model and its term out.
    """
    geometry = both.geometry
    draws = _draw(images, both, tokens, progress, generator)
    share = (geometry.prefix_tokens + tokens.places.shape[1]) / (geometry.prefix_tokens + geometry.patches)
    most = min(both.most, memory.fitting(both.graph_bytes * share, images.device, both.config.memory_mib))
    while True:
        try:
            found = [
                _of_part(part, images, labels, both, tokens, progress, draws, align)
                for part in memory.parts(len(images), most)
            ]
            break
        except RuntimeError as error:
            if not memory.is_out_of_memory(error) or most == 1:
                raise
        # Outside of the handler: the traceback holds what ran out.
        most = both.most = max(1, min(most, len(images)) // 2)
        _warn(most)
    return Gradient(
        torch.cat([part.objective for part in found]),
        {name: torch.cat([part.terms[name] for part in found]) for name in found[0].terms},
        torch.cat([part.images for part in found]),
        torch.cat([part.received for part in found]),
    )


def _warn(most: int) -> None:
    warnings.warn(f"Out of memory: going on with {most} images at once, more slowly.", MemoryWarning, stacklevel=3)


def _draw(
    images: Tensor,
    both: Networks,
    tokens: KeptTokens,
    progress: float,
    generator: torch.Generator,
) -> _Draws:
    geometry, config = both.geometry, both.config
    tokens.draw(generator)
    reach, crops = 0, None
    if config.view_area < 1:
        mirrored = 0.5 if config.flip else 0.0
        crops = augment.draw_crops(tuple(images.shape), config.view_area, config.view_turn, mirrored, generator)
    else:
        reach = round((config.jitter if progress < 0.5 else config.late_jitter) * min(geometry.input_size[1:]) / 224)
    down, right = augment.draw_roll(reach, generator)
    factors, offsets = augment.draw_colours(
        len(images), images.shape[1], config.colour_shift * (1 - progress), config.colour_scale, generator
    )
    flipped = crops is None and config.flip and bool(torch.rand((), generator=generator) < 0.5)
    patches = tokens.places.shape[1]
    modules = len(attention_modules(both.float_snapshot))
    queries = [patches] * modules  # of each layer
    if geometry.layouts:
        queries = [
            patches if layout.window is None and not layout.pooling and layout.grid == geometry.grid else layout.queries
            for layout in geometry.layouts
        ]
    head_rows = _rows(config.head_rows, queries, generator) if config.head_weight > 0 else None
    entropy_rows = _rows(config.entropy_rows, queries, generator) if config.entropy_weight > 0 else None
    layers = (modules,) if config.mask_per_layer and config.mask_enabled else ()
    dropping = torch.rand((*layers, len(images), patches), generator=generator)
    return _Draws(crops, down, right, flipped, factors, offsets, head_rows, entropy_rows, dropping)


def _of_part(
    part: slice,
    images: Tensor,
    labels: Tensor,
    both: Networks,
    tokens: KeptTokens,
    progress: float,
    draws: _Draws,
    align: float,
) -> Gradient:
    """The iteration for the images of ``part``; no graph outlives it."""
    leaves = images[part].detach().requires_grad_(True)
    try:
        terms = _terms(part, leaves, labels[part], both, tokens, progress, draws, align > 0)
        if not terms:
            raise ConfigurationError(
                f"Nothing shapes the images: {type(both.float_snapshot).__name__} has no classes, and every other "
                "weight is 0."
            )
        objective = reduce(torch.add, (weight * term for weight, term in terms.values()))
        pull = objective
        if align > 1 and "align" in terms:
            weight, distance = terms["align"]
            pull = objective + (align - 1) * weight * distance
        (gradient,) = torch.autograd.grad(pull.sum(), leaves)
        kind = both.config.mask_attention
        seen = received(both.seen_by_float, kind, both.geometry, both.float_snapshot).detach().mean(dim=0)
    finally:
        both.forget()
    return Gradient(objective.detach(), {name: term.detach() for name, (_, term) in terms.items()}, gradient, seen)


def _terms(
    part: slice,
    images: Tensor,
    labels: Tensor,
    both: Networks,
    tokens: KeptTokens,
    progress: float,
    draws: _Draws,
    aligned: bool,
) -> dict[str, tuple[float, Tensor]]:
    """Weight and value ``(images,)`` of every term that is switched on, from one forward pass of each network, or of
    the float one alone.
    """
    geometry, config = both.geometry, both.config
    quant_snapshot = both.quant_snapshot if aligned else None
    if draws.crops is None:
        x = torch.roll(images, shifts=(draws.down, draws.right), dims=(-2, -1))
    else:
        x = augment.cut_out(images, draws.crops[part])
    x = x * draws.factors[part].to(x) + draws.offsets[part].to(x)
    x = x.flip(-1) if draws.flipped else x
    if both.choice is not None:
        both.choice.indices = tokens.tokens(draws.down, draws.right, draws.flipped)[part].to(x.device)
    patches = tokens.places.shape[1]
    terms: dict[str, tuple[float, Tensor]] = {}
    with arithmetic(config.precision, x.device):
        logits = both.float_snapshot(x)
        quant_logits = None if quant_snapshot is None else quant_snapshot(x)
    if config.class_weight > 0 and geometry.num_classes > 0:
        terms["class"] = config.class_weight, objectives.class_loss(logits.float(), labels)
    elif config.class_weight > 0 and quant_logits is not None:
        terms["features"] = config.class_weight, objectives.feature_alignment_loss(logits, quant_logits)
    if config.tv_weight > 0:
        norm = objectives.total_variation if config.tv_norm == "l2" else objectives.total_variation_l1
        terms["tv"] = config.tv_weight, norm(images)

    def seen(kind: AttentionKind) -> tuple[list[Tensor], int]:
        """Attention of each layer, and the number of prefix tokens that are still in it."""
        attention = _attention(both.seen_by_float, kind, geometry, both.float_snapshot)
        if not geometry.layouts:
            return attention, geometry.prefix_tokens
        return [layout.among_patches(layer) for layout, layer in zip(geometry.layouts, attention, strict=True)], 0

    def on_device(rows: list[Tensor | None] | None) -> list[Tensor | None] | None:
        return None if rows is None else [None if chosen is None else chosen.to(x.device) for chosen in rows]

    if config.head_weight > 0:
        head = objectives.head_coherence_loss(*seen(config.head_attention), on_device(draws.head_rows), images=len(x))
        terms["head"] = config.head_weight, head
    if config.entropy_weight > 0:
        entropy = objectives.entropy_loss(*seen(config.entropy_attention), on_device(draws.entropy_rows), images=len(x))
        terms["entropy"] = config.entropy_weight, entropy
    if quant_snapshot is not None and both.seen_by_quant is not None:
        share = masks.mask_share(progress, config.mask_start, config.mask_end) * geometry.patches / patches
        mask, float_rows = informative(both.seen_by_float, geometry, config, both.float_snapshot, min(1.0, share))
        mask = masks.drop_at_random(mask, config.mask_drop, draws.dropping[..., part, :])
        quant_rows = received(both.seen_by_quant, config.align_attention, geometry, quant_snapshot)
        terms["align"] = config.align_weight, objectives.masked_alignment_loss(float_rows, quant_rows, mask)
    return terms


def _rows(count: int | None, queries: list[int], generator: torch.Generator) -> list[Tensor | None]:
    """``count`` of the queries of each layer drawn at random, indices; None for all. Layers of one size share a draw.
    """
    drawn = {
        size: None if count is None or count >= size else torch.randperm(size, generator=generator)[:count]
        for size in dict.fromkeys(queries)
    }
    return [drawn[size] for size in queries]


def informative(
    record: AttentionRecord, geometry: Geometry, config: SynthesisConfig, model: nn.Module, share: float
) -> tuple[Tensor, Tensor]:
    """The informative patches by the float model, and the rows that alignment compares, ``(layers, batch, patches)``.
    """
    rows = received(record, config.align_attention, geometry, model)
    if not config.mask_enabled:
        return torch.ones_like(rows[0], dtype=torch.bool), rows
    seen = rows.detach()
    if config.mask_attention != config.align_attention:
        seen = received(record, config.mask_attention, geometry, model).detach()
    return masks.informative_mask(seen if config.mask_per_layer else seen.mean(dim=0), share), rows


def received(record: AttentionRecord, kind: AttentionKind, geometry: Geometry, model: nn.Module) -> Tensor:
    """The attention that each patch received, ``(layers, batch, patches)``, on the grid that all layers have in common.
    """
    attention = _attention(record, kind, geometry, model)
    if geometry.layouts:
        return torch.stack([
            layout.received(layer, geometry.grid) for layout, layer in zip(geometry.layouts, attention, strict=True)
        ])  # fmt: skip
    return masks.received_attention(attention, geometry.prefix_tokens, geometry.class_token)


def _attention(record: AttentionRecord, kind: AttentionKind, geometry: Geometry, model: nn.Module) -> list[Tensor]:
    """The recorded attention of the kind a term asks for."""
    if kind == "probabilities":
        return record.probabilities
    if kind == "logits":
        return record.logits
    scales: list[Any] = [
        module.scale for module in model.modules() if hasattr(module, "logits") and hasattr(module, "scale")
    ]
    return [logits / scale for logits, scale in zip(record.logits, scales, strict=True)]


def tap_points(config: SynthesisConfig) -> tuple[TapPoint, ...]:
    kinds = (config.head_attention, config.entropy_attention, config.align_attention, config.mask_attention)
    points: list[TapPoint] = ["probabilities"] if "probabilities" in kinds else []
    return (*points, "logits") if any(kind != "probabilities" for kind in kinds) else tuple(points)
