"""Benchmarks as modules: ``examples`` is no package."""

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def bench(request) -> Iterator[ModuleType]:
    """The file that the test's module names as ``BENCH``, imported."""
    path = request.module.BENCH
    spec = importlib.util.spec_from_file_location(f"{path.stem}_bench", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their names
        spec.loader.exec_module(module)
        yield module
