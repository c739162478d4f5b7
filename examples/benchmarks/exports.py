"""How far exported files and PyTorch agree, beside how far PyTorch agrees with itself.

    python examples/benchmarks/exports.py runs/vit --eval-data photos --limit 200 --exact 50

Two correct programs round float sums differently. Where a quantizer's input lies next to a rounding tie, that decides
its code, and the following layers of a low-bit model amplify the step. So the equal top-1 of a file and PyTorch has a
ceiling, which the rows "summed in another order" show: the same PyTorch model, its channels and tokens summed in
another order, and softmax and GELU by their textbook formulas. The rows "float64" compute everything between the
quantizers in float64 and round to float32 behind each operator; what is then left of a difference is a difference of
the functions. The files are computed there by onnx' reference implementation (numpy), GELU by scipy.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from qonnx.core.modelwrapper import ModelWrapper
from scipy.special import erf
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from maskaq_brevitas.commands.common import labelled_data
from maskaq_brevitas.commands.common import load_run
from maskaq_brevitas.commands.common import saved_options
from maskaq_brevitas.export import QcdqModel
from maskaq_brevitas.export import QonnxModel
from maskaq_brevitas.export import export_qcdq
from maskaq_brevitas.export import export_qonnx
from maskaq_brevitas.export.execute import QonnxExecutor
from maskaq_brevitas.files import write_whole
from maskaq_brevitas.report.report import text_table

_BATCH = 4
_SUMMING = {"MatMul", "Gemm", "Conv", "LayerNormalization", "Softmax", "Gelu"}


class Arithmetic(TorchFunctionMode):
    """Inside, every operator with a sum or a transcendental function is computed in float64, in another order, or both.
    """

    def __init__(self, *, double: bool, reordered: bool):
        super().__init__()
        self.double, self.reordered = double, reordered

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = getattr(self, f"_{function.__name__.strip('_')}", None)
        if handler is None or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return function(*args, **(kwargs or {}))
        return handler(*args, **(kwargs or {})).float()

    def _wide(self, *tensors: Tensor | None) -> list[Any]:
        return [tensor.double() if self.double and tensor is not None else tensor for tensor in tensors]

    def _order(self, count: int) -> Tensor:
        order = torch.arange(count)
        return order[torch.randperm(count, generator=torch.Generator().manual_seed(1))] if self.reordered else order

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x, weight = self._wide(x, weight)
        order = self._order(x.shape[-1])
        product = F.linear(x[..., order], weight[:, order]).float()  # as MatMul and Add in a file
        return product if bias is None else product + bias

    def _conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any) -> Tensor:
        x, weight, bias = self._wide(x, weight, bias)
        order = self._order(x.shape[1])
        return F.conv2d(x[:, order], weight[:, order], bias, *geometry)

    def _matmul(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self._wide(x, y)
        order = self._order(x.shape[-1])
        return x[..., order] @ y[..., order, :]

    def _layer_norm(self, x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        x, weight, bias = self._wide(x, weight, bias)
        order = self._order(x.shape[-1])
        return F.layer_norm(x[..., order], shape, weight[order], bias[order], eps)[..., order.argsort()]

    def _softmax(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        (x,) = self._wide(x)
        if not self.reordered:
            return torch.softmax(x, -1)
        powers = (x - x.amax(-1, keepdim=True)).exp()
        return powers / powers.sum(-1, keepdim=True)

    def _gelu(self, x: Tensor, **_: Any) -> Tensor:
        (x,) = self._wide(x)
        return 0.5 * x * (1 + torch.erf(x * 0.5**0.5)) if self.reordered else F.gelu(x)


def in_float64(path: Path, images: Tensor) -> Tensor:
    """Logits of a QONNX or QCDQ file, with float64 inside of every operator of :data:`_SUMMING`; one image at a time.
    """
    graph = ModelWrapper(onnx.load(path))
    executor = QonnxExecutor(graph)
    opsets = {entry.domain: entry.version for entry in graph.model.opset_import}
    runners = [
        None if node.op_type in ("Quant", "Gelu") else ReferenceEvaluator(node, opsets=opsets)
        for node in graph.graph.node
    ]
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    found = []
    for image in images:
        context: dict[str, Any] = {**constants, graph.graph.input[0].name: image[None].numpy()}
        for node, runner in zip(graph.graph.node, runners, strict=True):
            if node.op_type == "Quant":
                executor.run(node, context)
                continue
            feed = {name: context[name] for name in node.input if name}
            if node.op_type in _SUMMING:
                feed = {name: value.astype(np.float64) for name, value in feed.items()}
            if node.op_type == "Gelu":
                (x,) = feed.values()
                results = [0.5 * x * (1 + erf(x * 0.5**0.5))]
            else:
                results = runner.run(None, feed)
            for name, value in zip(node.output, results, strict=False):
                context[name] = value.astype(np.float32) if value.dtype == np.float64 else value
        found.append(torch.from_numpy(context[graph.graph.output[0].name]))
    return torch.cat(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Export a finished run, execute both ONNX files and the model, and print and store how far they agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run of maskaq quantize")
    parser.add_argument("--eval-data", help="labelled images; default: those of the run")
    parser.add_argument("--limit", type=int, default=200, help="images, evenly spaced")
    parser.add_argument(
        "--exact", type=int, default=20, help="of these, images for the files in float64 (seconds each)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)

    saved = saved_options(Namespace(run=options.run, device="cpu", quiet=True))
    saved.eval_data = options.eval_data or saved.eval_data
    calibrator = load_run(options.run, saved)
    data = labelled_data(saved, calibrator.float_model).evaluation
    chosen = [
        data[index] for index in torch.linspace(0, len(data) - 1, min(options.limit, len(data))).round().long().tolist()
    ]
    images, labels = torch.stack([image for image, _ in chosen]), torch.tensor([int(label) for _, label in chosen])
    shape, model = calibrator.geometry.input_size, calibrator.freeze()
    print(f"{saved.model}, {saved.scheme}, {len(images)} images, {torch.get_num_threads()} threads\n")

    def pytorch(double: bool = False, reordered: bool = False) -> Tensor:
        with torch.no_grad(), Arithmetic(double=double, reordered=reordered):
            return torch.cat([model(chunk) for chunk in images.split(_BATCH)])

    rows: list[dict[str, Any]] = []
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)

    def row(name: str, compute: Callable[[], Tensor], like: Tensor | None) -> Tensor:
        start = time.perf_counter()
        with torch.no_grad():
            found = compute()
        entry: dict[str, Any] = {"name": name, "images": len(found)}
        entry["top1"] = 100 * float((found.argmax(1) == labels[: len(found)]).double().mean())
        if like is not None:
            like = like[: len(found)]
            difference = (found - like).abs().amax(1) / like.abs().max()
            entry["equal_top1"] = 100 * float((found.argmax(1) == like.argmax(1)).double().mean())
            entry["median_difference"], entry["largest_difference"] = (
                float(difference.median()),
                float(difference.max()),
            )
        entry["seconds"] = round(time.perf_counter() - start, 1)
        rows.append(entry)
        print(f"{name}: {entry['seconds']} s", file=sys.stderr, flush=True)
        if options.out is not None:  # after each row: the slow ones may be interrupted
            write_whole(
                options.out, lambda aside: aside.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
            )
        return found

    with tempfile.TemporaryDirectory() as folder:
        qonnx, qcdq = Path(folder) / "qonnx.onnx", Path(folder) / "qcdq.onnx"
        for export, path in ((export_qonnx, qonnx), (export_qcdq, qcdq)):
            file = export(calibrator.quant_model, path, input_shape=shape, dynamic_batch=True)
            print(f"{path.stem}: {file.bytes / 1e6:.3f} MB")
        plain = row("PyTorch", lambda: torch.cat([model(chunk) for chunk in images.split(_BATCH)]), None)
        row("PyTorch, one image at a time", lambda: torch.cat([model(chunk) for chunk in images.split(1)]), plain)
        row("PyTorch, summed in another order", lambda: pytorch(reordered=True), plain)
        row("QONNX file, qonnx", lambda: QonnxModel(qonnx, shape)(images), plain)
        row("QCDQ file, ONNX Runtime", lambda: QcdqModel(qcdq, shape)(images), plain)
        exact = row("float64: PyTorch (agreement with float32)", lambda: pytorch(double=True), plain)
        row("float64: PyTorch, summed in another order", lambda: pytorch(double=True, reordered=True), exact)
        row("float64: QONNX file", lambda: in_float64(qonnx, images[: options.exact]), exact)
        row("float64: QCDQ file", lambda: in_float64(qcdq, images[: options.exact]), exact)

    print("\n" + text_table(
        ["", "images", "top-1 [%]", "equal top-1 [%]", "difference, median", "largest", "s"],
        [[entry["name"], entry["images"], f"{entry['top1']:.1f}", *(
            [f"{entry['equal_top1']:.1f}", f"{entry['median_difference']:.1e}", f"{entry['largest_difference']:.1e}"]
            if "equal_top1" in entry else ["-", "-", "-"]), entry["seconds"]] for entry in rows],
    ))  # fmt: skip


if __name__ == "__main__":
    main()
