"""Checkpoints of a tuning, so that a killed run goes on and ends with the same bytes.

``state/tuning.json`` says how far the tuning is and names its tensor file. The tensor file is written first, the JSON
replaced after it, the old tensor file removed last: whenever the process dies, the JSON names a whole file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maskaq_brevitas.errors import DamagedFileError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.run_directory import RunDirectory

__all__ = ["Checkpoint", "has_checkpoint", "load_checkpoint", "save_checkpoint"]

_NOTE = "state/tuning.json"


@dataclass(frozen=True)
class Checkpoint:
    """A state of a tuning.

    Attributes:
        stage: index of the tuning stage that is running, from 0.
        done: epochs or blocks of it that are finished.
        note: everything else about it as plain values.
        tensors: by part (``"model"``, ``"best"``, ``"optimizer"`` ...) and name.
    """

    stage: int
    done: int
    note: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(
    run: RunDirectory, stage: int, done: int, note: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write a :class:`Checkpoint`; it takes the place of the one before."""
    before = run.read_json(_NOTE)["tensors"] if run.has(_NOTE) else None
    name = f"state/tuning-{stage}-{done:04d}.safetensors"
    run.write_tensors(name, {f"{part}:{key}": value for part, found in tensors.items() for key, value in found.items()})
    run.write_json(_NOTE, {"stage": stage, "done": done, **note, "tensors": name})
    if before not in (None, name):
        run.remove(before)


def has_checkpoint(run: RunDirectory) -> bool:
    """Whether a tuning has begun in the run.

    Raises:
        DamagedFileError: if it has, and its note is gone.
    """
    if run.has(_NOTE):
        return True
    # A run may die between its first tensor file and the note.
    if any(path.name != "tuning-0-0000.safetensors" for path in run.path.glob("state/tuning-*.safetensors")):
        raise DamagedFileError(
            f"{run.path / _NOTE} is missing, but a tuning had begun. Put the file back, or start the run again with "
            "--overwrite."
        )
    return False


def load_checkpoint(run: RunDirectory) -> Checkpoint | None:
    """The last checkpoint, or None.

    Raises:
        RunDirectoryError: if it is damaged.
    """
    if not has_checkpoint(run):
        return None
    note = run.read_json(_NOTE)
    try:
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, value in run.read_tensors(note.pop("tensors")).items():
            part, _, key = name.partition(":")
            tensors.setdefault(part, {})[key] = value
        return Checkpoint(note.pop("stage"), note.pop("done"), note, tensors)
    except KeyError as error:
        raise RunDirectoryError(
            f"{run.path / _NOTE} is damaged: {error} is missing. Start the run again with --overwrite."
        ) from error
