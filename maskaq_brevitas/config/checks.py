"""Checks of single values, shared by the configuration classes."""

from __future__ import annotations

import math
from typing import Any

from maskaq_brevitas.errors import ConfigurationError

__all__ = ["check_at_least", "check_bool", "check_choice", "finite_number"]


def check_at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name}: expected a whole number >= {least}, got {value!r}.")


def finite_number(value: Any) -> float:
    """``value`` if it is a finite number; else NaN, which passes no comparison. (PyYAML reads 1e-4 as text.)"""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else math.nan


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}: expected true or false, got {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name}: expected one of {', '.join(choices)}, got {value!r}.")
