"""Imports point one way: a part of the package imports only from those above it in this list (DESIGN.md, "The house").
"""

import ast
from pathlib import Path

import pytest

import maskaq_brevitas

ROOT = Path(maskaq_brevitas.__file__).parent
#: From the ground up.
LAYERS = (
    "errors", "config", "progress", "files", "modes", "run_directory", "models", "quant", "synthesis", "tuning",
    "evaluation",
    "export", "report",
    "calibrator", "support", "options", "commands", "cli", "__main__",
)  # fmt: skip


def layer(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Parts of the package that a file imports when it runs, wherever in the file, but not for a type checker."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
        for name in names:
            parts = name.split(".")
            if parts[0] == "maskaq_brevitas" and len(parts) > 1:
                yield parts[1]


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def test_every_part_has_its_place():
    assert {layer(path) for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_above(path):
    own = LAYERS.index(layer(path))
    assert [name for name in imported(path) if LAYERS.index(name) > own] == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if layer(path) in ("errors", "config", "options", "cli")], ids=str
)
def test_configuration_and_options_do_without_torch(path):
    tree = ast.parse(path.read_text())
    outside = {
        name.split(".")[0]
        for node in tree.body
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
    }  # fmt: skip
    assert outside.isdisjoint({"torch", "timm", "brevitas", "numpy"})
