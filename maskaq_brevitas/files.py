"""Files that are there whole or not at all, and that show when they were damaged since.

JSON and safetensors files carry the SHA-256 of their content. It guards against disks and copies, not against people.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskaq_brevitas.errors import DamagedFileError
from maskaq_brevitas.errors import WriteError

__all__ = [
    "digest",
    "load_json",
    "load_tensors",
    "save_json",
    "save_tensors",
    "saved_digest",
    "tensors_on_meta",
    "whole_file",
    "write_whole",
]

_KEY = "sha256"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; the file is flushed to disk and gets its name on success, and goes on
    failure.

    Raises:
        WriteError: if the disk is full or refuses the file; a file that was there before is as it was.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())  # safetensors makes private files
        os.replace(aside, path)
        _flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WriteError(f"{path} cannot be written: {reason}. Free space or choose another folder.") from error
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a path aside, see :func:`whole_file`."""
    with whole_file(path) as aside:
        write(aside)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and their digest as safetensors.

    Raises:
        WriteError: as :func:`whole_file`.
    """
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # One key only: safetensors writes several in random order, and the same tensors must give the same bytes.
    write_whole(path, lambda aside: save_file(whole, aside, metadata={_KEY: digest(whole)}))


def load_tensors(path: Path, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Read what :func:`save_tensors` wrote.

    Args:
        like: names, shapes and dtypes that are expected; they are compared before anything is read.

    Raises:
        DamagedFileError: if the file is missing or damaged, or holds other tensors than ``like``.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if like is not None:
                for name in sorted({*like, *file.keys()}):
                    _compare(path, file, name, like)
            found = {name: file.get_tensor(name) for name in file.keys()}
            expected = (file.metadata() or {}).get(_KEY)
    except (OSError, SafetensorError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}. {_WAY_OUT}") from error
    _check_digest(path, expected, digest(found))
    return found


def saved_digest(path: Path) -> str:
    """The digest that :func:`save_tensors` wrote into a file; the tensors are not read, and may be damaged.

    Raises:
        DamagedFileError: if the file is missing, or has no digest.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get(_KEY)
    except (OSError, SafetensorError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}. {_WAY_OUT}") from error
    if found is None:
        _check_digest(path, found, "")
    return str(found)


def tensors_on_meta(path: Path) -> dict[str, Tensor]:
    """Names, shapes and dtypes in a safetensors file, whoever wrote it, as tensors on the device ``meta``.

    A dtype that :mod:`torch` has no common name for (8-bit floats) is given as ``uint8``.

    Raises:
        OSError, SafetensorError: if it cannot be read, or its header does not fit its size.
    """
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: torch.empty(part.get_shape(), dtype=dtypes.get(part.get_dtype(), torch.uint8), device="meta")
            for name, part in parts.items()
        }


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object and its digest as JSON.

    Raises:
        WriteError: as :func:`whole_file`.
    """
    text = json.dumps({**content, _KEY: _json_digest(content)}, indent=2) + "\n"
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def load_json(path: Path) -> dict[str, Any]:
    """Read what :func:`save_json` wrote.

    Raises:
        DamagedFileError: if the file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}. {_WAY_OUT}") from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} is damaged: expected an object, got {type(content).__name__}. {_WAY_OUT}")
    expected = content.pop(_KEY, None)
    _check_digest(path, expected, _json_digest(content))
    return content


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


_WAY_OUT = "Put a good copy in its place, or start the run again with --overwrite."


def _json_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_digest(path: Path, expected: object, found: str) -> None:
    if expected != found:
        state = "its checksum is missing" if expected is None else "its content does not match its checksum"
        raise DamagedFileError(f"{path} is damaged or was changed by hand: {state}. {_WAY_OUT}")


def _compare(path: Path, file: Any, name: str, like: Mapping[str, Tensor]) -> None:
    if name not in like or name not in file.keys():
        state = "lacks" if name in like else "holds the unknown"
        raise DamagedFileError(f"{path} {state} tensor {name}: it was saved for another model or configuration.")
    part = file.get_slice(name)
    shape, dtype = tuple(part.get_shape()), part.get_dtype()
    wanted = tuple(like[name].shape), _DTYPES.get(like[name].dtype)
    if (shape, dtype) != wanted:
        raise DamagedFileError(
            f"{path}: {name} is {shape} {dtype}, expected {wanted[0]} {wanted[1]}: it was saved for another model or "
            "number of images."
        )


#: Names of dtypes in safetensors.
_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
