"""What a long run shows and notes of itself: progress bars, seconds and peak memory per stage, its random streams."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

__all__ = ["BarFactory", "bars", "peak_memory_mib", "random_stream", "stage"]

#: Makes a progress bar from the number of steps and a title.
BarFactory = Callable[[int, str], tqdm]


def bars(shown: bool) -> BarFactory:
    """Progress bars on stderr with the time left; silent if not ``shown``, or if stderr is no terminal."""
    return lambda total, title: tqdm(
        total=total, desc=title, unit="it", disable=None if shown else True, file=sys.stderr
    )


@contextmanager
def stage(stages: list[dict[str, Any]], name: str) -> Iterator[None]:
    """Append name, seconds and peak memory (MiB) of what runs inside to ``stages``, if it ends well."""
    start = time.perf_counter()
    yield
    stages.append(
        {"stage": name, "seconds": round(time.perf_counter() - start, 2), "peak_memory_mib": peak_memory_mib()}
    )


def peak_memory_mib() -> int:
    """Peak resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024))


def random_stream(seed: int, part: int, number: int = 0) -> torch.Generator:
    """The random source of one piece of work, so that pieces can be done in any order, or resumed.

    Args:
        seed: of the run.
        part: what the piece belongs to: a version of the pool, an epoch.
        number: of the piece in it.
    """
    return torch.Generator().manual_seed(((seed * 1_000_003 + part) * 100_003 + number) % 2**63)
