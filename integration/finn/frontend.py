"""FINN's front end on one file; runs in FINN's own environment, knows nothing of this package.

``python frontend.py REQUEST.json ...`` reads of each request ``model``, ``output``, ``part``, ``target_fps``,
``clock_ns`` and, optionally, ``sample`` (an ``.npz``, see :mod:`integration.finn.reference`), and writes
``RESULT.json`` into the folder ``output``. The build steps are FINN's own, in the order of its estimate-only flow.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

#: FINN's estimate-only steps up to the hardware operators, and behind them.
BEFORE = ("qonnx_to_finn", "tidy_up", "streamline", "convert_to_hw", "minimize_bit_width_initial")
BEHIND = (
    "create_dataflow_partition", "specialize_layers", "target_fps_parallelization", "apply_folding_config",
    "minimize_bit_width", "transpose_decomposition", "generate_estimate_reports",
)  # fmt: skip
_HARDWARE = "finn.custom_op.fpgadataflow"
_QUANTIZERS = ("Thresholding", "Requant", "MultiThreshold")


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    output = Path(request["output"])
    output.mkdir(parents=True, exist_ok=True)
    os.environ["FINN_BUILD_DIR"] = str(output / "build")
    steps, config = load_finn(request, output)
    from qonnx.core.modelwrapper import ModelWrapper

    result: dict[str, Any] = {"versions": versions(), "seconds": {}, "failed": None}
    model = ModelWrapper(request["model"])
    try:
        for name in (*BEFORE, *BEHIND):
            began = time.monotonic()
            model = getattr(steps, f"step_{name}")(model, config)
            result["seconds"][name] = round(time.monotonic() - began, 1)
            print(f"finn: {name} {result['seconds'][name]} s", file=sys.stderr, flush=True)
            if name == BEFORE[-1]:
                model.save(str(output / "hardware.onnx"))
                result |= mapped(model)
                if request.get("sample"):
                    result["execution"] = [compare(model, sample) for sample in samples(request["sample"])]
    except Exception as error:  # FINN's refusals come as many types; which one is part of the answer
        result["failed"] = {"step": name, "error": f"{type(error).__name__}: {str(error).strip()}"}
        result |= {} if "nodes" in result else mapped(model)
    else:
        result["estimates"] = estimates(output)
    (output / "RESULT.json").write_text(json.dumps(result, indent=2) + "\n")


def load_finn(request: dict[str, Any], output: Path) -> tuple[Any, Any]:
    """FINN's build steps and a configuration, without Vivado."""
    from finn.util.settings import initialize_dummy_settings

    os.chdir(output)
    initialize_dummy_settings()
    import finn.xsi

    # The steps import this name of the RTL simulator, for an annotation; importing it would look for Vivado.
    finn.xsi.SimEngine = object
    import finn.builder.build_dataflow_steps as steps
    from finn.builder.build_dataflow_config import DataflowBuildConfig
    from finn.builder.build_dataflow_config import DataflowOutputType

    config = DataflowBuildConfig(
        output_dir=str(output / "build"),
        synth_clk_period_ns=request["clock_ns"],
        target_fps=request["target_fps"],
        fpga_part=request["part"],
        generate_outputs=[DataflowOutputType.ESTIMATE_REPORTS],
        standalone_thresholds=True,
        # By default the transposition of the image to channels last is left outside.
        infer_shuffle_skip_first=False,
    )
    return steps, config


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("finn-plus", "qonnx", "onnx", "brevitas")}


def mapped(model: Any) -> dict[str, Any]:
    """Nodes by operator, and those without a hardware operator."""
    left = [[node.op_type, node.name] for node in model.graph.node if not node.domain.startswith(_HARDWARE)]
    counts = collections.Counter(node.op_type for node in model.graph.node)
    return {"nodes": len(model.graph.node), "operators": dict(sorted(counts.items())), "unmapped": left}


def estimates(output: Path) -> dict[str, Any]:
    report = output / "build" / "report"
    performance = json.loads((report / "estimate_network_performance.json").read_text())
    resources = json.loads((report / "estimate_layer_resources.json").read_text())["total"]
    return {"performance": performance, "resources": resources}


def samples(path: str) -> list[dict[str, Any]]:
    """Inputs, outputs and quantizers of every sample in the file."""
    with np.load(path, allow_pickle=False) as content:
        arrays = dict(content)
    found = []
    for index, (given, output) in enumerate(zip(arrays["input"], arrays["output"], strict=True)):
        levels = {
            name.split("/", 2)[2]: value for name, value in arrays.items() if name.startswith(f"levels/{index}/")
        }  # fmt: skip
        ranges = {name: tuple(arrays[f"range/{name}"]) for name in levels}
        found.append({"input": given[None], "output": output[None], "levels": levels, "ranges": ranges})
    return found


def compare(model: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Execute the graph of hardware operators twice: on its own, and with its quantizers in step with PyTorch.

    On its own, two correct computations part at the first value that lies on a rounding tie. In step, each quantizer's
    output is replaced by PyTorch's, once it is found to equal it up to ties: then what comes out has to agree.
    """
    from finn.core.onnx_exec import execute_onnx

    names = model.graph.input[0].name, model.graph.output[0].name
    alone = execute_onnx(model, {names[0]: sample["input"]})[names[1]]
    step = _InStep(sample)
    held = execute_in_step(model, sample["input"], step)
    return {
        "alone": float(np.abs(alone - sample["output"]).max()),
        "in_step": float(np.abs(held - sample["output"]).max()),
        "same_top1": bool((alone.argmax(-1) == sample["output"].argmax(-1)).all()),
        "largest_output": float(np.abs(sample["output"]).max()),
        **step.verdict(),
    }


class _InStep:
    """Finds the PyTorch quantizer that each quantizer node is, and hands on its codes."""

    def __init__(self, sample: dict[str, Any]):
        self.levels, self.ranges = dict(sample["levels"]), sample["ranges"]
        self.quantizers = self.values = self.flips = 0
        self.farthest = 0.0
        self.strange: list[str] = []

    def __call__(self, name: str, value: np.ndarray) -> np.ndarray:
        best = None
        for key, levels in self.levels.items():
            for view in _views(levels, value.shape):
                codes = np.clip(np.round(view), *self.ranges[key])
                equal = float((codes == value).mean())
                if best is None or equal > best[0]:
                    best = (equal, key, view, codes)
        if best is None or best[0] < 0.95:
            self.strange.append(
                f"{name}: equals no quantizer of PyTorch (nearest {0.0 if best is None else best[0]:.3f})"
            )
            return value
        _, key, view, codes = best
        del self.levels[key]
        flipped = codes != value
        self.quantizers += 1
        self.values += value.size
        self.flips += int(flipped.sum())
        if flipped.any():
            if np.abs(codes - value).max() > 1:
                self.strange.append(f"{name}: off by more than one step")
            inside = np.clip(view[flipped], self.ranges[key][0], self.ranges[key][1])
            self.farthest = max(self.farthest, float(np.abs(np.abs(inside - np.floor(inside)) - 0.5).max()))
        return codes.astype(value.dtype)

    def verdict(self) -> dict[str, Any]:
        """Figures; ``farthest_flip`` is the largest distance of a flipped value to its rounding tie, in steps."""
        missing = [f"{key}: no node for it" for key in self.levels]
        return {
            "quantizers": self.quantizers, "values": self.values, "flips": self.flips, "farthest_flip": self.farthest,
            "strange": self.strange + missing,
        }  # fmt: skip


def _views(levels: np.ndarray, shape: tuple[int, ...]):
    """Layouts in which FINN may hold a tensor of PyTorch's: as it is, or with the channels last."""
    if levels.size != np.prod(shape):
        return
    if levels.ndim == 4:
        moved = np.moveaxis(levels, 1, -1)
        if moved.shape == tuple(shape):
            yield moved
            return
    yield levels.reshape(shape)


def execute_in_step(model: Any, given: np.ndarray, step: _InStep) -> np.ndarray:
    """Output of a graph, executed as :func:`qonnx.core.onnx_exec.execute_onnx` does, with its quantizers replaced."""
    from qonnx.core.onnx_exec import execute_node
    from qonnx.core.onnx_exec import sanitize_quant_values
    from qonnx.util.basic import get_preferred_qonnx_opset

    graph, versions = model.graph, model.get_opset_imports()
    context = model.make_empty_exec_context()
    context[graph.input[0].name] = given
    for node in graph.node:
        context = sanitize_quant_values(model, node.input, context)
        execute_node(node, context, graph, versions.get(node.domain, get_preferred_qonnx_opset()), True)
        context = sanitize_quant_values(model, node.output, context)
        if node.op_type in _QUANTIZERS:
            context[node.output[0]] = step(node.name, context[node.output[0]])
    return context[graph.output[0].name]


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        for request in sys.argv[1:]:
            main(request)
