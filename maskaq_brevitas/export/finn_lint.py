"""Would FINN map this QONNX file to hardware? Node by node, from a table of rules, without FINN."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from typing import Literal

import numpy as np

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.export.brevitas_onnx import last_lines
from maskaq_brevitas.export.finn_rules import FINN_VERSION
from maskaq_brevitas.export.finn_rules import RULES
from maskaq_brevitas.export.finn_rules import UNMAPPED
from maskaq_brevitas.export.finn_rules import Effect
from maskaq_brevitas.export.process import quiet
from maskaq_brevitas.export.process import require
from maskaq_brevitas.export.scopes import module_scopes

__all__ = ["FinnLint", "NodeVerdict", "lint_finn", "lint_text"]

#: Operators that hand on the values that they are given, and so their integer grid.
_PASSING = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity")
_RULES = {name: rule for rule in RULES for name in rule.operators}


@dataclass(frozen=True)
class NodeVerdict:
    """What FINN makes of one node.

    Attributes:
        name: of the node in the file.
        operator: ONNX operator.
        module: of PyTorch that it comes from; empty where the file does not tell.
        effect: ``"hardware"``, or what happens instead (see :data:`~maskaq_brevitas.export.finn_rules.Effect`).
        hardware: the hardware operator; empty if there is none.
        reason, remedy: why not, and what changes that; empty for hardware.
        macs: multiply-accumulates for one image.
    """

    name: str
    operator: str
    module: str
    effect: Literal["hardware"] | Effect
    hardware: str
    reason: str
    remedy: str
    macs: int


@dataclass(frozen=True)
class FinnLint:
    """The verdict on a file.

    Attributes:
        version: of FINN that the rules come from.
        nodes: every node between the graph's input and output; weights, their quantizers and constants are folded.
        between: names of nodes without hardware that stand between hardware: one of them, and FINN builds nothing.
        graph: what is wrong with the file as a whole.
    """

    version: str
    nodes: tuple[NodeVerdict, ...]
    between: tuple[str, ...]
    graph: tuple[str, ...]

    @property
    def lands(self) -> bool:
        """Whether everything between input and output becomes hardware, and computes what the file says."""
        return not self.graph and all(node.effect == "hardware" for node in self.nodes)

    @property
    def node_share(self) -> float:
        """Share of nodes that become hardware, 0-1."""
        return sum(node.effect == "hardware" for node in self.nodes) / max(1, len(self.nodes))

    @property
    def mac_share(self) -> float:
        """Share of multiply-accumulates on hardware, 0-1."""
        total = sum(node.macs for node in self.nodes)
        return sum(node.macs for node in self.nodes if node.effect == "hardware") / max(1, total)


def lint_finn(path: str | os.PathLike[str]) -> FinnLint:
    """Judge each node of a QONNX file by the rules of :mod:`~maskaq_brevitas.export.finn_rules`.

    Raises:
        MissingExtraError: onnx or qonnx is not installed.
        ExportError: the file cannot be read as a QONNX graph.
    """
    require("onnx", "qonnx")
    with quiet():
        try:
            graph = _Graph(path)
        except Exception as error:
            raise ExportError(
                f"Expected a QONNX file at {os.fspath(path)}, got {type(error).__name__}: {last_lines(error)}. "
                "Write it with 'maskaq export --target finn'."
            ) from error
        verdicts = tuple(_judge(graph, node) for node in graph.nodes)
        between = _between(graph, {verdict.name for verdict in verdicts if verdict.effect == "hardware"})
    return FinnLint(FINN_VERSION, verdicts, between, tuple(_graph_problems(graph)))


def lint_text(lint: FinnLint, *, every_node: bool = False, only_verdict: bool = False) -> str:
    """A verdict for people: what does not land, grouped by its reason, and the shares.

    Args:
        every_node: list all nodes first.
        only_verdict: nothing but the last line.
    """
    lines = []
    if every_node:
        lines += [
            f"{node.effect:9} {node.operator:18} {node.hardware:30} {node.module or node.name}" for node in lint.nodes
        ]
    groups: dict[tuple[str, str, str, str], list[NodeVerdict]] = {}
    for node in lint.nodes:
        if node.effect != "hardware":
            groups.setdefault((node.effect, node.operator, node.reason, node.remedy), []).append(node)
    for (effect, operator, reason, remedy), nodes in groups.items():
        names = ", ".join(node.module or node.name for node in nodes[:3]) + (" ..." if len(nodes) > 3 else "")
        lines.append(f"{effect}: {len(nodes)} x {operator} ({names}): {reason}. What changes that: {remedy}.")
    lines += [f"graph: {text}." for text in lint.graph]
    if lint.between:
        lines.append(f"{len(lint.between)} of them between hardware operators: the dataflow partition would fail.")
    notes = dict.fromkeys(note for node in lint.nodes if (note := _RULES[node.operator].note if node.hardware else ""))
    lines += [f"note: {note}." for note in notes]
    macs = sum(node.macs for node in lint.nodes)
    verdict = (
        f"{lint.version}: {lint.node_share:.1%} of {len(lint.nodes)} nodes and {lint.mac_share:.1%} of "
        f"{macs / 1e6:.1f} MMACs on hardware operators: {'everything lands' if lint.lands else 'it does not land'}"
    )
    return verdict if only_verdict else "\n".join([*lines, verdict])


class _Graph:
    """A cleaned graph, and which of its tensors are integers up to a scale."""

    def __init__(self, path: str | os.PathLike[str]):
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.util.cleanup import cleanup_model

        self.model = cleanup_model(ModelWrapper(os.fspath(path)))
        self.graph = self.model.graph
        self.constants = {tensor.name for tensor in self.graph.initializer}
        self.nodes: list[Any] = []
        self.grids: dict[str, _Grid] = {}
        self.folded: set[str] = set()
        for node in self.graph.node:
            data = [name for name in node.input if name]
            if all(name in self.constants or name in self.folded for name in data):
                self.folded.update(node.output)
                self._note_grid(node)
                continue
            self._note_grid(node)
            self.nodes.append(node)

    def value(self, name: str) -> np.ndarray | None:
        """A constant."""
        return self.model.get_initializer(name) if name else None

    def shape(self, name: str) -> list[int]:
        return list(self.model.get_tensor_shape(name) or [])

    def is_static(self, name: str) -> bool:
        return name in self.constants or name in self.folded

    def attribute(self, node: Any, name: str, default: Any = None) -> Any:
        from onnx.helper import get_attribute_value

        found = next((entry for entry in node.attribute if entry.name == name), None)
        if found is None:
            return default
        value = get_attribute_value(found)
        return value.decode() if isinstance(value, bytes) else value

    def _note_grid(self, node: Any) -> None:
        if node.op_type == "Quant":
            scale = self.value(node.input[1])
            is_weight = self.is_static(node.input[0])
            grid = None if scale is None else _Grid(scalar=is_weight or scale.size == 1, unit=bool((scale == 1).all()))
        elif node.op_type in _PASSING:
            grid = self.grids.get(node.input[0])
        elif node.op_type == "Concat":
            grids = [self.grids.get(name) for name in node.input]
            grid = grids[0] if all(found is not None and found.unit for found in grids) else None
        elif node.op_type in ("Mul", "Div"):
            grid = self._scaled(node)
        else:
            grid = None
        if grid is None:
            return
        for name in node.output:
            forks = len(self.model.find_consumers(name) or []) > 1 and not self.is_static(name)
            self.grids[name] = grid if not forks or grid.unit else _Grid(grid.scalar, False, behind_fork=True)

    def _scaled(self, node: Any) -> _Grid | None:
        """The grid of a product with a constant, which has one more scale."""
        for data, factor in (node.input, reversed(node.input)) if node.op_type == "Mul" else (node.input,):
            grid, constant = self.grids.get(data), self.value(factor)
            if grid is not None and constant is not None:
                return _Grid(grid.scalar and constant.size == 1, False, grid.behind_fork)
        return None


@dataclass(frozen=True)
class _Grid:
    """Integers times a scale: one for all, of 1, and whether it would have to pass a fork."""

    scalar: bool
    unit: bool
    behind_fork: bool = False


def _judge(graph: _Graph, node: Any) -> NodeVerdict:
    rule = _RULES.get(node.op_type)
    effect, reason, remedy = "hardware", "", ""
    if rule is None:
        effect = "unmapped"
        reason, remedy = UNMAPPED.get(node.op_type, ("no rule knows it", "another way to compute it"))
    else:
        for need in rule.needs:
            if not _CHECKS[need.check](graph, node):
                reason = need.wrong.format(rounding_mode=graph.attribute(node, "rounding_mode", "ROUND"))
                effect, remedy = need.effect, need.remedy
                break
    # The last scope may be the traced call instead of a module.
    scopes = module_scopes(node)
    module = next((scope for scope in reversed(scopes) if "." in scope), scopes[-1] if scopes else "")
    return NodeVerdict(
        name=node.name, operator=node.op_type, module=module, effect=effect,  # type: ignore[arg-type]
        hardware=rule.hardware if rule is not None and effect == "hardware" else "", reason=reason, remedy=remedy,
        macs=_macs(graph, node),
    )  # fmt: skip


def _macs(graph: _Graph, node: Any) -> int:
    if node.op_type in ("MatMul", "Gemm"):
        inner = graph.shape(node.input[0])
        depth = inner[-2] if node.op_type == "Gemm" and graph.attribute(node, "transA", 0) else inner[-1]
        return math.prod(graph.shape(node.output[0])) * depth
    if node.op_type == "Conv":
        return math.prod(graph.shape(node.output[0])) * math.prod(graph.shape(node.input[1])[1:])
    return 0


def _between(graph: _Graph, hardware: set[str]) -> tuple[str, ...]:
    """Nodes without hardware that have hardware in front of them and behind."""
    after: set[str] = set()
    for node in graph.nodes:
        if node.name in hardware or after.intersection(node.input):
            after.update(node.output)
    before: set[str] = set()
    for node in reversed(graph.nodes):
        if node.name in hardware or before.intersection(node.output):
            before.update(node.input)
    return tuple(
        node.name
        for node in graph.nodes
        if node.name not in hardware and after.intersection(node.input) and before.intersection(node.output)
    )


def _graph_problems(graph: _Graph) -> Iterator[str]:
    for value in graph.graph.input:
        shape = graph.shape(value.name)
        if not shape or shape[0] != 1:
            batch = shape[0] if shape else "unknown"
            yield f"the batch of {value.name} is {batch}, and has to be 1: export with --target finn"


def _axis(graph: _Graph, node: Any, default: int) -> int:
    axis: int = graph.attribute(node, "axis", default)
    return axis + len(graph.shape(node.input[0])) if axis < 0 else axis


def _is_last_axis(default: int) -> Callable[[_Graph, Any], bool]:
    return lambda graph, node: _axis(graph, node, default) == len(graph.shape(node.input[0])) - 1


def _equals(index: int, wanted: float) -> Callable[[_Graph, Any], bool]:
    def check(graph: _Graph, node: Any) -> bool:
        value = graph.value(node.input[index]) if len(node.input) > index else None
        return value is not None and bool((value == wanted).all())

    return check


def _width(graph: _Graph, node: Any) -> np.ndarray | None:
    return graph.value(node.input[3])


def _scale_axes(graph: _Graph, node: Any) -> bool:
    scale = graph.value(node.input[1])
    return scale is not None and sum(size > 1 for size in scale.shape) <= 1


def _activations(graph: _Graph, node: Any) -> list[_Grid]:
    """Grids of the operands of a product that are no weights."""
    return [graph.grids[name] for name in node.input[:2] if name in graph.grids and not graph.is_static(name)]


def _pads_or_joins(graph: _Graph, node: Any) -> bool:
    streams = [name for name in node.input if not graph.is_static(name)]
    shape = graph.shape(streams[0])
    axis = _axis(graph, node, 0)
    if len(streams) == len(node.input):
        return axis == len(shape) - 1
    return len(streams) == 1 and len(shape) == 3 and axis == 1 and shape[0] == 1


def _one_grid(graph: _Graph, node: Any) -> bool:
    grids = [graph.grids.get(name) for name in node.input]
    return all(grid is not None and grid.unit for grid in grids)


def _picks_tokens(graph: _Graph, node: Any) -> bool:
    indices, shape = graph.value(node.input[1]), graph.shape(node.input[0])
    if indices is None or _axis(graph, node, 0) != 1 or len(shape) != 3 or shape[0] != 1:
        return False
    return bool((np.diff(np.sort(indices.flatten())) == 1).all())


def _quantizer_behind(graph: _Graph, node: Any) -> bool:
    return [reader.op_type for reader in graph.model.find_consumers(node.output[0]) or []] == ["Quant"]


_CHECKS: dict[str, Callable[[_Graph, Any], bool]] = {
    "at_most_8_bits": lambda graph, node: bool((_width(graph, node) <= 8).all()),  # type: ignore[operator,union-attr]
    "has_norm_bias": lambda graph, node: len(node.input) > 2 and bool(node.input[2]),
    "integer_data": lambda graph, node: node.input[0] in graph.grids,
    "integer_operands": lambda graph, node: all(name in graph.grids for name in node.input[:2]),
    "normalises_last_axis": _is_last_axis(-1),
    "one_integer_grid": _one_grid,
    "one_scale_axis": _scale_axes,
    "pads_tokens_or_joins_channels": _pads_or_joins,
    "picks_constant_tokens": _picks_tokens,
    "plain_gelu": lambda graph, node: graph.attribute(node, "approximate", "none") == "none",
    "quantizer_behind": _quantizer_behind,
    "rounds_half_even": lambda graph, node: graph.attribute(node, "rounding_mode", "ROUND").upper() == "ROUND",
    "scalar_scales": lambda graph, node: all(grid.scalar for grid in _activations(graph, node)),
    "scales_pass_forks": lambda graph, node: not any(grid.behind_fork for grid in _activations(graph, node)),
    "static_shape": lambda graph, node: graph.value(node.input[1]) is not None,
    "static_width": lambda graph, node: _width(graph, node) is not None,
    "unit_norm_scale": _equals(1, 1.0),
    "works_on_last_axis": _is_last_axis(-1),
    "zero_norm_bias": _equals(2, 0.0),
    "zero_point_is_0": _equals(2, 0.0),
}
