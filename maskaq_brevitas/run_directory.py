"""A run on disk: an atomic manifest that says what the run is, and files that appear only when whole."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskaq_brevitas.errors import ConfigurationError, RunDirectoryError

__all__ = ["RunDirectory", "fingerprint", "installed_versions", "write_whole"]

_MANIFEST = "run.json"
#: What a run writes outside its folder ``state``.
_FILES = (
    "config.yaml", "bits.json", "tuning.json", "images.safetensors", "held_back.safetensors", "quant_model.safetensors",
    "model.onnx", "model.card.json", "model.qcdq.onnx", "model.qcdq.pt", "model.pt2", "report.json", "report.md", "images.png",
)  # fmt: skip
_MODES = ("new", "resume", "overwrite")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a path aside, flush the file to disk, and give it its final name."""
    aside = path.with_name(path.name + ".partial")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


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
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
            differing = _differences(present["identity"], identity)
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
        """Path of a file of the run; its folder exists afterwards."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def has(self, name: str) -> bool:
        """Whether a whole file of that name exists."""
        return (self.path / name).is_file()

    def write_json(self, name: str, content: Any) -> None:
        """Write JSON; the file appears only when whole."""
        text = json.dumps(content, indent=2) + "\n"
        write_whole(self.file(name), lambda aside: aside.write_text(text, encoding="utf-8"))

    def read_json(self, name: str) -> Any:
        """Read JSON of the run.

        Raises:
            RunDirectoryError: if the file is missing or damaged.
        """
        try:
            return json.loads(self.file(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{self.path / name} cannot be read: {error}.") from error

    def claim(self, name: str, content: Any) -> None:
        """Write JSON under ``name``; if it is there already, check that it is the same.

        Raises:
            RunDirectoryError: if it differs, with the differing keys.
        """
        content = json.loads(json.dumps(content))
        if not self.has(name):
            self.write_json(name, content)
            return
        differing = _differences(self.read_json(name), content)
        if differing:
            raise RunDirectoryError(
                f"{self.path / name} is of another configuration, with which this run cannot be resumed. Differing: "
                + "; ".join(differing)
            )

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors; the file appears only when whole."""
        whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        write_whole(self.file(name), lambda aside: save_file(whole, aside))

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Read tensors of the run.

        Raises:
            RunDirectoryError: if the file is missing or damaged.
        """
        try:
            return load_file(self.file(name))
        except (OSError, SafetensorError) as error:
            raise RunDirectoryError(
                f"{self.path / name} cannot be read ({error}). Remove it and run again with --resume."
            ) from error

    def remove(self, *names: str) -> None:
        """Remove files of the run that exist."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.path / _MANIFEST
        if not path.is_file():
            return None
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            manifest["identity"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunDirectoryError(f"{path} is damaged ({error}); expected the manifest of a run.") from error
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


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """``key: before -> now`` for all leaves that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*before, *now}):
            found += _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if before == now else [f"{name}: {before!r} -> {now!r}"]
