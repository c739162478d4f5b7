"""The distillation of a run: its epochs, its refreshes, the state that is kept, and its checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.progress import BarFactory
from maskaq_brevitas.progress import random_stream
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.synthesis.maker import PoolMaker
from maskaq_brevitas.synthesis.maker import device_batches
from maskaq_brevitas.tuning.checkpoint import Checkpoint
from maskaq_brevitas.tuning.checkpoint import save_checkpoint
from maskaq_brevitas.tuning.distill import Distiller
from maskaq_brevitas.tuning.optimizer import OptimizerFactory
from maskaq_brevitas.tuning.state import copied_state
from maskaq_brevitas.tuning.state import load_quant_state

__all__ = ["DistillStage", "refresh_is_due"]

# Random streams of epochs, and of images drawn for the tuning, lie beyond those of pool versions.
_EPOCHS, _DRAWN = 1_000_000, 3_000_000


def refresh_is_due(epoch: int, refresh_every: int | None) -> bool:
    """Whether images are refreshed before the epoch of that number (from 0)."""
    return refresh_every is not None and epoch > 0 and epoch % refresh_every == 0


class DistillStage:
    """One distillation, start to end.

    Args:
        quant_model: calibrated; tuned in place. In the end it has the state with the lowest loss on the held-back
            images, the first state included (without held-back images: the last state).
        maker: has the pools and the teacher.
        config: of the tuning.
        refresh: refreshes the pool as ``config`` says and notes it in ``history``.
        history: losses and refreshes so far; grows.
        run: where checkpoints are kept, or None.
        stage: index of this stage in the run.
        optimizer: see :class:`~maskaq_brevitas.tuning.distill.Distiller`.
        bar: makes progress bars.

    Attributes:
        best_epoch: epochs after which the held-back loss was lowest; 0 is the state before this stage.
    """

    def __init__(
        self,
        quant_model: nn.Module,
        maker: PoolMaker,
        config: DistillConfig,
        *,
        refresh: Callable[[], None],
        history: list[dict[str, Any]],
        run: RunDirectory | None,
        stage: int,
        optimizer: OptimizerFactory | None,
        bar: BarFactory,
    ):
        self.quant_model = quant_model
        self.maker = maker
        self.config = config
        self.refresh = refresh
        self.history = history
        self.run = run
        self.stage = stage
        self.bar = bar
        self.steps = config.steps_per_epoch or math.ceil(len(maker.pool) / config.batch_size)
        self.drawn: Tensor | None = None
        self.drawing: int | None = None  # which of the drawings that is
        self.distiller = Distiller(
            quant_model, maker.float_snapshot, config, prefix=maker.geometry.prefix_tokens,
            total_steps=config.epochs * self.steps, optimizer=optimizer, geometry=maker.geometry,
        )  # fmt: skip
        self.epochs = 0
        self.pool_version = maker.pool.version
        self.best_epoch = 0
        self.best_loss = math.inf
        self.best: dict[str, Tensor] = {}

    def start(self) -> None:
        """Measure the model as it is, the first candidate, and keep it."""
        loss = self._held_back_loss()
        event = "calibration" if self.stage == 0 else "distillation starts"
        self.history.append(dict(event=event, epoch=0, held_back_loss=loss, pool_version=self.pool_version))
        self._keep_if_best(loss)
        self._save()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this stage. The quant model has its state already."""
        note = checkpoint.note
        self.epochs, self.best = checkpoint.done, checkpoint.tensors["best"]
        self.pool_version, self.best_epoch = note["pool_version"], note["best_epoch"]
        self.best_loss = math.inf if note["best_loss"] is None else note["best_loss"]
        self.distiller.load_state(checkpoint.tensors.get("optimizer", {}), note["optimizer"])

    def execute(self) -> None:
        """The epochs that are left; then the best state goes into the quant model.

        Raises:
            TuningError: if the loss stays non-finite for a whole epoch.
            RunDirectoryError: if pool and checkpoint do not belong together.
        """
        if self.epochs < self.config.epochs:
            self._draw(self.epochs)
        with self.bar(self.config.epochs * self.steps, "Tuning") as bar:
            bar.update(self.epochs * self.steps)
            for epoch in range(self.epochs, self.config.epochs):
                self._draw(epoch)
                if refresh_is_due(epoch, self.config.refresh_every):
                    self._refresh()
                start = time.perf_counter()
                generator = random_stream(self.maker.seed, _EPOCHS + epoch)
                trained = self.distiller.train_epoch(
                    self._shuffled(generator), generator,
                    on_step=lambda loss: (bar.update(), bar.set_postfix(loss=f"{loss:.4f}")),
                )  # fmt: skip
                loss = self._held_back_loss()
                self.epochs, self.pool_version = epoch + 1, self.maker.pool.version
                self.history.append(dict(
                    event="epoch", epoch=epoch + 1, train_loss=trained.total, train_divergence=trained.divergence,
                    train_distance=trained.distance, train_features=trained.features,
                    train_last_features=trained.last_features, skipped_steps=trained.skipped,
                    held_back_loss=loss,
                    pool_version=self.pool_version, seconds=round(time.perf_counter() - start, 2),
                ))  # fmt: skip
                self._keep_if_best(loss)
                self._save()
        load_quant_state(self.quant_model, self.best)

    def _draw(self, epoch: int) -> None:
        """Draw the images that belong to an epoch, unless they are there."""
        every = self.config.redraw_every
        drawing = 0 if every is None else epoch // every
        if drawing != self.drawing:
            self.drawn, self.drawing = self.maker.drawn(self.config.drawn_images, _DRAWN + drawing), drawing

    def _keep_if_best(self, loss: float | None) -> None:
        if not self.best or loss is None or loss < self.best_loss:
            self.best_epoch, self.best = self.epochs, copied_state(self.quant_model)
            self.best_loss = math.inf if loss is None else loss

    def _refresh(self) -> None:
        """Refresh the images, unless the run died between a finished refresh and the checkpoint after it."""
        version = self.maker.pool.version
        if version == self.pool_version:
            self.refresh()
        elif version == self.pool_version + 1 and self.run is not None:
            self.history.append(self.maker.finished_refresh(self.quant_model, self.run))
        else:
            raise RunDirectoryError(
                f"The images are of version {version}, but the checkpoint of the tuning is of version "
                f"{self.pool_version}: one of them was replaced by hand. Start the run again with --overwrite."
            )

    def _held_back_loss(self) -> float | None:
        """The objective on the held-back images; infinite if it is not finite, None without such images."""
        maker = self.maker
        if maker.held_back is None:
            return None
        loss = self.distiller.validation_loss(
            device_batches(maker.held_back, self.config.batch_size, maker.device)
        ).total
        return loss if math.isfinite(loss) else math.inf

    def _shuffled(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Batches of an epoch: the pool in a new order, as often as needed; as many again of the images drawn for this.
        """
        pool, size = self.maker.pool, self.config.batch_size
        ours = size if self.drawn is None else max(1, size // 2)
        order = _endless(len(pool), ours, generator)
        others = None if self.drawn is None else _endless(len(self.drawn), size - ours, generator)
        for _ in range(self.steps):
            pixels = pool.pixels[next(order)]
            if others is not None and self.drawn is not None:
                pixels = torch.cat([pixels, self.drawn[next(others)]])
            yield pool.images(pixels).to(self.maker.device)

    def _save(self) -> None:
        if self.run is None:
            return
        tensors, optimizer = self.distiller.state()
        note = dict(
            pool_version=self.pool_version, best_epoch=self.best_epoch,
            best_loss=self.best_loss if math.isfinite(self.best_loss) else None, history=self.history,
            optimizer={"type": type(self.distiller.optimizer).__name__, **optimizer},
        )  # fmt: skip
        parts = {"model": self.quant_model.state_dict(), "best": self.best, "optimizer": tensors}
        save_checkpoint(self.run, self.stage, self.epochs, note, parts)


def _endless(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices below ``count`` in random order, round after round, always ``size`` at a time (at most ``count``)."""
    size, order = min(size, count), torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]
