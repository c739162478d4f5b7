"""What an export borrows from the running process: optional packages, and silence."""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator

from maskaq_brevitas.errors import MissingExtraError
from maskaq_brevitas.modes import kept_random_states

__all__ = ["quiet", "require"]


def require(*modules: str) -> None:
    """Import optional packages of the ``export`` extra, so that a missing one is named before any work is done.

    Raises:
        MissingExtraError: a module is not installed; the message names the pip command.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            # The module itself may be there and lack a dependency: name what is really missing.
            raise MissingExtraError((error.name or module).split(".")[0], "export") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, log records and prints of exporters and executors away from the user while inside.

    Warning filters, the logging threshold, ``sys.stdout``, ``sys.stderr`` and the random states are put back on exit,
    also on failure.
    Exceptions pass through.
    """
    threshold = logging.root.manager.disable
    unseen = io.StringIO()
    with (
        kept_random_states(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(unseen),
        contextlib.redirect_stderr(unseen),
    ):
        warnings.simplefilter("ignore")
        logging.disable(max(threshold, logging.ERROR))
        try:
            yield
        finally:
            logging.disable(threshold)
