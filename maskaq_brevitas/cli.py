"""The console script ``maskaq``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager

from maskaq_brevitas import __version__
from maskaq_brevitas.errors import MaskAQError
from maskaq_brevitas.errors import MaskAQWarning
from maskaq_brevitas.options import COMMANDS
from maskaq_brevitas.options import parse
from maskaq_brevitas.options import top_parser

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``maskaq`` with the arguments given (default: those of the process); return its exit status.

    0 after success; 1 if ``lint-finn`` finds what FINN does not map; 2 after an error of this package or of the file
    system, printed as one line; 130 when interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not given or given[0] not in COMMANDS:
            top_parser(__version__).parse_args(given or ["--help"])
            return 0
        options = parse(given[0], given[1:])
        with _quiet_dependencies():
            from maskaq_brevitas import commands

            status = getattr(commands, given[0].replace("-", "_"))(options)
        return status or 0
    except (MaskAQError, OSError) as error:
        print(f"maskaq: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = ""
        if given[0] == "quantize" and os.path.isfile(os.path.join(options.out, "run.json")):
            hint = f" What is finished lies in {options.out}; the same command with --resume goes on from there."
        print(f"\nmaskaq: interrupted.{hint}", file=sys.stderr)
        return 130


@contextmanager
def _quiet_dependencies() -> Iterator[None]:
    """Warnings of this package as one line each, none of others, and no log records below errors; all put back."""
    threshold = logging.root.manager.disable

    shown: set[str] = set()

    def show(message: Warning | str, *_place: object, **_more: object) -> None:
        text = " ".join(str(message).split())
        if text not in shown:  # each model with the same swap warns of the same layers
            print(f"maskaq: warning: {text}", file=sys.stderr)
        shown.add(text)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MaskAQWarning)
        warnings.showwarning = show
        logging.disable(max(threshold, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(threshold)


if __name__ == "__main__":
    sys.exit(main())
