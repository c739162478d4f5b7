"""Configurations as plain values, and back."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any
from typing import TypeVar

from maskaq_brevitas.config.scheme import LayerBits
from maskaq_brevitas.config.scheme import Scheme
from maskaq_brevitas.errors import ConfigurationError

__all__ = ["from_mapping", "scheme_of_run", "to_mapping"]

_Config = TypeVar("_Config")


def to_mapping(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries, numbers and strings, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def from_mapping(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
    """The configuration ``cls`` from a mapping, for example one that was read from YAML.

    Raises:
        ConfigurationError: if a key is unknown (the nearest known key is named) or a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{cls.__name__}: expected a mapping of options, got {type(values).__name__}.")
    known = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    converted = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(known)}."
            raise ConfigurationError(f"{cls.__name__}: unknown key {key!r}.{hint}")
        if str(known[key].type).startswith("LayerBits") and isinstance(value, Mapping):
            value = from_mapping(LayerBits, value)
        converted[key] = value
    try:
        return cls(**converted)
    except TypeError as error:
        raise ConfigurationError(f"{cls.__name__}: {error}") from error

def scheme_of_run(values: Mapping[str, Any]) -> Scheme:
    """The scheme of a run from what :func:`to_mapping` made of it, perhaps long ago.

    An option that the run is older than has its default, or what was in use before there was a choice.

    Raises:
        ConfigurationError: if the values are no scheme.
    """
    return from_mapping(Scheme, {"weight_levels": "symmetric", **values})
