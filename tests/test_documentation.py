"""What the documentation says can be typed in: doctests, the README's Python, and every option of every command."""

import doctest
import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import maskaq_brevitas
from maskaq_brevitas.options import COMMANDS
from maskaq_brevitas.options import parse

ROOT = Path(__file__).parents[1]
PACKAGE = Path(maskaq_brevitas.__file__).parent
DOCUMENTS = sorted([
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("integration/**/README.md"), *ROOT.glob("examples/**/*.md")
])  # fmt: skip


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(module_name(path) for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


def blocks(document, language):
    """Fenced code of a document."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands():
    """``(document, words)`` of every command in the documents' bash blocks."""
    for document in DOCUMENTS:
        for block in blocks(document, "bash"):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                for part in line.split(" && "):
                    words = shlex.split(part, comments=True)
                    if words and words[0] in ("maskaq", "python"):
                        yield document.relative_to(ROOT).as_posix(), words


COMMAND_LINES = list(commands())


def test_the_documents_hold_what_is_tested_here():
    assert len(MODULES) >= 10 and len(COMMAND_LINES) >= 20
    assert len(blocks(ROOT / "README.md", "python")) >= 2


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed


@pytest.mark.parametrize(
    ("document", "words"),
    [
        pytest.param(document, words[1:], id=shlex.join(words)[:60])
        for document, words in COMMAND_LINES
        if words[0] == "maskaq"
    ],
)
def test_maskaq_commands_parse(document, words, monkeypatch, tmp_path):
    assert words[0] in COMMANDS, f"{document}: no command {words[0]}"
    if "--images-from" in words:  # that run's manifest is read
        monkeypatch.chdir(tmp_path)
        run = tmp_path / words[words.index("--images-from") + 1]
        run.mkdir(parents=True)
        manifest = {"identity": {"num_images": 4, "synthesis": {"steps": 2, "batch_size": 4}}}
        (run / "run.json").write_text(json.dumps(manifest))
    parse(words[0], words[1:])


@functools.cache
def help_of(*program):
    done = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z][\w.-]*", done.stdout))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        pytest.param(document, words[1:], id=shlex.join(words)[:60])
        for document, words in COMMAND_LINES
        if words[0] == "python" and words[1:3] != ["-m", "pytest"]
    ],
)
def test_options_of_python_programs_exist(document, words):
    program = words[:2] if words[0] == "-m" else words[:1]
    if program[0] != "-m":
        assert (ROOT / program[0]).is_file(), f"{document}: no file {program[0]}"
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    if given:
        assert given <= help_of(*program), document


@pytest.mark.heavy
def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    """The script under "Your model" and the calls under "One line", with few images and a model of random weights."""
    one_line, script = blocks(ROOT / "README.md", "python")[:2]
    monkeypatch.chdir(tmp_path)
    little = functools.partial(maskaq_brevitas.DataFreeCalibrator, num_images=2, held_back=1, steps=1, progress=False)
    monkeypatch.setattr(maskaq_brevitas, "DataFreeCalibrator", little)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, depth=1).eval())
    names = {}
    exec(compile(script, "README.md", "exec"), names)
    assert (tmp_path / "deit_tiny_w4a8.onnx").stat().st_size > 10_000

    from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_gptq
    from brevitas_examples.imagenet_classification.ptq.ptq_common import calibrate

    from maskaq_brevitas.quant.swap import swap_layers

    quant_model = swap_layers(names["model"], "w4a8")[0]
    changed = functools.partial(_fewer, little)
    exec(
        compile(one_line, "README.md", "exec"),
        dict(
            model=names["model"], quant_model=quant_model, calibrate=calibrate, apply_gptq=apply_gptq,
            DataFreeCalibrator=changed,
        ),
    )  # fmt: skip


def _fewer(little, model, num_images, batch_size, **options):
    return little(model, batch_size=2, **options)
