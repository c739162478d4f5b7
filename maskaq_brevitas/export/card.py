"""What a QONNX file costs and which data types its tensors have, by qonnx' own analysis."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskaq_brevitas.export.execute import load_for_batch
from maskaq_brevitas.export.process import quiet
from maskaq_brevitas.export.process import require
from maskaq_brevitas.export.qonnx import QUANT_OPS
from maskaq_brevitas.export.scopes import module_scopes
from maskaq_brevitas.files import whole_file

__all__ = ["ModelCard", "card_path", "model_card", "write_card"]


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Cost of one image, by ``qonnx.util.inference_cost`` without a discount for zero weights, and data types.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products.
        bops: bit operations: MACs times both operands' widths.
        macs_by_type: MACs by ``"activation x weight"`` data type, for example ``"SCALEDINT<8> x SCALEDINT<4>"``.
        weights, weight_bits: number of weights, and the bits that they need.
        activations, activation_bits: number of values that convolutions and matrix products give, and their bits as
            accumulated (qonnx counts 32 for a product of integers).
        uncounted: operators that qonnx counts as free.
        tensors: data type of every tensor between nodes, by name as in the file; ``SCALEDINT<4>`` is a 4-bit integer
            with a float scale.
        quantizers: data type that each quantizer gives, by the name of its module in PyTorch.
    """

    macs: int
    bops: int
    macs_by_type: dict[str, int]
    weights: int
    weight_bits: int
    activations: int
    activation_bits: int
    uncounted: tuple[str, ...]
    tensors: dict[str, str]
    quantizers: dict[str, str]


def model_card(path: str | os.PathLike[str]) -> ModelCard:
    """Analyse a QONNX file for one image; a file with a fixed batch is counted for that batch.

    Raises:
        MissingExtraError: onnx or qonnx is not installed.
        ExportError: the file is not there or is no ONNX file.
    """
    require("onnx", "qonnx")
    from qonnx.transformation.fold_constants import FoldConstantsFiltered
    from qonnx.transformation.general import GiveUniqueParameterTensors
    from qonnx.transformation.general import RemoveUnusedTensors
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.util.inference_cost import inference_cost

    types_of = InferDataTypes(allow_scaledint_dtypes=True)
    with quiet():
        graph, _ = load_for_batch(path, None, 1)
        typed = graph.transform(InferShapes()).transform(GiveUniqueParameterTensors()).transform(types_of)
        # What inference_cost would do itself, one constant at a time with all shapes inferred again after each:
        # minutes.
        folded = (
            typed.transform(FoldConstantsFiltered(lambda *_: True)).transform(RemoveUnusedTensors()).transform(types_of)
        )
        cost: dict[str, Any] = inference_cost(folded, preprocess=False, discount_sparsity=False)["total_cost"]
    outputs = [(node, name) for node in typed.graph.node for name in node.output]
    types = {name: str(typed.get_tensor_datatype(name).name) for _, name in outputs}
    pairs = {
        key.removeprefix("op_mac_").replace("_", " x "): int(count)
        for key, count in cost.items()
        if key.startswith("op_mac_")
    }
    named = {
        _module(node): types[name] for node, name in outputs if node.op_type in QUANT_OPS and _module(node)
    }  # fmt: skip
    return ModelCard(
        macs=int(cost["total_macs"]),
        bops=int(cost["total_bops"]),
        macs_by_type=pairs,
        weights=int(cost["total_mem_w_elems"]),
        weight_bits=int(cost["total_mem_w_bits"]),
        activations=int(cost["total_mem_o_elems"]),
        activation_bits=int(cost["total_mem_o_bits"]),
        uncounted=tuple(sorted(_names(cost["unsupported"]))),
        tensors=types,
        quantizers=named,
    )


def card_path(path: str | os.PathLike[str]) -> Path:
    """Where the card of a QONNX file lies: beside it, as ``NAME.card.json``."""
    return Path(path).with_suffix(".card.json")


def write_card(card: ModelCard, path: str | os.PathLike[str]) -> Path:
    """Write the card of the QONNX file at ``path`` as JSON beside it; the file appears only when whole. Gives its path.
    """
    target = card_path(path)
    with whole_file(target) as temporary:
        temporary.write_text(json.dumps(vars(card), indent=2) + "\n", encoding="utf-8")
    return target


def _names(unsupported: str) -> list[str]:
    # qonnx gives the set as text: "{'Softmax', 'Gelu'}", or "set()".
    return [name for name in unsupported.strip("{}").replace("'", "").split(", ") if name != "set()"]


def _module(node: Any) -> str:
    """Module of the quantizer that a node came from, without the parts that every Brevitas layer has."""
    return next(
        (scope.removesuffix(".act_quant") for scope in reversed(module_scopes(node)) if scope.endswith("_quant")), ""
    )
