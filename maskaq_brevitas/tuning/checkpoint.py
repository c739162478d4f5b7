"""Checkpoints of a tuning after each epoch, so that a killed run goes on and ends with the same bytes.

``state/tuning.json`` says how far the tuning is and names its tensor file. The tensor file is written first, the JSON
replaced after it, the old tensor file removed last: whenever the process dies, the JSON names a whole file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.tuning.distill import Distiller

__all__ = ["TuningProgress", "load_progress", "save_progress"]

_NOTE = "state/tuning.json"


@dataclass
class TuningProgress:
    """How far a tuning is.

    Attributes:
        epochs: finished.
        pool_version: of the images that the last finished epoch was trained on.
        best_epoch: epochs after which the held-back loss was lowest; 0 is the state before tuning.
        best_loss: that loss; infinite if it was not finite.
        best: state of the quant model then, on the CPU.
        history: losses of the epochs and figures of the refreshes so far, in order.
    """

    epochs: int
    pool_version: int
    best_epoch: int
    best_loss: float
    best: dict[str, Tensor]
    history: list[dict[str, Any]] = field(default_factory=list)


def save_progress(
    run: RunDirectory, progress: TuningProgress, model_state: Mapping[str, Tensor], distiller: Distiller
) -> None:
    """Write a checkpoint: progress, quant model and optimiser."""
    optimizer_tensors, optimizer = distiller.state()
    before = run.read_json(_NOTE)["tensors"] if run.has(_NOTE) else None
    name = f"state/tuning-{progress.epochs:04d}.safetensors"
    parts = {"model": model_state, "best": progress.best, "optimizer": optimizer_tensors}
    run.write_tensors(name, {f"{part}:{key}": value for part, values in parts.items() for key, value in values.items()})
    run.write_json(_NOTE, dict(
        epochs=progress.epochs, pool_version=progress.pool_version, best_epoch=progress.best_epoch,
        best_loss=progress.best_loss, history=progress.history, tensors=name,
        optimizer={"type": type(distiller.optimizer).__name__, **optimizer},
    ))  # fmt: skip
    if before not in (None, name):
        run.remove(before)


def load_progress(
    run: RunDirectory,
) -> tuple[TuningProgress, dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None:
    """The last checkpoint, None without one: progress, state of the quant model, the optimiser's tensors and values.

    Raises:
        RunDirectoryError: if the checkpoint is damaged.
    """
    if not run.has(_NOTE):
        return None
    note = run.read_json(_NOTE)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
    try:
        for name, value in run.read_tensors(note["tensors"]).items():
            part, _, key = name.partition(":")
            parts[part][key] = value
        names = ("epochs", "pool_version", "best_epoch", "best_loss", "history")
        progress = TuningProgress(best=parts["best"], **{name: note[name] for name in names})
        return progress, parts["model"], parts["optimizer"], note["optimizer"]
    except KeyError as error:
        raise RunDirectoryError(
            f"{run.path / _NOTE} is damaged: {error} is missing. Start the run again with --overwrite."
        ) from error
