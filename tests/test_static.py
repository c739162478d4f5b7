"""ruff and mypy, with the settings of pyproject.toml and setup.cfg, find nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(tool, *arguments, given=None):
    return subprocess.run(
        [sys.executable, "-m", tool, *arguments], cwd=ROOT, input=given, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What mypy learns of torch and timm, once for this file and not beside the code."""
    return tmp_path_factory.mktemp("mypy")


def test_ruff_finds_nothing():
    found = run("ruff", "check", "--no-cache", ".")
    assert found.returncode == 0, found.stdout + found.stderr


def test_mypy_finds_nothing_in_the_package(cache):
    files = sum(1 for _ in (ROOT / "maskaq_brevitas").rglob("*.py"))
    found = run("mypy", "--cache-dir", str(cache))
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"no issues found in {files} source files" in found.stdout
    assert found.stderr == ""  # sections of setup.cfg that fit no module any more


@pytest.mark.parametrize(("code", "rule"), (
    ("import os\n", "F401"), ("import b\nimport a\n\nprint(a, b)\n", "I001"), (f"x = '{120 * 'x'}'\n", "E501"),
    ("from typing import List\n\nx: List[int] = []\n", "UP006"), ("print(*zip([1], [2]))\n", "B905"),
))  # fmt: skip
def test_ruff_knows_the_rules(code, rule):
    found = run("ruff", "check", "--no-cache", "--stdin-filename", "maskaq_brevitas/some.py", "-", given=code)
    assert found.returncode == 1 and rule in found.stdout


def test_mypy_is_strict(cache, tmp_path):
    code = tmp_path / "wrong.py"
    code.write_text("import nowhere\n\ndef f(x): return nowhere.g(x)\n\nx: list = []\n")
    found = run("mypy", "--cache-dir", str(cache), str(code))
    assert found.returncode == 1
    assert all(f"[{error}]" in found.stdout for error in ("import-not-found", "no-untyped-def", "type-arg"))
