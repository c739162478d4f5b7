"""A run on disk: an atomic manifest that says what the run is, and files that appear only when whole."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import DamagedFileError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.files import digest
from maskaq_brevitas.files import load_json
from maskaq_brevitas.files import load_tensors
from maskaq_brevitas.files import save_json
from maskaq_brevitas.files import save_tensors

__all__ = ["RunDirectory", "differences", "fingerprint", "installed_versions"]

_MANIFEST = "run.json"
#: What a run writes outside its folder ``state``.
_FILES = (
    "config.yaml", "bits.json", "tuning.json", "images.safetensors", "held_back.safetensors", "quant_model.safetensors",
    "model.onnx", "model.card.json", "model.qcdq.onnx", "model.qcdq.pt", "model.pt2", "report.json", "report.md",
    "images.png",
)  # fmt: skip
_MODES = ("new", "resume", "overwrite")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in ("maskaq_brevitas", "torch", "timm", "brevitas", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters and buffers of a model."""
    return digest(model.state_dict())


class RunDirectory:
    """A directory that belongs to one run.

    Args:
        path: of the directory; made if missing.
        identity: everything that affects numbers (configuration, seed, weight fingerprint, versions).
        mode: ``"new"`` refuses a directory that holds anything; ``"resume"`` continues a run of the same identity, or
            starts one; ``"overwrite"`` removes the files of an earlier run first, and no others.

    Raises:
        ConfigurationError: if ``mode`` is none of these.
        RunDirectoryError: if the directory holds another run, with the differing keys; or holds foreign files.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any], mode: str = "new"):
        if mode not in _MODES:
            raise ConfigurationError(f"run_mode: expected one of {', '.join(_MODES)}, got {mode!r}.")
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file; expected a directory for the run.")
        identity = json.loads(json.dumps(identity))
        present = self._read_manifest()
        if mode == "overwrite":
            self._clear(present)
            present = None
        elif present is None and self.path.is_dir() and any(self.path.iterdir()):
            raise RunDirectoryError(
                f"{self.path} is not empty and holds no run of this package. Choose another folder."
            )
        elif present is not None and mode == "new":
            raise RunDirectoryError(
                f"{self.path} holds a run already. Continue it with --resume, replace it with --overwrite, or choose "
                "another folder."
            )
        elif present is not None:
            differing = differences(present["identity"], identity)
            if differing:
                raise RunDirectoryError(
                    f"{self.path} holds another run, which cannot be resumed with this configuration. Differing: "
                    + "; ".join(differing)
                )
        self.path.mkdir(parents=True, exist_ok=True)
        if present is None:
            self.write_json(_MANIFEST, {"format": "maskaq_brevitas.run.1", "identity": identity})

    @staticmethod
    def read_identity(path: str | Path) -> dict[str, Any]:
        """What the run in ``path`` is.

        Raises:
            RunDirectoryError: if there is none, or its manifest is damaged.
        """
        run = object.__new__(RunDirectory)
        run.path = Path(path)
        manifest = run._read_manifest()
        if manifest is None:
            raise RunDirectoryError(f"{path} holds no run: expected a file {_MANIFEST} in it.")
        identity: dict[str, Any] = manifest["identity"]
        return identity

    def file(self, name: str) -> Path:
        """Path of a file of the run; its folder exists afterwards.

        Raises:
            RunDirectoryError: if the name, which may come from a file, leads out of the run.
        """
        path = self._inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def has(self, name: str) -> bool:
        """Whether a whole file of that name exists."""
        return self._inside(name).is_file()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write an object as JSON; the file appears only when whole.

        Raises:
            WriteError: if the disk is full or refuses the file.
        """
        save_json(self.file(name), content)

    def read_json(self, name: str) -> dict[str, Any]:
        """Read JSON of the run.

        Raises:
            DamagedFileError: if the file is missing or damaged.
        """
        return load_json(self.file(name))

    def claim(self, name: str, content: Mapping[str, Any]) -> None:
        """Write JSON under ``name``; if it is there already, check that it is the same.

        Raises:
            RunDirectoryError: if it differs, with the differing keys.
        """
        content = json.loads(json.dumps(content))
        if not self.has(name):
            self.write_json(name, content)
            return
        differing = differences(self.read_json(name), content)
        if differing:
            raise RunDirectoryError(
                f"{self.path / name} is of another configuration, with which this run cannot be resumed. Differing: "
                + "; ".join(differing)
            )

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors; the file appears only when whole.

        Raises:
            WriteError: if the disk is full or refuses the file.
        """
        save_tensors(self.file(name), tensors)

    def read_tensors(self, name: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Read tensors of the run; ``like`` gives the names, shapes and dtypes that are expected.

        Raises:
            DamagedFileError: if the file is missing, damaged, or holds other tensors.
        """
        return load_tensors(self.file(name), like)

    def remove(self, *names: str) -> None:
        """Remove files of the run that exist."""
        for name in names:
            self._inside(name).unlink(missing_ok=True)

    def _inside(self, name: str) -> Path:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise RunDirectoryError(f"Expected the name of a file in {self.path}, got {name!r}, which leads out of it.")
        return self.path / name

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.path / _MANIFEST
        if not path.is_file():
            return None
        manifest = load_json(path)
        if not isinstance(manifest.get("identity"), dict):
            raise DamagedFileError(f"{path} is damaged: expected the manifest of a run, found no identity in it.")
        return manifest

    def _clear(self, present: dict[str, Any] | None) -> None:
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if present is None:
            raise RunDirectoryError(
                f"{self.path} holds no run of this package, so nothing in it is overwritten. Choose another folder."
            )
        # The manifest goes last: a directory that was cleared in part is still known as a run. Files that no run writes
        # are the user's.
        files = [self.path / name for name in _FILES] + [*self.path.glob("state/*"), *self.path.glob("*.partial")]
        for path in [*files, self.path / _MANIFEST]:
            path.unlink(missing_ok=True)


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """``key: before -> now`` for all leaves that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*before, *now}):
            found += differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if before == now else [f"{name}: {before!r} -> {now!r}"]
