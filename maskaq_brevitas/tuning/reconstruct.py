"""Block-by-block reconstruction: each block of the quant model learns to give the float block's output.

For one block at a time, weights, LayerNorms, weight scales and activation scales are trained so that the quantized
block, fed with what the quantized blocks before it give, meets the float model's output of that block. Nothing but one
block's inputs and targets is cached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from brevitas.core.zero_point import ParameterFromRuntimeZeroPoint
from brevitas.nn import QuantIdentity
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.models.families import block_names
from maskaq_brevitas.tuning.losses import block_error
from maskaq_brevitas.tuning.rounding import learned_rounding
from maskaq_brevitas.tuning.state import put_state

__all__ = ["BlockData", "BlockFigures", "block_inputs", "reconstruct_block", "through", "trainable_parts"]


@dataclass
class BlockData:
    """What one block is reconstructed on.

    Attributes:
        float_inputs, quant_inputs: ``(images, tokens, channels)``: what reaches the block in either model.
        targets: the float block's output for ``float_inputs``.
        token_weights: weight of each token in the error, ``(images, tokens)``; equal if None.
    """

    float_inputs: Tensor
    quant_inputs: Tensor
    targets: Tensor
    token_weights: Tensor | None = None


@dataclass(frozen=True)
class BlockFigures:
    """Errors of one block's output (:func:`~maskaq_brevitas.tuning.losses.block_error`).

    Attributes:
        before, after: on the images that choose, before and after.
        train_before, train_after: on the images that it was trained on.
        kept: whether the trained state was kept; if the error rose, the block was put back.
    """

    before: float
    after: float
    train_before: float
    train_after: float
    kept: bool


def trainable_parts(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained in a block: weights, biases and LayerNorms; and the scales of weights and activations.

    Zero points stay as calibrated.
    """
    scales: dict[int, nn.Parameter] = {}
    fixed = {id(part.value) for part in module.modules() if isinstance(part, ParameterFromRuntimeZeroPoint)}
    for part in module.modules():
        if isinstance(part, QuantWeightBiasInputOutputLayer):
            own = {id(part.weight), id(part.bias)}
            found = [*part.weight_quant.parameters(), *part.input_quant.parameters()]
            scales.update({id(p): p for p in found if id(p) not in own})
        elif isinstance(part, QuantIdentity):
            scales.update({id(p): p for p in part.act_quant.parameters()})
    layers = [p for p in module.parameters() if id(p) not in scales]
    return layers, [p for p in scales.values() if id(p) not in fixed]


def reconstruct_block(
    quant_block: nn.Module,
    data: BlockData,
    held_back: BlockData | None,
    config: ReconstructConfig,
    *,
    generator: torch.Generator,
    features: Callable[[Tensor], Tensor] | None = None,
    on_step: Callable[[int, float], object] | None = None,
) -> BlockFigures:
    """Train one block in place; it is put back if its error on the images that choose would rise.

    Args:
        quant_block: a block of a calibrated quant model, in evaluation mode; frozen before and after.
        data: to train on; on the device of the block, or moved there batch by batch.
        held_back: images that choose; ``data`` chooses if None.
        config: iterations, rates, dropping.
        generator: random source on the CPU (order of images, dropped elements).
        features: the float model from this block's output to its last features; ``(images, tokens, channels)`` ->
            ``(images, features)``. Needed if ``config.feature_weight`` is above 0.
        on_step: called with the iteration (from 1) and the loss.
    """
    device = next(quant_block.parameters()).device
    judge = data if held_back is None else held_back
    train_before = _total_error(quant_block, data, config.batch_size)
    before = train_before if judge is data else _total_error(quant_block, judge, config.batch_size)
    start = {name: value.detach().clone() for name, value in quant_block.state_dict().items()}
    layers, scales = trainable_parts(quant_block)
    count = len(data.targets)
    size = min(config.batch_size, count)
    with learned_rounding(quant_block, config) as rounding, _dropped(quant_block, config.drop, generator):
        groups: list[dict[str, Any]] = [dict(params=[*layers, *rounding.parameters], lr=config.learning_rate)]
        if rounding.parameters:
            groups = [dict(params=rounding.parameters, lr=rounding.learning_rate)]
        # A scale moves by a share of itself: ranges differ by a factor of a hundred between places.
        groups += [dict(params=[p], lr=config.scale_learning_rate * float(p.detach().abs().mean())) for p in scales]
        groups = [group for group in groups if group["lr"] > 0]
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        floors = [parameter.detach().abs() * 1e-2 for parameter in scales]
        first: list[float] = []
        for step in range(config.steps):
            pick = torch.randperm(count, generator=generator)[:size].to(data.targets.device)
            inputs, targets = data.quant_inputs[pick].to(device), data.targets[pick].to(device)
            if config.drop > 0:
                dropped = _chance(inputs, config.drop, generator)
                inputs = torch.where(dropped, data.float_inputs[pick].to(device), inputs)
            weights = None if data.token_weights is None else data.token_weights[pick].to(device)
            output = quant_block(inputs)
            losses = [block_error(output, targets, weights)]
            if features is not None and config.feature_weight > 0:
                with torch.no_grad():
                    wanted = features(targets)
                losses.append(F.mse_loss(features(output), wanted))
            first = first or [max(float(loss.detach()), 1e-12) for loss in losses]
            loss = losses[0] / first[0]
            if len(losses) > 1:
                loss = loss + config.feature_weight * losses[1] / first[1]
            loss = loss + rounding.regularizer(step / config.steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for parameter, floor in zip(scales, floors, strict=True):
                    if bool((floor > 0).all()):
                        parameter.clamp_(min=floor)
            if on_step is not None:
                on_step(step + 1, float(loss.detach()))
    for parameter in (*layers, *scales):
        parameter.requires_grad_(False)
    train_after = _total_error(quant_block, data, config.batch_size)
    after = train_after if judge is data else _total_error(quant_block, judge, config.batch_size)
    kept = math.isfinite(after) and after < before
    if not kept:
        put_state(quant_block, start)
    return BlockFigures(before, after if kept else before, train_before, train_after, kept)


@torch.no_grad()
def block_inputs(model: nn.Module, images: Tensor, batch_size: int, store: Callable[..., Tensor]) -> Tensor:
    """What reaches the first block of a model, ``(images, tokens, channels)``.

    Args:
        images: normalised, ``(images, channels, height, width)``.
        store: makes an empty tensor of a shape and type, in memory or in a file.

    Raises:
        ModelError: if the model has no known blocks.
        InputError: if there are no images.
    """
    if len(images) == 0:
        raise InputError("Reconstruction needs at least one image, got none.")
    caught: list[Tensor] = []
    first = model.get_submodule(block_names(model)[0])
    handle = first.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
    device = next(iter([*model.parameters(), *model.buffers()])).device
    kept: Tensor | None = None
    try:
        for index, chunk in zip(torch.arange(len(images)).split(batch_size), images.split(batch_size), strict=True):
            model(chunk.to(device))
            found = caught.pop()
            kept = store((len(images), *found.shape[1:]), found) if kept is None else kept
            kept[index] = found.to(kept.device)
    finally:
        handle.remove()
    assert kept is not None  # there is an image
    return kept


@torch.no_grad()
def through(block: nn.Module, inputs: Tensor, batch_size: int, into: Tensor | None = None) -> Tensor:
    """The block's output for all inputs, ``(images, tokens, channels)``; written to ``into`` if given."""
    device = next(iter([*block.parameters(), *block.buffers()])).device
    output = torch.empty_like(inputs) if into is None else into
    for index, chunk in zip(torch.arange(len(inputs)).split(batch_size), inputs.split(batch_size), strict=True):
        output[index] = block(chunk.to(device)).to(output.device)
    return output


@contextmanager
def _dropped(block: nn.Module, share: float, generator: torch.Generator) -> Iterator[None]:
    """Each element of a quantized activation stays float with probability ``share`` (QDrop, Wei et al. 2022)."""
    handles = []

    def mix(_proxy: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        value = output.value if hasattr(output, "value") else output
        mixed = torch.where(_chance(value, share, generator), inputs[0], value)
        return output._replace(value=mixed) if hasattr(output, "_replace") else mixed

    try:
        if share > 0:
            for part in block.modules():
                if isinstance(part, ActQuantProxyFromInjectorBase) and part.is_quant_enabled:
                    handles.append(part.register_forward_hook(mix))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _chance(like: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Boolean, True with probability ``share``. One byte of randomness per element is plenty, and fast."""
    drawn = torch.randint(0, 256, like.shape, generator=generator, dtype=torch.uint8)
    return (drawn < round(share * 256)).to(like.device)


@torch.no_grad()
def _total_error(block: nn.Module, data: BlockData, batch_size: int) -> float:
    """Image by image batch: the weight of a token depends on the batch's median power, as in training."""
    device = next(block.parameters()).device
    total = 0.0
    for index in torch.arange(len(data.targets)).split(batch_size):
        weights = None if data.token_weights is None else data.token_weights[index].to(device)
        output = block(data.quant_inputs[index].to(device))
        total += float(block_error(output, data.targets[index].to(device), weights)) * len(index)
    return total / len(data.targets)
