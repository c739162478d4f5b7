"""The registry of architecture families, and what the rest of the package asks it.

Adding a family is one file with a :class:`~maskaq_brevitas.models.family.Family`, and its registration here (or a call
of :func:`register_family` from outside of the package).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from timm.layers import Mlp
from timm.models.mobilevit import MobileVitBlock
from timm.models.mobilevit import MobileVitV2Block
from timm.models.xcit import XCA
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.beit import BEIT
from maskaq_brevitas.models.cait import CAIT
from maskaq_brevitas.models.eva import EVA
from maskaq_brevitas.models.family import ChannelPlace
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import block_places
from maskaq_brevitas.models.graph_attention import is_graph_module
from maskaq_brevitas.models.layout import AttentionLayout
from maskaq_brevitas.models.pvt import PVT
from maskaq_brevitas.models.swin import SWIN
from maskaq_brevitas.models.swin_v2 import SWIN_V2
from maskaq_brevitas.models.tiny_vit import TINY_VIT
from maskaq_brevitas.models.torchvision_swin import TORCHVISION_SWIN
from maskaq_brevitas.models.torchvision_vit import TORCHVISION_VIT
from maskaq_brevitas.models.twins import TWINS
from maskaq_brevitas.models.vit import VIT

__all__ = [
    "ChannelPlace",
    "EXPLICIT_FORMS",
    "FAMILIES",
    "REFUSED",
    "answer_logits",
    "attention_layouts",
    "attention_modules",
    "block_names",
    "block_passages",
    "block_prefix",
    "channel_places",
    "class_count",
    "classifier_layers",
    "embedding_pattern",
    "explicit_form",
    "family_of",
    "features_behind",
    "has_class_token",
    "has_classes",
    "is_attention",
    "is_table",
    "known_families",
    "layers_behind_activation",
    "read_logits",
    "register_family",
    "token_place",
    "unknown_attention_modules",
    "why_whole_grid",
    "write_out",
    "written_out",
]

#: All families that are known; :func:`known_families` adds those of packages that are installed but optional.
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


#: Files of families whose classes come from an optional package, by one module of these classes. transformers is never
#: imported here: a model of it cannot exist before its module is.
_OPTIONAL = {
    "transformers.models.vit.modeling_vit": "maskaq_brevitas.models.hf_vit",
    "transformers.models.deit.modeling_deit": "maskaq_brevitas.models.hf_deit",
    "transformers.models.dinov2.modeling_dinov2": "maskaq_brevitas.models.hf_dinov2",
    "transformers.models.swin.modeling_swin": "maskaq_brevitas.models.hf_swin",
}
# Older ones build these models of other modules, under the same names in part.
_TRANSFORMERS = (5, 24)


def register_family(family: Family) -> None:
    """Make a family known; its models and attention types take precedence over those registered before."""
    FAMILIES.insert(0, family)
    EXPLICIT_FORMS.update(family.attention)


for _family in (
    TORCHVISION_SWIN, TORCHVISION_VIT, TINY_VIT, PVT, TWINS, CAIT, EVA, BEIT, SWIN_V2, SWIN, VIT
):  # fmt: skip  # the last one is looked up first
    register_family(_family)


def known_families(*, optional: bool = False) -> list[Family]:
    """:data:`FAMILIES`, with those of transformers that the process can have models of.

    Args:
        optional: import transformers, if it is installed, and take all of its families.
    """
    wanted = optional and importlib.util.find_spec("transformers") is not None
    for foreign, own in _OPTIONAL.items():
        if foreign in sys.modules or wanted:
            family = _optional_family(own)
            if family is not None and not any(known is family for known in FAMILIES):
                FAMILIES.append(family)  # behind those that were registered from outside
                EXPLICIT_FORMS.update({**family.attention, **EXPLICIT_FORMS})
    return FAMILIES


@functools.cache
def _optional_family(own: str) -> Family | None:
    """The family in one of the files of :data:`_OPTIONAL`; None if the installed transformers is too old for it."""
    return None if _transformers_version() < _TRANSFORMERS else importlib.import_module(own).FAMILY


def _transformers_version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("transformers").split(".")[:2])


def family_of(model: nn.Module) -> Family | None:
    """The family of a model by its class, else by the attention modules in it; None if neither is known."""
    for family in known_families():
        if isinstance(model, family.models):
            return family
    # PyTorch's own attention says nothing of what it is part of.
    types = {type(module) for module in model.modules()} - {nn.MultiheadAttention}
    for family in known_families():
        if types & {*family.attention, *family.blocks}:
            return family
    return None


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` is a known attention module, foreign or already written out."""
    known_families()
    return type(module) in EXPLICIT_FORMS or isinstance(module, ExplicitAttention)


def explicit_form(module: nn.Module) -> ExplicitAttention:
    """The explicit form of a known attention module; it shares the parameters. One written out stays as it is.

    Raises:
        ModelError: if the type is not registered.
    """
    if isinstance(module, ExplicitAttention):
        return module
    known_families()
    build = EXPLICIT_FORMS.get(type(module))
    if build is None:
        known = ", ".join(sorted(kind.__name__ for kind in EXPLICIT_FORMS))
        raise ModelError(f"No explicit form for attention type {type(module).__name__}; registered: {known}.")
    return build(module)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All known attention modules of a model by name, in the order of registration (input side first).

    Raises:
        ModelError: if there is none: the model is a CNN, or a transformer of an unknown family; or if the family is
            refused.
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
        known = "; ".join(family.name for family in reversed(known_families()))
        if type(model).__module__.startswith("transformers.") and _transformers_version() < _TRANSFORMERS:
            needed, found_one = (".".join(map(str, version)) for version in (_TRANSFORMERS, _transformers_version()))
            known += f"; with transformers {needed} or newer its ViT, DeiT, DINOv2 and Swin (this is {found_one})"
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
    """Replace, in place, every attention module by its explicit form, and what else a family writes in another way.

    A model whose output is no tensor gives its logits from then on.
    """
    answer_logits(model)
    _facts(model).prepare(model)
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
    for family in known_families():
        if type(module) in family.rewrites:
            return family.rewrites[type(module)](module)
    return module


def channel_places(model: nn.Module) -> list[ChannelPlace]:
    """Where activation ranges can be equalised: LayerNorms in front of linear layers, and hidden units of MLPs."""
    places = []
    for name, module in model.named_modules():
        for family in known_families():
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
    for family in known_families():
        names |= {f"{name}.{child}" for name, module in model.named_modules() for child in family.activated(module)}
    return names


#: What holds for models of no family: timm's names for things, where the model has them.
_NO_FAMILY = Family(name="", examples={}, models=(), attention={}, blocks=(), places=block_places)


def _facts(model: nn.Module) -> Family:
    return family_of(model) or _NO_FAMILY


def answer_logits(model: nn.Module) -> None:
    """Let a model whose family's output is an object (transformers) give its logits, a tensor, instead; in place.

    One without classes gives its features. What is part of a larger model (``gives_features``) is left as it is. A
    forward hook does it, which copies of the model keep: its class, its configuration and the names in it stay.
    """
    family = _facts(model)
    if family.logits is not None and isinstance(model, family.models) and not getattr(model, "gives_features", False):
        model.register_forward_hook(_AnswerLogits(family.logits))


class _AnswerLogits:
    """A forward hook; an object, so that the model can still be pickled and copied."""

    def __init__(self, logits: Callable[[Any], Tensor]):
        self.logits = logits

    def __call__(self, _model: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        # None: Brevitas' GPTQ gives it for a pass that it ended at the layer it wanted.
        return output if output is None or isinstance(output, Tensor) else self.logits(output)


def read_logits(model: nn.Module, output: Any) -> Tensor:
    """The logits in what a model of the caller, whose output is left as it is, gave."""
    logits = None if isinstance(output, Tensor) else _facts(model).logits
    return output if logits is None else logits(output)


def class_count(model: nn.Module) -> int:
    """Classes of a model; 0 if it gives features."""
    return int(_facts(model).classes(model) or 0)


def has_classes(model: nn.Module) -> bool:
    """Whether the outputs of a model are logits of classes; else they are features (timm's ``num_classes=0``)."""
    return _facts(model).classes(model) != 0


def has_class_token(model: nn.Module) -> bool:
    """Whether the first of the prefix tokens stands for the whole image."""
    return block_prefix(model) > 0 and _facts(model).class_token(model)


def classifier_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The layers of a model that give logits (two for a distilled DeiT)."""
    return _facts(model).classifier(model)


def why_whole_grid(model: nn.Module) -> str:
    """Why the family of a model says that no tokens can be left out; empty if it does not."""
    reason = _facts(model).whole_grid
    return reason if isinstance(reason, str) else reason(model)


def embedding_pattern(model: nn.Module) -> str:
    """Shell pattern of the names of the convolutions that make patches of an image."""
    return _facts(model).embedding


def token_place(model: nn.Module) -> str:
    """Name of the module behind the position embedding, where tokens can be left out if it is idle."""
    return _facts(model).token_place(model)


def is_table(module: nn.Module) -> bool:
    """Whether a module only holds a table of parameters."""
    return any(isinstance(module, family.tables) for family in known_families())


def block_prefix(model: nn.Module) -> int:
    """Tokens in front of the patch tokens inside the blocks of a model."""
    return _facts(model).prefix(model)


def block_names(model: nn.Module) -> list[str]:
    """Names of the transformer blocks, input side first; each maps tokens to tokens of the same shape.

    Raises:
        ModelError: if there is none of a known type.
    """
    known = tuple(kind for family in known_families() for kind in family.blocks)
    names = [name for name, module in model.named_modules() if type(module) in known]
    if not names and is_graph_module(model):
        raise ModelError(
            f"{type(model).__name__} is FX-traced: its transformer blocks are no modules any more, so none can be "
            "tapped, reconstructed or compiled. Tune it with DistillConfig(feature_weight=0), or quantize by swapping "
            "modules: DataFreeCalibrator(model, scheme=...)."
        )
    if not names:
        raise ModelError(f"{type(model).__name__} has no transformer blocks of a known type; expected timm's Block.")
    return names


def block_passages(model: nn.Module) -> dict[str, str]:
    """Name of a block -> name of the module between the block before and this one, where there is one."""
    return _facts(model).passages(model)


_WITHOUT_LAST = "reconstruct with feature_weight=0, distil with last_feature_weight=0"


def features_behind(model: nn.Module, block: str) -> Callable[[Tensor], Tensor]:
    """The part of a model behind one of its blocks, up to the features that its classifier reads.

    Blocks that need more than tokens have to be given it by :func:`~maskaq_brevitas.models.block_path.bound_arguments`.

    Returns:
        A function ``(batch, tokens, channels) -> (batch, features)``.

    Raises:
        ModelError: if the model has no ``norm`` and ``forward_head`` as timm's ViT, or its family says that its blocks
            do not lead to its features.
    """
    if getattr(model, "intermediates", None) is not None:
        raise ModelError(f"{type(model).__name__} gives the outputs of several of its blocks; {_WITHOUT_LAST}.")
    names = block_names(model)
    following = names[names.index(block) + 1 :]
    passages = block_passages(model) if following else {}
    behind: list[nn.Module] = []
    for name in following:
        if name in passages:
            behind.append(model.get_submodule(passages[name]))
        behind.append(model.get_submodule(name))
    family = _facts(model)
    head = family.head(model)
    if head is None:
        raise ModelError(
            f"{type(model).__name__} does not name what follows its blocks (norm, forward_head); {_WITHOUT_LAST}."
        )
    if family.tail:
        raise ModelError(
            f"{type(model).__name__}: its blocks alone do not lead to its features ({family.tail}); "
            f"{_WITHOUT_LAST}."
        )

    def features(tokens: Tensor) -> Tensor:
        for module in behind:
            tokens = module(tokens)
        return head(tokens)

    return features


def attention_layouts(model: nn.Module) -> tuple[AttentionLayout, ...]:
    """How each attention module lies on the image; empty if all see all patches behind the prefix tokens."""
    return _facts(model).layouts(model)
