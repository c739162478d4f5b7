"""The registry of architecture families, and what the rest of the package asks it.

Adding a family is one file with a :class:`~maskaq_brevitas.models.family.Family`, and its registration here (or a call of
:func:`register_family` from outside of the package).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

from timm.layers import Mlp
from timm.models.mobilevit import MobileVitBlock, MobileVitV2Block
from timm.models.xcit import XCA
from torch import Tensor, nn

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.beit import BEIT
from maskaq_brevitas.models.cait import CAIT
from maskaq_brevitas.models.eva import EVA
from maskaq_brevitas.models.family import ChannelPlace, Family
from maskaq_brevitas.models.graph_attention import is_graph_module
from maskaq_brevitas.models.layout import AttentionLayout
from maskaq_brevitas.models.pvt import PVT
from maskaq_brevitas.models.swin import SWIN
from maskaq_brevitas.models.swin_v2 import SWIN_V2
from maskaq_brevitas.models.tiny_vit import TINY_VIT
from maskaq_brevitas.models.twins import TWINS
from maskaq_brevitas.models.vit import VIT

__all__ = [
    "ChannelPlace",
    "EXPLICIT_FORMS",
    "FAMILIES",
    "REFUSED",
    "attention_layouts",
    "attention_modules",
    "block_names",
    "block_passages",
    "block_prefix",
    "channel_places",
    "explicit_form",
    "family_of",
    "features_behind",
    "has_classes",
    "is_attention",
    "is_table",
    "layers_behind_activation",
    "register_family",
    "unknown_attention_modules",
    "write_out",
    "written_out",
]

#: All families that are known.
FAMILIES: list[Family] = []

#: Foreign attention type -> function that writes one such module out; of all families together.
EXPLICIT_FORMS: dict[type[nn.Module], Callable[[Any], ExplicitAttention]] = {}

#: Modules of models that are known and refused, and why.
REFUSED: dict[type[nn.Module], str] = {
    XCA: "XCiT: its attention runs over channels, not over patches, so there are no attention maps for the objective",
    MobileVitBlock: "MobileViT: its attention sees every n-th pixel of a feature map between convolutions, which is "
    "not mapped back to the image",
    MobileVitV2Block: "MobileViTv2: its linear attention has no map of patches to patches",
}


def register_family(family: Family) -> None:
    """Make a family known; its models and attention types take precedence over those registered before."""
    FAMILIES.insert(0, family)
    EXPLICIT_FORMS.update(family.attention)


for _family in (TINY_VIT, PVT, TWINS, CAIT, EVA, BEIT, SWIN_V2, SWIN, VIT):  # the last one is looked up first
    register_family(_family)


def family_of(model: nn.Module) -> Family | None:
    """The family of a model by its class, else by the attention modules in it; None if neither is known."""
    for family in FAMILIES:
        if isinstance(model, family.models):
            return family
    types = {type(module) for module in model.modules()}
    for family in FAMILIES:
        if types & {*family.attention, *family.blocks}:
            return family
    return None


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
        ModelError: if there is none: the model is a CNN, or a transformer of an unknown family; or if the family is refused.
    """
    found = {}
    for name, module in model.named_modules():
        if type(module) in REFUSED:
            raise ModelError(f"{type(model).__name__} cannot be quantized: {REFUSED[type(module)]}.")
        if is_attention(module):
            found[name] = module
    if not found and is_graph_module(model):
        raise ModelError(
            f"{type(model).__name__} is FX-traced: its attention is no module any more. Expected the model that it was "
            "traced from; a traced model goes in as quant_model=."
        )
    if not found:
        unknown = {type(module).__name__ for _, module in unknown_attention_modules(model)}
        what = f"its attention ({', '.join(sorted(unknown))}) is of a family" if unknown else "it has no attention"
        known = "; ".join(family.name for family in reversed(FAMILIES))
        raise ModelError(
            f"{type(model).__name__} cannot be quantized: {what} that is not registered. Registered: {known}."
            if unknown
            else f"{type(model).__name__} cannot be quantized: {what}. Expected a Vision Transformer."
        )
    return found


def unknown_attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that look like attention (by type name, with parameters) but are in no registered family."""
    for name, module in model.named_modules():
        title = type(module).__name__.lower()
        looks_like_it = "attention" in title or "attn" in title
        holds_some = any(is_attention(part) for part in module.modules())  # a block named after the attention in it
        if looks_like_it and not holds_some and any(True for _ in module.parameters()):
            yield name, module


def written_out(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by name as :func:`write_out` would leave them; the model is not changed."""
    replaced: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(done) for done in replaced):
            continue
        form = _plain_form(module)
        if form is module:
            yield name, module
        else:
            replaced.append(f"{name}.")
            yield from form.named_modules(prefix=name)


def write_out(model: nn.Module) -> None:
    """Replace, in place, every attention module by its explicit form, and what else a family writes in another way."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        parent, _, child = name.rpartition(".")
        try:
            holder = model.get_submodule(parent)
        except AttributeError:  # inside of what was replaced
            continue
        present: Any = getattr(holder, child, None)
        if present is module and name:
            form = _plain_form(module)
            if form is not module:
                for alias in [alias for alias, found in model.named_modules(remove_duplicate=False) if found is module]:
                    place, _, last = alias.rpartition(".")
                    setattr(model.get_submodule(place), last, form)


def _plain_form(module: nn.Module) -> nn.Module:
    if is_attention(module):
        return explicit_form(module)
    for family in FAMILIES:
        if type(module) in family.rewrites:
            return family.rewrites[type(module)](module)
    return module


def channel_places(model: nn.Module) -> list[ChannelPlace]:
    """Where activation ranges can be equalised: LayerNorms in front of linear layers, and hidden units of MLPs."""
    places = []
    for name, module in model.named_modules():
        for family in FAMILIES:
            if type(module) in (*family.blocks, *family.other_places):
                found = family.places(name, module)
                if hasattr(module, "attn") and not is_attention(module.attn):
                    # Who reads the input of an attention that is not known?
                    found = [place for place in found if not place.consumers[0].startswith(f"{name}.attn.")]
                places += found
                break
    return places


def layers_behind_activation(model: nn.Module) -> set[str]:
    """Names of linear layers whose input comes from an activation function such as GELU."""
    names = {f"{name}.fc2" for name, module in model.named_modules() if type(module) is Mlp}
    for family in FAMILIES:
        names |= {f"{name}.{child}" for name, module in model.named_modules() for child in family.activated(module)}
    return names


def has_classes(model: nn.Module) -> bool:
    """Whether the outputs of a model are logits of classes; else they are features (timm's ``num_classes=0``)."""
    return getattr(model, "num_classes", None) != 0


def is_table(module: nn.Module) -> bool:
    """Whether a module only holds a table of parameters."""
    return any(isinstance(module, family.tables) for family in FAMILIES)


def block_prefix(model: nn.Module) -> int:
    """Tokens in front of the patch tokens inside the blocks of a model."""
    family = family_of(model)
    return int(getattr(model, "num_prefix_tokens", 0)) if family is None else family.prefix(model)


def block_names(model: nn.Module) -> list[str]:
    """Names of the transformer blocks, input side first; each maps tokens to tokens of the same shape.

    Raises:
        ModelError: if there is none of a known type.
    """
    known = tuple(kind for family in FAMILIES for kind in family.blocks)
    names = [name for name, module in model.named_modules() if type(module) in known]
    if not names and is_graph_module(model):
        raise ModelError(
            f"{type(model).__name__} is FX-traced: its transformer blocks are no modules any more, so none can be "
            "tapped, reconstructed or compiled. Tune it with DistillConfig(feature_weight=0), or quantize by swapping modules: "
            "DataFreeCalibrator(model, scheme=...)."
        )
    if not names:
        raise ModelError(f"{type(model).__name__} has no transformer blocks of a known type; expected timm's Block.")
    return names


def block_passages(model: nn.Module) -> dict[str, str]:
    """Name of a block -> name of the module between the block before and this one, where there is one."""
    family = family_of(model)
    return {} if family is None else family.passages(model)


def features_behind(model: nn.Module, block: str) -> Callable[[Tensor], Tensor]:
    """The part of a model behind one of its blocks, up to the features that its classifier reads.

    Blocks that need more than tokens have to be given it by :func:`~maskaq_brevitas.models.block_path.bound_arguments`.

    Returns:
        A function ``(batch, tokens, channels) -> (batch, features)``.

    Raises:
        ModelError: if the model has no ``norm`` and ``forward_head`` as timm's ViT, or its family says that its blocks do not
            lead to its features.
    """
    if getattr(model, "intermediates", None) is not None:
        raise ModelError(f"{type(model).__name__} gives the outputs of several of its blocks; use feature_weight=0.")
    names = block_names(model)
    passages = block_passages(model)
    behind: list[nn.Module] = []
    for name in names[names.index(block) + 1 :]:
        if name in passages:
            behind.append(model.get_submodule(passages[name]))
        behind.append(model.get_submodule(name))
    if not hasattr(model, "forward_head") or not isinstance(getattr(model, "norm", None), nn.Module):
        raise ModelError(
            f"{type(model).__name__} does not name what follows its blocks (norm, forward_head); use feature_weight=0."
        )
    family = family_of(model)
    if family is not None and family.tail:
        raise ModelError(
            f"{type(model).__name__}: its blocks alone do not lead to its features ({family.tail}); use feature_weight=0."
        )

    norm, forward_head = cast(nn.Module, model.norm), cast(Callable[..., Tensor], model.forward_head)

    def features(tokens: Tensor) -> Tensor:
        for following in behind:
            tokens = following(tokens)
        return forward_head(norm(tokens), pre_logits=True)

    return features


def attention_layouts(model: nn.Module) -> tuple[AttentionLayout, ...]:
    """How each attention module lies on the image; empty if all see all patches behind the prefix tokens."""
    family = family_of(model)
    return () if family is None else family.layouts(model)
