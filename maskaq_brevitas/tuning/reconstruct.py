"""Block-by-block reconstruction: each block of the quant model learns to give the float block's output.

For one block at a time, weights (straight-through rounding), weight scales and activation scales are trained so that
the quantized block, fed with what the quantized blocks before it give, meets the float model's output of that block.
One block's cached inputs and targets are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from brevitas.nn import QuantIdentity
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import Tensor, nn

from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.models.families import block_names
from maskaq_brevitas.quant.equalize import row_importance

__all__ = ["block_error", "reconstruct", "trainable_parts"]


def reconstruct(
    quant_model: nn.Module,
    float_snapshot: nn.Module,
    images: Tensor,
    config: ReconstructConfig,
    *,
    generator: torch.Generator,
    token_weights: Tensor | None = None,
    first_block: int = 0,
    on_step: Callable[[str, int, float], None] | None = None,
    on_block: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Reconstruct every block of a calibrated quant model in place.

    Args:
        quant_model: calibrated model with Brevitas quantizers.
        float_snapshot: float model, see :func:`maskaq_brevitas.quant.snapshot.float_snapshot`.
        images: normalised, ``(images, channels, height, width)``; they pass through in batches of
            ``config.batch_size``.
        config: iterations, learning rates, dropping.
        generator: random source on the CPU (order of images, dropped elements).
        token_weights: weight of each token in the error, ``(images, tokens)``; equal if None.
        first_block: blocks before it are taken as done (an interrupted run continues here).
        on_step: called with block name, iteration (from 1) and loss.
        on_block: called with the block's index and its figures when it is finished.

    Returns:
        Per block: relative error of its output before and after (see :func:`block_error`).

    Raises:
        InputError: if there are no images.
        ModelError: if the model has no known blocks.
    """
    if len(images) == 0:
        raise InputError("Reconstruction needs at least one image, got none.")
    names = block_names(quant_model)
    training = {module: module.training for module in quant_model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in quant_model.parameters()}
    figures = []
    try:
        quant_model.eval().requires_grad_(False)
        float_inputs = _block_inputs(float_snapshot, names[0], images, config.batch_size)
        quant_inputs = _block_inputs(quant_model, names[0], images, config.batch_size)
        for index, name in enumerate(names):
            float_block, quant_block = float_snapshot.get_submodule(name), quant_model.get_submodule(name)
            targets = _through(float_block, float_inputs, config.batch_size)
            if index >= first_block:
                figures.append(
                    _reconstruct_block(
                        quant_block, float_inputs, quant_inputs, targets, token_weights, config, generator,
                        None if on_step is None else lambda step, loss, name=name: on_step(name, step, loss),
                    )  # fmt: skip
                )
                if on_block is not None:
                    on_block(index, figures[-1])
            quant_inputs = _through(quant_block, quant_inputs, config.batch_size)
            float_inputs = targets
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
    return figures


def block_error(output: Tensor, target: Tensor, token_weights: Tensor | None = None) -> Tensor:
    """Squared error of a block's output, each token by the power of its target.

    See :func:`maskaq_brevitas.quant.equalize.row_importance` for the weight of a token.

    Args:
        output, target: ``(images, tokens, channels)``.
        token_weights: further weight per token, ``(images, tokens)``.

    Returns:
        A scalar; about 1 if the error is as large as the target.
    """
    rows = target.reshape(-1, target.shape[-1])
    importance = row_importance(rows)
    if token_weights is not None:
        weights = token_weights.reshape(-1, 1).to(importance)
        importance = importance * weights / weights.mean()
    return ((output.reshape_as(rows) - rows).square() * importance).sum()


def trainable_parts(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Weights and biases of quantized layers, their weight scales, and the activation scales and zero points."""
    layers, weight_scales, activation_scales = [], [], []
    for part in module.modules():
        if isinstance(part, QuantWeightBiasInputOutputLayer):
            layers += [parameter for parameter in (part.weight, part.bias) if parameter is not None]
            own = {id(part.weight), id(part.bias)}
            weight_scales += [p for p in part.weight_quant.parameters() if id(p) not in own]
            activation_scales += list(part.input_quant.parameters())
        elif isinstance(part, QuantIdentity):
            activation_scales += list(part.act_quant.parameters())
    return layers, weight_scales, activation_scales


def _reconstruct_block(
    block: nn.Module,
    float_inputs: Tensor,
    quant_inputs: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    config: ReconstructConfig,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] | None,
) -> dict[str, float]:
    before = _total_error(block, quant_inputs, targets, token_weights, config.batch_size)
    layers, weight_scales, activation_scales = trainable_parts(block)
    scales = [*weight_scales, *activation_scales]
    groups = [dict(params=layers, lr=config.weight_learning_rate)]
    # A scale moves by a share of itself: ranges differ by a factor of a hundred between places.
    groups += [dict(params=[p], lr=config.scale_learning_rate * float(p.detach().abs().mean())) for p in scales]
    groups = [group for group in groups if group["lr"] > 0]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    floors = [parameter.detach().abs() * 1e-2 for parameter in scales]
    start = {name: value.detach().clone() for name, value in block.state_dict().items()}
    count = len(targets)
    size = min(config.batch_size, count)
    with _dropped_quantization(block, config.drop, generator):
        for step in range(config.steps):
            pick = torch.randperm(count, generator=generator)[:size].to(targets.device)
            inputs = quant_inputs[pick]
            if config.drop > 0:
                inputs = torch.where(_chance(inputs, config.drop, generator), float_inputs[pick], inputs)
            weights = None if token_weights is None else token_weights[pick]
            loss = block_error(block(inputs), targets[pick], weights)
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
    after = _total_error(block, quant_inputs, targets, token_weights, config.batch_size)
    if not after < before:
        block.load_state_dict(start)
    return {"before": before, "after": min(before, after)}


@contextmanager
def _dropped_quantization(block: nn.Module, share: float, generator: torch.Generator) -> Iterator[None]:
    """Each element of a quantized activation stays float with probability ``share`` (QDrop, Wei et al. 2022)."""
    handles = []

    def mix(_proxy: nn.Module, inputs: tuple, output):
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
def _total_error(
    block: nn.Module, inputs: Tensor, targets: Tensor, token_weights: Tensor | None, batch_size: int
) -> float:
    return float(block_error(_through(block, inputs, batch_size), targets, token_weights))


@torch.no_grad()
def _through(block: nn.Module, inputs: Tensor, batch_size: int) -> Tensor:
    return torch.cat([block(chunk) for chunk in inputs.split(batch_size)])


@torch.no_grad()
def _block_inputs(model: nn.Module, first: str, images: Tensor, batch_size: int) -> Tensor:
    """What reaches the first block, ``(images, tokens, channels)``."""
    caught: list[Tensor] = []
    handle = model.get_submodule(first).register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
    device = next(iter([*model.parameters(), *model.buffers()])).device
    try:
        for chunk in images.split(batch_size):
            model(chunk.to(device))
    finally:
        handle.remove()
    return torch.cat(caught)
