"""The options of the command line, and the same options in a YAML file. Nothing here imports torch."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import types
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import Literal
from typing import NoReturn
from typing import Union
from typing import get_args
from typing import get_origin
from typing import get_type_hints

import yaml

from maskaq_brevitas.config import EFFORTS
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import resolve_effort
from maskaq_brevitas.errors import ConfigurationError

__all__ = ["COMMANDS", "parse", "read_saved", "to_yaml", "top_parser"]

COMMANDS = {
    "quantize": "quantize a model without data: synthesise, calibrate, tune, evaluate, export, report",
    "evaluate": "accuracy of the float and the quantized model of a run, on labelled images",
    "sensitivity": "what each kind of quantizer of a run costs by itself, measured on its synthetic images",
    "lint-finn": "would FINN map a QONNX file to hardware: node by node, and if not why and what changes that; needs "
    "no FINN",
    "export": "write the quantized model of a run as a file for other tools, and check the file by executing it",
    "models": "the architecture families that are known, and what works for each",
}

#: What follows the name of a command, if it is no RUN.
_ARGUMENTS = {"quantize": "MODEL", "models": "[FAMILY]", "lint-finn": "FILE.onnx"}

#: Configuration classes that appear as ``--PREFIX.KEY``, and the keys that have a short option instead.
_SECTIONS = {
    "synthesis": (SynthesisConfig, {"steps", "batch_size"}),
    "tuning": (DistillConfig, {"epochs", "refresh_every"}),
    "reconstruct": (ReconstructConfig, set()),
}
#: Options that say where and how a command runs, not what it computes: they are not saved with a run.
_NOT_SAVED = {"config", "out", "overwrite", "resume", "quiet"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See: {self.prog} --help")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text; options without one say in their text what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default is None or isinstance(action.default, (bool, list))
        return action.help if empty else super()._get_help_string(action)


def top_parser(version: str) -> argparse.ArgumentParser:
    """The parser of ``maskaq`` itself; it knows the commands by name only."""
    parser = _Parser(
        prog="maskaq",
        description="Data-free quantization of Vision Transformers on Brevitas.",
        epilog="'maskaq COMMAND --help' lists the options of a command, with units and defaults.",
    )
    parser.add_argument("--version", action="version", version=f"maskaq_brevitas {version}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def parse(command: str, arguments: list[str]) -> argparse.Namespace:
    """The options of a command; those of ``--config FILE.yaml`` come first, the command line overrides them.

    Raises:
        ConfigurationError: unknown option or key, or a value of the wrong kind.
    """
    parser, actions = _command_parser(command)

    def parsed() -> argparse.Namespace:
        options = parser.parse_intermixed_args(arguments)
        if getattr(options, "config", None) is not None:
            options = _parse_values(parser, actions, _read_yaml(Path(options.config)), options.config, arguments)
        return options

    options = parsed()
    if getattr(options, "target", None) == "finn":
        parser.set_defaults(format="finn")
        options = parsed()
    if command == "quantize":
        # The effort sets the defaults of other options, and what is said of those still counts.
        parser.set_defaults(**_effort_values(options.effort))
        options = _completed(parsed())
        if options.images_from is not None:
            taken = options.resume and (Path(options.out) / "images.safetensors").is_file()
            parser.set_defaults(**_image_values(Path(options.out if taken else options.images_from)))
            options = _completed(parsed())
    return options


def _completed(options: argparse.Namespace) -> argparse.Namespace:
    """The options of ``quantize`` with what follows from others."""
    if options.model is None:
        raise ConfigurationError("Expected a MODEL, got none: name one, or give a --config that does.")
    if options.overwrite and options.resume:
        raise ConfigurationError("Expected --overwrite or --resume, got both. Choose one.")
    if options.target == "finn" and re.fullmatch(r"w\da\d", options.scheme):
        options.scheme = f"finn-{options.scheme}"
    if options.out is None:
        options.out = f"runs/{options.model}-{options.scheme}"
    return options


def read_saved(path: Path) -> argparse.Namespace:
    """The options of ``quantize`` that a run was made with.

    Raises:
        ConfigurationError: if the file is missing or damaged, or has an unknown key.
    """
    parser, actions = _command_parser("quantize")
    return _parse_values(parser, actions, _read_yaml(path), str(path), [])


def to_yaml(options: argparse.Namespace) -> str:
    """Resolved options of ``quantize`` as YAML, to be given back through ``--config``."""
    content: dict[str, Any] = {"model": options.model}
    for name, value in vars(options).items():
        if name in _NOT_SAVED:
            continue
        section, _, key = name.rpartition(".")
        (content.setdefault(section, {}) if section else content)[key] = value
    return str(yaml.safe_dump(content, sort_keys=False))


def _command_parser(command: str) -> tuple[argparse.ArgumentParser, dict[str, argparse.Action]]:
    """The parser of one command, and its options by their name in YAML."""
    parser = _Parser(
        prog=f"maskaq {command}", usage=f"maskaq {command} {_ARGUMENTS.get(command, 'RUN')} [options]",
        description=COMMANDS[command][0].upper() + COMMANDS[command][1:] + ".",
        formatter_class=_Help, allow_abbrev=False,
    )  # fmt: skip
    actions: dict[str, argparse.Action] = {}

    def add(*flags: str, group: Any = parser, **details: Any) -> None:
        action = group.add_argument(*flags, **details)
        actions[action.dest] = action

    {"quantize": _add_quantize, "evaluate": _add_evaluate, "export": _add_export,
     "sensitivity": _add_sensitivity, "models": _add_models, "lint-finn": _add_lint_finn}[command](parser, add)
    return parser, actions


def _add_quantize(parser: argparse.ArgumentParser, add: Callable[..., None]) -> None:
    add("model", nargs="?", metavar="MODEL", help="'digits_vit' (shipped), the name of a timm Vision Transformer, or "
        "of one of torchvision ('torchvision:vit_b_16')")
    add("--config", metavar="FILE.yaml", help="options from a file, for example RUN/config.yaml of an earlier run; the "
        "command line overrides it (repeated --override add to it)")  # fmt: skip
    add(
        "--checkpoint",
        metavar="FILE.safetensors",
        help="local weights; without it timm or torchvision downloads its own",
    )
    add("--scheme", default="w4a8", metavar="wXaY", help="bits of weights and activations, 2 to 8: wXaY (patch "
        "embedding, head and attention probabilities at 8, a scale per channel behind LayerNorm and GELU), tensor-wXaY "
        "(one scale per tensor), strict-wXaY (everything at XY, one scale per tensor), finn-wXaY (what FINN maps to "
        "hardware), or auto")  # fmt: skip
    add("--average-bits", type=float, default=4.5, metavar="X", help="with --scheme auto: widths are chosen layer by "
        "layer, by sensitivity on the synthetic images, within the bit operations of X bits everywhere")  # fmt: skip
    add("--override", action="append", default=[], metavar="PATTERN=wXaY",
        help="other bits for the layers that a shell pattern matches, e.g. 'blocks.*.mlp.fc2=w4a8'; repeatable")
    add("--effort", choices=tuple(EFFORTS), default="fast", help="sets the defaults of --images, --steps, --tune, "
        "--epochs, --refresh-every, --synthesis.* and --tuning.*: fast only calibrates; default and best distil, for "
        "minutes and for about an hour on two cores (ViT-Tiny)")  # fmt: skip
    add("--images", type=int, default=64, metavar="N", help="synthetic images")
    add("--images-from", metavar="RUN", help="take the images of another run of the same model, and its --images, "
        "--steps, --batch-size and --synthesis.*, instead of making new ones")  # fmt: skip
    add("--steps", type=int, default=SynthesisConfig.steps, metavar="N", help="iterations of synthesis per batch")
    add("--batch-size", type=_count_or_auto, default=16, metavar="N|auto",
        help="images per batch, in synthesis and calibration; auto: by the device and its free memory")
    add("--seed", type=int, default=0, metavar="N", help="of all randomness")
    add("--device", default="cpu", metavar="NAME", help="where the networks run: cpu, cuda, cuda:1 ...")
    add("--tune", choices=("none", "reconstruct", "distill", "reconstruct+distill"), default="none",
        help="after calibration, on the synthetic images: nothing; block-by-block reconstruction; distillation from "
        "the float model with refreshed images; or one after the other")
    add("--epochs", type=int, default=DistillConfig.epochs, metavar="N", help="passes over the images (--tune)")
    add("--refresh-every", type=_optional(int), default=DistillConfig.refresh_every, metavar="N",
        help="epochs between refreshes of the images against the quantized model, or none (--tune)")
    data = parser.add_argument_group("labelled images (they only evaluate)")
    _add_evaluation_data(add, data, "test split")
    add("--calibration-data", group=data, metavar="DIR", help="real images, for a row to compare with: the same "
        "quantizers calibrated on them; digits_vit takes its training split")  # fmt: skip
    add("--no-baselines", group=data, action="store_true",
        help="leave out the rows calibrated on noise and on real images")
    output = parser.add_argument_group("output")
    add("--out", group=output, metavar="DIR", help="folder of the run; default: runs/MODEL-SCHEME")
    add("--overwrite", group=output, action="store_true", help="replace the run that DIR holds")
    add("--resume", group=output, action="store_true", help="continue the run that DIR holds")
    add("--no-export", group=output, action="store_true", help="do not write and check a file for other tools")
    _add_file_kind(add, output)
    add("--quiet", group=output, action="store_true", help="no progress; only the final table")
    for section, (cls, short) in _SECTIONS.items():
        group = parser.add_argument_group(f"{section} in detail")
        hints, texts = get_type_hints(cls), _attribute_texts(cls)
        for entry in dataclasses.fields(cls):
            if entry.name not in short:
                add(f"--{section}.{entry.name}", group=group, default=entry.default,
                    help=texts.get(entry.name, "").replace("%", "%%"), **_argument_type(hints[entry.name]))


def _effort_values(name: str) -> dict[str, Any]:
    """Options of ``quantize`` that an effort sets, by destination."""
    effort = resolve_effort(name)  # type: ignore[arg-type]
    values: dict[str, Any] = {"images": effort.num_images}
    for section, config in (("synthesis", effort.synthesis), ("tuning", effort.tuning)):
        short = _SECTIONS[section][1]
        values.update({
            key if key in short else f"{section}.{key}": value
            for key, value in ({} if config is None else vars(config)).items()
        })  # fmt: skip
    return values if effort.tuning is None else {**values, "tune": "distill"}


def _image_values(run: Path) -> dict[str, Any]:
    """Options of ``quantize`` that say how the images of a run were made, by destination.

    Raises:
        ConfigurationError: if there is no run, or its manifest is damaged.
    """
    try:
        identity = json.loads((run / "run.json").read_text(encoding="utf-8"))["identity"]
        synthesis = dict(identity["synthesis"])
        values = {"images": identity["num_images"], "steps": synthesis.pop("steps")}
        values["batch_size"] = synthesis.pop("batch_size")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"--images-from: expected the folder of a run with its images, got {run}: {error}."
        ) from error
    return {**values, **{f"synthesis.{name}": value for name, value in synthesis.items()}}


def _add_evaluate(parser: argparse.ArgumentParser, add: Callable[..., None]) -> None:
    add("run", metavar="RUN", help="folder of a run")
    _add_evaluation_data(add, parser, "test split")
    add("--onnx", metavar="FILE", help="an exported file of the run to evaluate as well: QCDQ by ONNX Runtime, QONNX "
        "by qonnx (seconds per image; limit them with --eval-limit)")  # fmt: skip
    add("--device", default="cpu", metavar="NAME", help="where the networks run: cpu, cuda, cuda:1 ...")
    add("--quiet", action="store_true", help="no progress; only the final table")


def _add_sensitivity(parser: argparse.ArgumentParser, add: Callable[..., None]) -> None:
    add("run", metavar="RUN", help="folder of a run")
    add("--by", choices=("kind", "layer", "block"), default="kind", help="what is measured by itself: all quantizers "
        "of a kind, of a layer or attention module, or of a block")  # fmt: skip
    add("--images", type=int, default=32, metavar="N", help="synthetic images to measure on")
    add("--device", default="cpu", metavar="NAME", help="where the networks run: cpu, cuda, cuda:1 ...")
    add("--quiet", action="store_true", help="no progress; only the final table")


def _add_models(parser: argparse.ArgumentParser, add: Callable[..., None]) -> None:
    add("family", nargs="?", metavar="FAMILY", help="only families whose name or example contains this text")
    add("--check", action="store_true", help="measure the rows again on small models with random weights, instead of "
        "printing those of the last measurement; about ten seconds per row")  # fmt: skip


def _add_export(parser: argparse.ArgumentParser, add: Callable[..., None]) -> None:
    add("run", metavar="RUN", help="folder of a run")
    _add_file_kind(add, parser)
    add("--output", metavar="FILE", help="file to write, replaced if it exists; default: in RUN, model.onnx, "
        "model.finn.onnx, model.qcdq.onnx, model.qcdq.pt or model.pt2 by its format")  # fmt: skip


def _add_lint_finn(parser: argparse.ArgumentParser, add: Callable[..., None]) -> None:
    add("file", metavar="FILE.onnx", help="a QONNX file")
    add("--all", action="store_true", help="list every node, also those that become hardware")
    add("--quiet", action="store_true", help="only the last line")


def _add_evaluation_data(add: Callable[..., None], group: Any, split: str) -> None:
    add("--eval-data", group=group, metavar="DIR", help="ImageFolder, or a folder with labels.csv (file,label); "
        f"without it digits_vit takes its {split} and others are not evaluated")  # fmt: skip
    add("--eval-limit", group=group, type=int, metavar="N", help="evaluate on N images, evenly spaced; default: all")
    add("--eval-batch-size", group=group, type=int, default=64, metavar="N", help="images per step of an evaluation")


def _add_file_kind(add: Callable[..., None], group: Any) -> None:
    add("--format", group=group, choices=("qonnx", "finn", "qcdq", "torch-qcdq", "torch-export"), default="qonnx",
        help="kind of file: qonnx (Brevitas' Quant nodes, with a card of its costs beside it), qcdq (ONNX "
        "QuantizeLinear/DequantizeLinear with integer weights, for ONNX Runtime), finn (see --target), torch-qcdq "
        "(TorchScript with int8 weights), torch-export (torch.export, .pt2)")  # fmt: skip
    add("--target", group=group, choices=("any", "finn"), default="any", help="finn: scheme finn-wXaY for a scheme "
        "wXaY, and format finn: a QONNX file whose nodes all have a hardware operator in FINN")  # fmt: skip
    add("--batch", group=group, choices=("fixed", "dynamic"), default="fixed",
        help="first dimension of the file: 1 image, or any number")


def _parse_values(
    parser: argparse.ArgumentParser,
    actions: dict[str, argparse.Action],
    values: Mapping[str, Any],
    source: str,
    arguments: list[str],
) -> argparse.Namespace:
    """Values of a YAML file as if they stood on the command line, in front of ``arguments``."""
    tokens: list[str] = []
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = str(key) in _SECTIONS and isinstance(value, Mapping)
        flat.update({f"{key}.{name}": item for name, item in value.items()} if nested else {str(key): value})
    for key, value in flat.items():
        action = actions.get(key)
        if action is None or key == "config":
            near = difflib.get_close_matches(key, actions, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(actions)}."
            raise ConfigurationError(f"{source}: unknown key {key!r}. {hint}")
        if not action.option_strings:
            model = value
            continue
        flag = action.option_strings[0]
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise ConfigurationError(f"{source}: {key}: expected true or false, got {value!r}.")
            tokens += [flag] * value
        elif isinstance(action.default, list):
            if not isinstance(value, list):
                raise ConfigurationError(f"{source}: {key}: expected a list, got {value!r}.")
            tokens += [f"{flag}={item}" for item in value]
        elif isinstance(value, (list, Mapping)):
            raise ConfigurationError(f"{source}: {key}: expected a single value, got {value!r}.")
        elif value is not None:
            tokens.append(f"{flag}={str(value).lower() if isinstance(value, bool) else value}")
        elif action.default is not None:
            tokens.append(f"{flag}=none")
    options = parser.parse_intermixed_args([*tokens, *arguments])
    if "model" in flat and options.model is None:
        options.model = str(model)
    return options


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = _one_line(error)
        raise ConfigurationError(f"Expected a YAML file of options, cannot read '{path}': {reason}.") from error
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"{path}: expected options as 'key: value', got {type(content).__name__}.")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _argument_type(hint: Any) -> dict[str, Any]:
    """``type``, ``choices`` and ``metavar`` of an option for a field of that type."""
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) in (Union, types.UnionType):
        inner = next(kind for kind in get_args(hint) if kind is not type(None))
        return {"type": _optional(inner), "metavar": "X" if inner is float else "N"}
    if hint is bool:
        return {"type": _boolean, "metavar": "true|false"}
    return {"type": hint, "metavar": "X" if hint is float else "N"}


def _optional(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return None if text.lower() in ("none", "null") else kind(text)

    convert.__name__ = f"{kind.__name__} or none"  # argparse names it in its message
    return convert


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


_count_or_auto.__name__ = "whole number or auto"


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


_boolean.__name__ = "true or false"


def _attribute_texts(cls: type) -> dict[str, str]:
    """What the ``Attributes`` of a docstring say of each name."""
    section = (cls.__doc__ or "").partition("Attributes:")[2]
    texts = {}
    for names, text in re.findall(r"^ {8}([a-z][\w, ]*): (.*(?:\n {12}.*)*)", section, flags=re.MULTILINE):
        plain = " ".join(text.replace("``", "").split())
        texts.update(dict.fromkeys(names.split(", "), plain))
    return texts
