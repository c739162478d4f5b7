"""The reconstruction of a run: block after block, with a checkpoint behind each."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.models.block_path import bound_arguments
from maskaq_brevitas.models.families import block_names
from maskaq_brevitas.models.families import block_passages
from maskaq_brevitas.models.families import features_behind
from maskaq_brevitas.modes import evaluation_mode
from maskaq_brevitas.modes import own_modes
from maskaq_brevitas.modes import seeded_by
from maskaq_brevitas.progress import BarFactory
from maskaq_brevitas.progress import random_stream
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.synthesis.maker import PoolMaker
from maskaq_brevitas.synthesis.pool import SyntheticImages
from maskaq_brevitas.tuning.checkpoint import Checkpoint
from maskaq_brevitas.tuning.checkpoint import save_checkpoint
from maskaq_brevitas.tuning.reconstruct import BlockData
from maskaq_brevitas.tuning.reconstruct import block_inputs
from maskaq_brevitas.tuning.reconstruct import reconstruct_block
from maskaq_brevitas.tuning.reconstruct import through

__all__ = ["ReconstructStage", "varied"]

# Random streams of blocks lie beyond those of pool versions and epochs.
_BLOCKS = 2_000_000


class ReconstructStage:
    """One reconstruction, start to end.

    Args:
        quant_model: calibrated; tuned in place.
        maker: has the pools and the float model.
        config: of the reconstruction.
        history: one entry per finished block; grows.
        run: where checkpoints are kept, or None.
        stage: index of this stage in the run.
        bar: makes progress bars.
    """

    def __init__(
        self,
        quant_model: nn.Module,
        maker: PoolMaker,
        config: ReconstructConfig,
        *,
        history: list[dict[str, Any]],
        run: RunDirectory | None,
        stage: int,
        bar: BarFactory,
    ):
        self.quant_model = quant_model
        self.maker = maker
        self.config = config
        self.history = history
        self.run = run
        self.stage = stage
        self.bar = bar
        self.names = block_names(quant_model)
        self.blocks = 0

    def start(self) -> None:
        """Keep the model as it is: a resumed run must not calibrate again."""
        self._save()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this stage. The quant model has its state already."""
        self.blocks = checkpoint.done

    def execute(self) -> None:
        """The blocks that are left, each chosen on the held-back images.

        Raises:
            ModelError: if the model has no known blocks, or feature_weight needs what it does not have.
        """
        wanted = {parameter: parameter.requires_grad for parameter in self.quant_model.parameters()}
        with tempfile.TemporaryDirectory(prefix="maskaq-") as folder, own_modes(), evaluation_mode(self.quant_model):
            try:
                self.quant_model.requires_grad_(False)
                self._execute(Path(folder))
            finally:
                for parameter, flag in wanted.items():
                    parameter.requires_grad_(flag)

    def _execute(self, folder: Path) -> None:
        data = self._data(self.maker.pool, folder, varied_by=self.config.variants)
        held_back = None if self.maker.held_back is None else self._data(self.maker.held_back, folder)
        parts = [part for part in (data, held_back) if part is not None]
        image = self.maker.pool.images()[:1].to(self.maker.device)
        passages = block_passages(self.quant_model)
        with (
            bound_arguments(self.maker.float_snapshot, image),
            bound_arguments(self.quant_model, image),
            self.bar(len(self.names) * self.config.steps, "Reconstructing blocks") as bar,
        ):
            for index, name in enumerate(self.names):
                start = time.perf_counter()
                float_block = self.maker.float_snapshot.get_submodule(name)
                quant_block = self.quant_model.get_submodule(name)
                for part in parts:
                    if name in passages:
                        self._pass(part, passages[name], folder)
                    through(float_block, part.float_inputs, self.config.batch_size, part.targets)
                if index < self.blocks:
                    bar.update(self.config.steps)
                else:
                    features = None
                    if self.config.feature_weight > 0:
                        features = features_behind(self.maker.float_snapshot, name)
                    figures = reconstruct_block(
                        quant_block, data, held_back, self.config, features=features,
                        generator=random_stream(self.maker.seed, _BLOCKS + self.stage, index),
                        on_step=lambda _step, loss: (bar.update(), bar.set_postfix(loss=f"{loss:.4f}")),
                    )  # fmt: skip
                    seconds = round(time.perf_counter() - start, 2)
                    self.history.append(
                        dict(event="block", block=name, **dataclasses.asdict(figures), seconds=seconds)
                    )
                    self.blocks = index + 1
                    self._save()
                for part in parts:
                    through(quant_block, part.quant_inputs, self.config.batch_size, part.quant_inputs)
                    # The targets are the next block's float inputs; their old place takes the next targets.
                    part.float_inputs, part.targets = part.targets, part.float_inputs

    def _data(self, pool: SyntheticImages, folder: Path, varied_by: int = 1) -> BlockData:
        """Inputs of the first block in both models, with room for targets; in files if they are too large."""
        images = pool.images()
        weights = None
        if self.config.informative_weight != 1:
            patches = torch.where(pool.informative, self.config.informative_weight, 1.0)
            weights = torch.cat([torch.ones(len(pool), self.maker.geometry.prefix_tokens), patches], dim=1)
            if block_passages(self.quant_model):  # stages have grids of their own
                weights = patches.view(-1, *self.maker.geometry.grid)
        if varied_by > 1:
            images = varied(images, varied_by, random_stream(self.maker.seed, _BLOCKS + self.stage, 99_999))
            weights = None  # the informative patches of a crop lie elsewhere

        size, store = self.config.batch_size, self._storage(folder)
        float_inputs = block_inputs(self.maker.float_snapshot, images, size, store)
        quant_inputs = block_inputs(self.quant_model, images, size, store)
        return BlockData(float_inputs, quant_inputs, store(tuple(float_inputs.shape), float_inputs), weights)

    def _pass(self, part: BlockData, passage: str, folder: Path) -> None:
        """Bring the inputs to the block behind ``passage``: other tokens, of another size."""
        store, size = self._storage(folder), self.config.batch_size
        shape: tuple[int, ...] = ()
        for model, inputs in ((self.maker.float_snapshot, "float_inputs"), (self.quant_model, "quant_inputs")):
            module, before = model.get_submodule(passage), getattr(part, inputs)
            with torch.no_grad():
                shape = (len(before), *module(before[:1].to(self.maker.device)).shape[1:])
            setattr(part, inputs, through(module, before, size, store(shape, before)))
        part.targets = store(shape, part.float_inputs)

    def _storage(self, folder: Path) -> Callable[[tuple[int, ...], Tensor], Tensor]:
        """Makes an empty tensor of a shape, of the type of another: in memory, or in a file if it is too large."""

        def store(shape: tuple[int, ...], like: Tensor) -> Tensor:
            count = torch.Size(shape).numel()
            if 3 * count * like.element_size() <= self.config.cache_mib * 2**20:
                return torch.empty(shape, dtype=like.dtype, device=like.device)
            file = folder / f"{len(list(folder.iterdir()))}.bin"
            return torch.from_file(str(file), shared=True, size=count, dtype=like.dtype).view(shape)

        return store

    def _save(self) -> None:
        if self.run is not None:
            tensors = {"model": self.quant_model.state_dict()}
            save_checkpoint(self.run, self.stage, self.blocks, {"history": self.history}, tensors)


def varied(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` variants of each image, itself included: crops, mirror images, mixtures of two by a rectangle.

    A pool of a hundred images overfits a block of half a million weights; its variants cost nothing.

    Args:
        images: normalised, ``(images, channels, height, width)``.
        count: variants per image.
        generator: random source on the CPU; torch's global generator is left as it was.

    Returns:
        ``(count * images, channels, height, width)``, the images themselves first.
    """
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(tuple(images.shape[-2:]), scale=(0.25, 1.0), ratio=(0.75, 1.33), antialias=True)
    mirror = v2.RandomHorizontalFlip()
    found = [images]
    with seeded_by(generator):
        for _ in range(count - 1):
            change = torch.stack([mirror(crop(image)) for image in images])
            others = change[torch.randperm(len(change))]
            height, width = images.shape[-2:]
            for image, other in zip(change[::2], others[::2], strict=True):  # every second one is a mixture
                tall, wide = (int(side * (0.3 + 0.4 * float(torch.rand(())))) for side in (height, width))
                top, left = (int(torch.randint(side - part + 1, ())) for side, part in ((height, tall), (width, wide)))
                image[:, top : top + tall, left : left + wide] = other[:, top : top + tall, left : left + wide]
            found.append(change)
    return torch.cat(found)
