"""Small graphs that break one rule each: the lint's verdict on them is compared with what FINN does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maskaq_brevitas.export import export_qonnx
from maskaq_brevitas.export.finn import export_finn
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.tuning.calibrate import calibrate

__all__ = ["VARIANTS", "Variant", "small_quant_vit", "write_variant"]

_SHAPE = (3, 16, 16)


@dataclass(frozen=True)
class Variant:
    """A graph: how it is made from the profile's (a change of it, or another export), and what it shows."""

    text: str
    change: Callable[[Any], None] | None = None
    generic: bool = False
    scheme: str = "finn-w4a4"
    cut: str = "full"
    model: dict[str, Any] | None = None


def small_quant_vit(scheme: str = "finn-w4a4", **model_args: Any) -> nn.Module:
    """One block of width 32, two heads, four patches; random weights, calibrated on noise; the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=10, **model_args
        ).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                nn.init.normal_(parameter, mean=float("weight" in name), std=0.2)
        nn.init.normal_(model.cls_token, std=0.5)
    quant_model, _ = swap_layers(model, scheme)
    calibrate(quant_model, [torch.randn((16, *_SHAPE), generator=torch.Generator().manual_seed(1))])
    return quant_model


def write_variant(variant: Variant, path: Path) -> None:
    """Write the file of a variant."""
    import onnx
    from qonnx.core.modelwrapper import ModelWrapper

    if variant.generic:
        export_qonnx(small_quant_vit(variant.scheme, **(variant.model or {})), path, input_shape=_SHAPE)
        return
    path.write_bytes(_profile(variant.cut))
    if variant.change is not None:
        wrapper = ModelWrapper(str(path))
        variant.change(wrapper)
        onnx.save(wrapper.model, str(path))


@lru_cache
def _profile(cut: str) -> bytes:
    """The file that the changes start from."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.onnx"
        export_finn(small_quant_vit(), path, input_shape=_SHAPE, cut=cut)  # type: ignore[arg-type]
        return path.read_bytes()


def _quantizer(wrapper: Any, behind: str) -> Any:
    """The activation quantizer right behind the first node of an operator."""
    node = next(node for node in wrapper.graph.node if node.op_type == behind)
    while node.op_type != "Quant":
        node = wrapper.find_consumers(node.output[0])[0]
    return node


def _own(wrapper: Any, node: Any, index: int, value: np.ndarray) -> None:
    """Give one input of a node a constant of its own."""
    name = f"{node.name}_changed_{index}"
    wrapper.set_initializer(name, value.astype(np.float32))
    node.input[index] = name


def _attribute(node: Any, name: str, value: Any) -> None:
    from onnx.helper import make_attribute

    kept = [entry for entry in node.attribute if entry.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, make_attribute(name, value)])


def _zero_point(wrapper: Any) -> None:
    _own(wrapper, _quantizer(wrapper, "Gelu"), 2, np.array(1.0))


def _unsigned(wrapper: Any) -> None:
    _attribute(_quantizer(wrapper, "Softmax"), "signed", 0)


def _channel_scales(wrapper: Any) -> None:
    node = _quantizer(wrapper, "Gelu")
    scale = float(wrapper.get_initializer(node.input[1]))
    channels = wrapper.get_tensor_shape(node.input[0])[-1]
    _own(wrapper, node, 1, np.linspace(0.5, 1.5, channels).reshape(1, 1, -1) * scale)


def _norm_scale(wrapper: Any) -> None:
    node = next(node for node in wrapper.graph.node if node.op_type == "LayerNormalization")
    _own(wrapper, node, 1, np.linspace(0.5, 1.5, 32))


def _fork_scale(wrapper: Any) -> None:
    _own(wrapper, _quantizer(wrapper, "LayerNormalization"), 1, np.array(0.7))


def _float_operand(wrapper: Any) -> None:
    node = _quantizer(wrapper, "Softmax")
    source = node.input[0]
    for reader in wrapper.find_consumers(node.output[0]):
        for index, name in enumerate(reader.input):
            if name == node.output[0]:
                reader.input[index] = source
    wrapper.graph.node.remove(node)


def _erf(wrapper: Any) -> None:
    """GELU as opset 17 has it: 0.5 x (1 + erf(x / sqrt 2))."""
    from onnx import helper

    node = next(node for node in wrapper.graph.node if node.op_type == "Gelu")
    given, output, shape = node.input[0], node.output[0], wrapper.get_tensor_shape(node.input[0])
    names = {}
    for label, value in (("root", 2**0.5), ("one", 1.0), ("half", 0.5)):
        names[label] = f"{node.name}_{label}"
        wrapper.set_initializer(names[label], np.array(value, dtype=np.float32))
    steps = (("Div", (given, names["root"])), ("Erf", ("0",)), ("Add", ("1", names["one"])),
             ("Mul", ("2", names["half"])), ("Mul", ("3", given)))  # fmt: skip
    place = list(wrapper.graph.node).index(node)
    for index, (operator, inputs) in enumerate(steps):
        result = output if index == len(steps) - 1 else f"{node.name}_step_{index}"
        named = [f"{node.name}_step_{name}" if name.isdigit() else name for name in inputs]
        wrapper.graph.node.insert(
            place + index, helper.make_node(operator, named, [result], name=f"{node.name}_{index}")
        )
        wrapper.set_tensor_shape(result, shape)
    wrapper.graph.node.remove(node)


VARIANTS = {
    "profile": Variant("the whole model in the profile's form"),
    "encoder": Variant("its encoder only", cut="encoder"),
    "generic": Variant(
        "the same model by the generic QONNX export: fused qkv, norms with their affine part", generic=True
    ),
    "default-scheme": Variant("scheme w4a4, exported generically", generic=True, scheme="w4a4"),
    "mean-pooling": Variant("mean over patch tokens, exported generically", generic=True, model={"global_pool": "avg"}),
    "zero-point": Variant("a zero point behind GELU", _zero_point),
    "unsigned": Variant("unsigned attention probabilities", _unsigned),
    "channel-scales": Variant("one scale per channel behind GELU", _channel_scales),
    "norm-scale": Variant("a LayerNorm with its scale in the node", _norm_scale),
    "fork-scale": Variant("a scale other than 1 on the quantizer that q, k and v share", _fork_scale),
    "float-operand": Variant("attention probabilities in float", _float_operand),
    "erf": Variant("GELU decomposed, as opset 17 has it", _erf),
}
