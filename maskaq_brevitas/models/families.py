"""The registry of attention families: which foreign attention modules are known, and how each is written out.

Adding a family is one entry here: the foreign type, and a function that gives its explicit form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from timm.layers import Mlp
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.attention import ChannelAffine, ExplicitAttention
from maskaq_brevitas.models.graph_attention import is_graph_module

__all__ = [
    "ChannelPlace",
    "EXPLICIT_FORMS",
    "attention_modules",
    "block_names",
    "channel_places",
    "explicit_form",
    "features_behind",
    "is_attention",
    "unknown_attention_modules",
]

#: Foreign attention type -> function that writes one such module out. Types match exactly: a subclass may compute
#: something else, and its explicit form would silently differ.
EXPLICIT_FORMS: dict[type[nn.Module], Callable[[nn.Module], ExplicitAttention]] = {
    TimmAttention: ExplicitAttention,
}


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` is a known attention module, foreign or already written out."""
    return type(module) in EXPLICIT_FORMS or isinstance(module, ExplicitAttention)


def explicit_form(module: nn.Module) -> ExplicitAttention:
    """The explicit form of a known attention module; it shares the parameters. One written out stays as it is.

    Raises:
        ModelError: if the type is not registered.
    """
    if isinstance(module, ExplicitAttention):
        return module
    build = EXPLICIT_FORMS.get(type(module))
    if build is None:
        known = ", ".join(sorted(kind.__name__ for kind in EXPLICIT_FORMS))
        raise ModelError(f"No explicit form for attention type {type(module).__name__}; registered: {known}.")
    return build(module)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All known attention modules of a model by name, in the order of registration (input side first).

    Raises:
        ModelError: if there is none: the model is a CNN, or a transformer of an unknown family.
    """
    found = {name: module for name, module in model.named_modules() if is_attention(module)}
    if not found and is_graph_module(model):
        raise ModelError(
            f"{type(model).__name__} is FX-traced: its attention is no module any more. Expected the model that it was "
            "traced from; a traced model goes in as quant_model=."
        )
    if not found:
        unknown = {type(module).__name__ for _, module in unknown_attention_modules(model)}
        what = f"its attention ({', '.join(sorted(unknown))}) is of a family" if unknown else "it has no attention"
        raise ModelError(
            f"{type(model).__name__} cannot be quantized: {what} that is not registered. "
            "Expected a Vision Transformer with timm's Attention blocks (ViT, DeiT, DINOv2, augreg ...)."
            if unknown
            else f"{type(model).__name__} cannot be quantized: {what}. Expected a Vision Transformer."
        )
    return found


def unknown_attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that look like attention (by type name, with parameters) but are in no registered family."""
    for name, module in model.named_modules():
        title = type(module).__name__.lower()
        looks_like_it = "attention" in title or "attn" in title
        if looks_like_it and not is_attention(module) and any(True for _ in module.parameters()):
            yield name, module


@dataclass(frozen=True)
class ChannelPlace:
    """A place where the channels of an activation may be shifted and scaled, because linear layers undo it behind.

    Attributes:
        norm: name of the LayerNorm whose affine part takes the change; ``None`` if nothing in front can.
        slot: name of the idle module (an ``nn.Identity``) that takes it then.
        consumers: names of all linear layers that read the activation.
    """

    norm: str | None
    slot: str | None
    consumers: tuple[str, ...]


def channel_places(model: nn.Module) -> list[ChannelPlace]:
    """Where a timm ViT lets activation ranges be equalised: both LayerNorms of a block, and the MLP's hidden units.

    The values of attention could be scaled as well (into the rows of qkv and the columns of proj). Measured on ViT-Tiny
    (32 synthetic images, crops of the photographs shipped with scikit-image): the error of every proj falls, and the
    model's KL divergence rises from 0.77 to 0.91 nats at w4a8. So they are not.
    """
    places = []
    for name, block in model.named_modules():
        if type(block) is not Block:
            continue
        gate = (f"{name}.attn.gate",) if getattr(block.attn, "gate", None) is not None else ()
        if is_attention(block.attn) and _has_affine(block.norm1):
            places.append(ChannelPlace(f"{name}.norm1", None, (f"{name}.attn.qkv", *gate)))
        if type(block.mlp) is not Mlp or not isinstance(block.mlp.fc1, nn.Linear):
            continue
        if _has_affine(block.norm2):
            places.append(ChannelPlace(f"{name}.norm2", None, (f"{name}.mlp.fc1",)))
        if type(getattr(block.mlp, "norm", None)) in (nn.Identity, ChannelAffine):
            places.append(ChannelPlace(None, f"{name}.mlp.norm", (f"{name}.mlp.fc2",)))
    return places


def _has_affine(norm: nn.Module) -> bool:
    return getattr(norm, "weight", None) is not None and getattr(norm, "bias", None) is not None


def block_names(model: nn.Module) -> list[str]:
    """Names of the transformer blocks, input side first; each maps tokens to tokens of the same shape.

    Raises:
        ModelError: if there is none of a known type.
    """
    names = [name for name, module in model.named_modules() if type(module) is Block]
    if not names and is_graph_module(model):
        raise ModelError(
            f"{type(model).__name__} is FX-traced: its transformer blocks are no modules any more, so none can be "
            "tapped, reconstructed or compiled. Tune it with DistillConfig(feature_weight=0), or quantize by swapping modules: "
            "DataFreeCalibrator(model, scheme=...)."
        )
    if not names:
        raise ModelError(f"{type(model).__name__} has no transformer blocks of a known type; expected timm's Block.")
    return names


def features_behind(model: nn.Module, block: str) -> Callable[[Tensor], Tensor]:
    """The part of a timm ViT behind one of its blocks, up to the features that its classifier reads.

    Returns:
        A function ``(batch, tokens, channels) -> (batch, features)``.

    Raises:
        ModelError: if the model has no ``forward_head`` of timm's ViT.
    """
    names = block_names(model)
    behind = [model.get_submodule(name) for name in names[names.index(block) + 1 :]]
    if not hasattr(model, "forward_head") or not isinstance(getattr(model, "norm", None), nn.Module):
        raise ModelError(
            f"{type(model).__name__} does not name what follows its blocks (norm, forward_head); use feature_weight=0."
        )

    def features(tokens: Tensor) -> Tensor:
        for following in behind:
            tokens = following(tokens)
        return model.forward_head(model.norm(tokens), pre_logits=True)

    return features
