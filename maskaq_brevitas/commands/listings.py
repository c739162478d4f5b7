"""Commands that need no run: ``maskaq lint-finn`` and ``models``."""

from __future__ import annotations

from argparse import Namespace

from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import MissingExtraError
from maskaq_brevitas.export.finn_lint import lint_finn as judge_for_finn
from maskaq_brevitas.export.finn_lint import lint_text
from maskaq_brevitas.models.families import known_families
from maskaq_brevitas.report.report import text_table
from maskaq_brevitas.support import check_support
from maskaq_brevitas.support import recorded_support
from maskaq_brevitas.support import refusals

__all__ = ["lint_finn", "models"]


def lint_finn(options: Namespace) -> int:
    """Print what FINN would make of a QONNX file; 0 if every node becomes hardware, else 1.

    Raises:
        MaskAQError: if the file cannot be read.
    """
    lint = judge_for_finn(options.file)
    print(lint_text(lint, every_node=options.all, only_verdict=options.quiet))
    return 0 if lint.lands else 1


def models(options: Namespace) -> None:
    """Print what works for each architecture family.

    Raises:
        ConfigurationError: if no family or example has the text in its name.
        MissingExtraError: if a family is to be measured whose package is not installed.
    """
    rows = recorded_support()
    wanted = (options.family or "").lower()
    rows = [row for row in rows if wanted in row.family.lower() or wanted in row.example.lower()]
    if not rows:
        known = ", ".join(dict.fromkeys(row.family for row in recorded_support()))
        raise ConfigurationError(f"Expected a text that is part of a family's name ({known}), got {options.family!r}.")
    if options.check:
        families = {family.name: family for family in known_families(optional=True)}
        if any(row.family not in families for row in rows):
            raise MissingExtraError("transformers", "hf")
        rows = [check_support(families[row.family], row.example).row for row in rows]
    titles = ["family", "example", "swapped", "MACs quantized", "taps", "FX", "QONNX", "ONNX Runtime"]
    print(text_table(titles, [list(vars(row).values()) for row in rows], right=()))
    print("\nMeasured on small models of these architectures, with random weights.")
    if not wanted:
        print("Known, and refused:")
        for reason in refusals():
            print(f"- {reason}")
