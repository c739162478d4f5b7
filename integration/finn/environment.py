"""FINN's own virtual environment: one that is named, or one that is made. FINN pins other versions than this package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import ExportError

__all__ = ["PACKAGES", "VARIABLE", "environment_python", "run_frontend"]

#: Names an environment with finn-plus in it.
VARIABLE = "MASKAQ_FINN_VENV"
#: finn-plus 1.6.1 imports psutil and does not ask for it.
PACKAGES = ("finn-plus==1.6.1", "psutil")
_FRONTEND = Path(__file__).with_name("frontend.py")


def environment_python(named: Path | None, make_at: Path | None) -> Path:
    """The Python of an environment that has FINN+.

    Args:
        named: an environment; else that of ``MASKAQ_FINN_VENV``, if it is set.
        make_at: folder to make one in, if none is named and the folder holds none yet (some 6 GB with FINN's torch).

    Raises:
        ConfigurationError: none is named and none is to be made, or the one named lacks FINN+.
        ExportError: the installation failed.
    """
    if named is None and os.environ.get(VARIABLE):
        named = Path(os.environ[VARIABLE])
    folder = named or make_at
    if folder is None:
        raise ConfigurationError(f"Expected an environment with finn-plus: name one with --venv or {VARIABLE}.")
    python = folder.resolve() / "bin" / "python"
    if named is None and not python.exists():
        print(f"installing {' '.join(PACKAGES)} into {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *PACKAGES], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise ExportError(f"pip could not install {' '.join(PACKAGES)}: {done.stderr.strip()[-600:]}")
    found = None
    if python.exists():
        command = [python, "-c", "import psutil, finn.util.settings"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found is None or found.returncode:
        reason = "no bin/python there" if found is None else found.stderr.strip().splitlines()[-1]
        raise ConfigurationError(
            f"Expected {' and '.join(PACKAGES)} in {folder}, got: {reason}. Install them there with pip."
        )
    return python


def run_frontend(python: Path, requests: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run FINN's front end on several files in one process; what each gave, by name.

    Args:
        python: of FINN's environment.
        requests: what :mod:`integration.finn.frontend` reads, by name; without an absolute ``output`` they mean
            nothing.

    Raises:
        ExportError: the front end ended without a result.
    """
    paths = []
    for request in requests.values():
        output = Path(request["output"])
        output.mkdir(parents=True, exist_ok=True)
        (output / "RESULT.json").unlink(missing_ok=True)
        paths.append(output / "REQUEST.json")
        paths[-1].write_text(json.dumps(request, indent=2) + "\n")
    log = Path(next(iter(requests.values()))["output"]) / "finn.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [python, "-W", "ignore", _FRONTEND, *paths], stdout=stream, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": ""},
        )  # fmt: skip
        for line in process.stderr or ():
            stream.write(line)
            if line.startswith("finn: "):
                print(line, end="", file=sys.stderr, flush=True)
        process.wait()
    results = {}
    for name, request in requests.items():
        path = Path(request["output"]) / "RESULT.json"
        if not path.exists():
            raise ExportError(
                f"FINN's front end ended without a result for {name} (status {process.returncode}); see {log}."
            )
        results[name] = json.loads(path.read_text())
    return results
