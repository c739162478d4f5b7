"""What the package has to know of an architecture family; one file per family fills in one :class:`Family`."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.layers import GluMlp
from timm.layers import Mlp
from timm.layers import SwiGLU
from torch import Tensor
from torch import nn

from maskaq_brevitas.models.attention import ChannelAffine
from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.layout import AttentionLayout

__all__ = [
    "ChannelPlace",
    "Family",
    "attention_place",
    "block_places",
    "configured_input_size",
    "data_config",
    "has_affine",
    "mlp_places",
]


@dataclass(frozen=True)
class ChannelPlace:
    """A place where the channels of an activation may be shifted and scaled, because linear layers undo it behind.

    Attributes:
        norm: name of the LayerNorm whose affine part takes the change; ``None`` if nothing in front can.
        slot: name of the idle module (an ``nn.Identity``) that takes it then.
        consumers: names of all linear layers that read the activation; the first one reads all of it.
        bounded: for a slot, whether an activation function bounds the values below.
    """

    norm: str | None
    slot: str | None
    consumers: tuple[str, ...]
    bounded: bool = True


def _no_layouts(_model: nn.Module) -> tuple[AttentionLayout, ...]:
    return ()


def _model_prefix(model: nn.Module) -> int:
    return int(getattr(model, "num_prefix_tokens", 0))


def _no_passages(_model: nn.Module) -> dict[str, str]:
    return {}


def _unbounded(_module: nn.Module) -> tuple[str, ...]:
    return ()


def _ready(_model: nn.Module) -> None:
    """Nothing to do."""


def _timm_classes(model: nn.Module) -> int | None:
    return getattr(model, "num_classes", None)


def _timm_classifier(model: nn.Module) -> tuple[nn.Module, ...]:
    get_classifier = getattr(model, "get_classifier", None)
    found = get_classifier() if get_classifier is not None else None
    return tuple(found) if isinstance(found, (tuple, list)) else () if found is None else (found,)


def _timm_class_token(model: nn.Module) -> bool:
    return getattr(model, "cls_token", None) is not None


def _timm_token_place(_model: nn.Module) -> str:
    return "patch_drop"


def _timm_head(model: Any) -> Callable[[Tensor], Tensor] | None:
    if not hasattr(model, "forward_head") or not isinstance(getattr(model, "norm", None), nn.Module):
        return None
    return lambda tokens: model.forward_head(model.norm(tokens), pre_logits=True)


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture family. All functions take a model, or a module of it, float or quantized.

    Attributes:
        name: of the family.
        examples: names of models, and the arguments of ``create`` that make a small one of each, on which the family is
            checked (``maskaq models``).
        models: classes of its models.
        attention: attention type -> function that writes one such module out. Types match exactly: a subclass may
            compute something else, and its explicit form would silently differ.
        blocks: types of the transformer blocks, which map tokens to tokens of the same shape.
        places: name of a block and the block -> where its channels may be equalised.
        other_places: further types that ``places`` is asked for.
        rewrites: further module type -> function that gives a module of the same parameters and the same names of
            children, in which linear layers see ``(batch, tokens, channels)``.
        prepare: what a model needs before its parts are written out; in place.
        activated: module -> names of its linear children that read the output of an activation function, none by
            default (those of timm's Mlp are known).
        tables: types of modules that hold a table of parameters and compute nothing with it.
        layouts: how each attention module lies on the image, in the order of ``attention_modules``; empty: each sees
            all patches in the order of the grid, behind the prefix tokens.
        grid: of the patches on the image, ``(rows, columns)``; None asks ``model.patch_embed.grid_size``.
        input_size: ``(height, width)``; None asks ``model.patch_embed.img_size``, else the model's configuration.
        prefix: tokens in front of the patches inside the blocks.
        passages: name of a block -> name of the module that stands between the block before and this one.
        whole_grid: why no tokens can be left out, or a function of the model that tells; empty if they can.
        tail: why nothing can be computed from a block's output alone up to the features; empty if it can.
        create: name of an example and its arguments -> the model, with random weights.
        classes: number of classes, 0 for a model that gives features, None if the model does not tell.
        classifier: the layers that give logits (two for a distilled DeiT).
        class_token: whether the first prefix token is a class token.
        embedding: shell pattern of the names of the convolutions that make patches of an image.
        data: timm's data configuration (``mean``, ``std``, ``input_size`` ...) of the usual checkpoints, for models
            that have no ``pretrained_cfg``.
        token_place: name of the idle module behind the position embedding, where tokens can be left out.
        head: tokens behind the last block -> features that the classifier reads, ``(batch, tokens, channels)`` to
            ``(batch, features)``; None if the model does not name what follows its blocks.
        logits: reads the logits out of the model's output, if that is no tensor.
    """

    name: str
    examples: Mapping[str, Mapping[str, Any]]
    models: tuple[type[nn.Module], ...]
    attention: Mapping[type[nn.Module], Callable[[Any], ExplicitAttention]]
    blocks: tuple[type[nn.Module], ...]
    places: Callable[[str, Any], list[ChannelPlace]]
    other_places: tuple[type[nn.Module], ...] = ()
    rewrites: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = field(default_factory=dict)
    prepare: Callable[[Any], None] = _ready
    activated: Callable[[Any], tuple[str, ...]] = _unbounded
    tables: tuple[type[nn.Module], ...] = ()
    layouts: Callable[[Any], tuple[AttentionLayout, ...]] = _no_layouts
    grid: Callable[[Any], tuple[int, int]] | None = None
    input_size: Callable[[Any], tuple[int, int]] | None = None
    prefix: Callable[[Any], int] = _model_prefix
    passages: Callable[[Any], dict[str, str]] = _no_passages
    whole_grid: str | Callable[[Any], str] = ""
    tail: str = ""
    create: Callable[..., nn.Module] = timm.create_model
    classes: Callable[[Any], int | None] = _timm_classes
    classifier: Callable[[Any], tuple[nn.Module, ...]] = _timm_classifier
    class_token: Callable[[Any], bool] = _timm_class_token
    embedding: str = "patch_embed*"
    data: Mapping[str, Any] = field(default_factory=dict)
    token_place: Callable[[Any], str] = _timm_token_place
    head: Callable[[Any], Callable[[Tensor], Tensor] | None] = _timm_head
    logits: Callable[[Any], Tensor] | None = None


def block_places(name: str, block: nn.Module) -> list[ChannelPlace]:
    """The places of a block that normalises in front of attention (norm1) and of its MLP (norm2).

    The values of attention could be scaled as well (into the rows of qkv and the columns of proj). Measured on ViT-Tiny
    (32 synthetic images, crops of the photographs shipped with scikit-image): the error of every proj falls, and the
    model's KL divergence rises from 0.77 to 0.91 nats at w4a8. With a scale per channel in the quantizer instead
    (commit 8d7b2d9; 128 images, other crops) the places alone cost less (0.13 nats against 0.22 at w4a4, 0.42 against
    0.62 at w3a3), but after 120 steps of tuning the model is worse (1.06 against 0.89, 4.28 against 3.66). So they are
    not.
    """
    return [*attention_place(name, block), *mlp_places(name, block)]


def attention_place(name: str, block: nn.Module) -> list[ChannelPlace]:
    """The LayerNorm ``norm1`` in front of the linear layers of ``attn``, if it has an affine part."""
    # The first one's inputs are looked at for all of them, and queries may be of the class token alone.
    readers = ("qkv", "kv", "k", "v", "q", "k_proj", "v_proj", "q_proj", "gate")
    consumers = tuple(
        f"{name}.attn.{reader}" for reader in readers if isinstance(getattr(block.attn, reader, None), nn.Linear)
    )
    return [ChannelPlace(f"{name}.norm1", None, consumers)] if consumers and has_affine(block.norm1) else []


def mlp_places(name: str, block: nn.Module, norm: str | None = "norm2", mlp: str = "mlp") -> list[ChannelPlace]:
    """The LayerNorm ``norm`` (None: there is none) in front of an MLP of timm's, and the MLP's hidden units."""
    module = getattr(block, mlp, None)
    first = {Mlp: ("fc1",), GluMlp: ("fc1",), SwiGLU: ("fc1_g", "fc1_x")}.get(type(module))
    if first is None or not all(isinstance(getattr(module, layer), nn.Linear) for layer in first):
        return []
    places = []
    if norm is not None and has_affine(getattr(block, norm)):
        places.append(ChannelPlace(f"{name}.{norm}", None, tuple(f"{name}.{mlp}.{layer}" for layer in first)))
    inner, second = getattr(module, "norm", None), (f"{name}.{mlp}.fc2",)
    if type(inner) in (nn.Identity, ChannelAffine):
        places.append(ChannelPlace(None, f"{name}.{mlp}.norm", second, bounded=type(module) is Mlp))
    elif has_affine(inner):
        places.append(ChannelPlace(f"{name}.{mlp}.norm", None, second))
    return places


def has_affine(norm: object) -> bool:
    """Whether a normalisation has weights and biases that can take a change of channels."""
    return getattr(norm, "weight", None) is not None and getattr(norm, "bias", None) is not None


def configured_input_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images by timm's configuration of a model, in pixels, where its layers do not tell."""
    return data_config(model)["input_size"][1:]


def data_config(model: nn.Module, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """timm's data configuration of a model: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct`` ...

    It is read from the attribute ``pretrained_cfg``, which may be set on any model, also on one that is not timm's.

    Args:
        defaults: what holds where the model says nothing, in front of timm's own defaults (those of ImageNet, 224 px).
    """
    own = getattr(model, "pretrained_cfg", None) or {}
    return resolve_model_data_config(model, pretrained_cfg={**(defaults or {}), **own})
