"""Makes timm Vision Transformers traceable for Brevitas' FX flows, ``quantize`` and ``quantize_flexml``."""

from __future__ import annotations

import copy
import warnings

import torch
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch import nn

with warnings.catch_warnings():
    # Brevitas keeps its own copy of torch.fx (its pull request 1613) and announces the end of brevitas.fx at import.
    warnings.simplefilter("ignore", DeprecationWarning)
    from brevitas.fx import GraphModule
    from brevitas.fx import symbolic_trace

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.families import attention_modules
from maskaq_brevitas.models.families import explicit_form
from maskaq_brevitas.models.families import unknown_attention_modules

__all__ = ["OneArgument", "prepare_for_fx"]

_WAY_ROUND = (
    "Way round: quantize by swapping modules, which traces nothing: DataFreeCalibrator(model, scheme=...), or "
    "Brevitas' layerwise_quantize for what this package does not know."
)

# Methods that Brevitas' graph passes do not follow, and the functions that they do:
# - transpose: `recursive_input_handler` walks through the method, `are_inputs_quantized_and_aligned` does not, so the
#   residual handler inserts quantizers 9999 times and gives up after minutes (brevitas.graph.quantize_impl, 0.13.4).
# - unbind: a QuantTensor has no such method, but torch.unbind takes it.
_FUNCTIONS = {"transpose": torch.transpose, "unbind": torch.unbind}


class OneArgument(nn.Module):
    """Takes the images alone: optional arguments (``attn_mask``, ``is_causal``) stay the constants that they are.

    Traced as they stand they become placeholders, each of which gets a quantizer.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def prepare_for_fx(model: nn.Module) -> GraphModule:
    """A traced copy of a timm ViT or DeiT that Brevitas' FX flows can quantize; it computes what ``model`` computes.

    Pass it where Brevitas takes a float model: ``quantize(preprocess_for_quantize(prepare_for_fx(model)))``,
    ``quantize_flexml(preprocess_for_flexml_quantize(prepare_for_fx(model), images))``. It has one argument, ``(batch,
    channels, height, width)``; its modules have the names that they have in ``model``; attention is written out, so
    that its matmuls and its softmax are nodes of the graph; and tensor methods that Brevitas' graph passes do not
    follow are calls of the functions instead.

    Args:
        model: a float timm ``VisionTransformer`` with a class token and a fixed image size. It is not changed, and its
            weights are not shared.

    Returns:
        A Brevitas ``GraphModule`` in evaluation mode.

    Raises:
        ModelError: if the model cannot be traced, or if Brevitas could not quantize the trace. Says why and what to do
            instead; nothing is tried that takes minutes.

    Example:
        >>> import timm, torch
        >>> from brevitas.graph.quantize import preprocess_for_quantize, quantize
        >>> from maskaq_brevitas import prepare_for_fx
        >>> model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1).eval()
        >>> quant_model = quantize(preprocess_for_quantize(prepare_for_fx(model)))
        >>> type(quant_model.get_submodule("blocks.0.attn.qkv")).__name__
        'QuantLinear'
    """
    reason = _why_not(model)
    if reason is not None:
        raise ModelError(f"{type(model).__name__} cannot be prepared for FX: {reason} {_WAY_ROUND}")
    model = copy.deepcopy(model).eval()
    for name, module in attention_modules(model).items():
        model.set_submodule(name, explicit_form(module).eval())
    try:
        traced = symbolic_trace(OneArgument(model))
    except Exception as error:  # a tracer raises what the code that it cannot follow makes of its proxies
        raise ModelError(
            f"{type(model).__name__} cannot be prepared for FX: its forward pass cannot be traced "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). {_WAY_ROUND}"
        ) from error
    for node in traced.graph.nodes:
        if node.op == "call_method" and node.target in _FUNCTIONS:
            node.op, node.target = "call_function", _FUNCTIONS[node.target]
        elif node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("model.")
    return GraphModule(model, traced.graph, type(model).__name__).eval()


def _why_not(model: nn.Module) -> str | None:
    """What is known to go wrong with this model, as a sentence; None if nothing is."""
    if not isinstance(model, VisionTransformer):
        if not any(unknown_attention_modules(model)):
            attention_modules(model)  # says it better if there is no attention at all
        return (
            "expected timm's VisionTransformer (ViT, DeiT, DINOv2 ...). In the traces of others (Swin, BEiT, EVA ...) "
            "Brevitas takes arithmetic on shapes for residual additions, or its tracer stops."
        )
    others = sorted({type(block).__name__ for block in model.blocks if type(block) is not Block})
    if others:
        return f"its blocks ({', '.join(others)}) are not timm's Block; nothing is known of their traces."
    if model.dynamic_img_size or getattr(model.patch_embed, "dynamic_img_pad", False):
        return (
            "with dynamic_img_size its code branches on the size of the image, which tracing cannot follow. Make the "
            "model with dynamic_img_size=False and the img_size that it will see."
        )
    if model.global_pool != "token":
        return (
            f"it pools by global_pool={model.global_pool!r}, for which it slices the output of its last norm; where "
            "that is a QuantTensor (a tuple) slicing fails. Only global_pool='token' can be quantized."
        )
    unknown = sorted({type(module).__name__ for _, module in unknown_attention_modules(model)})
    if unknown:
        return f"its attention ({', '.join(unknown)}) is none that this package can write out."
    return None
