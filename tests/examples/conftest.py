"""Benchmarks as modules: ``examples`` is no package."""

import importlib.util
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def bench(request) -> ModuleType:
    """The file that the test's module names as ``BENCH``, imported."""
    path = request.module.BENCH
    spec = importlib.util.spec_from_file_location(f"{path.stem}_bench", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
