"""What the package has to know of an architecture family; one file per family fills in one :class:`Family`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.data import resolve_model_data_config
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from maskaq_brevitas.models.attention import ChannelAffine, ExplicitAttention
from maskaq_brevitas.models.layout import AttentionLayout

__all__ = ["ChannelPlace", "Family", "attention_place", "block_places", "configured_input_size", "has_affine", "mlp_places"]


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


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture family. All functions take a model, or a module of it, float or quantized.

    Attributes:
        name: of the family.
        examples: names of timm models, and the arguments of ``timm.create_model`` that make a small one of each, on which the
            family is checked (``maskaq models``).
        models: classes of its models.
        attention: attention type -> function that writes one such module out. Types match exactly: a subclass may compute
            something else, and its explicit form would silently differ.
        blocks: types of the transformer blocks, which map tokens to tokens of the same shape.
        places: name of a block and the block -> where its channels may be equalised.
        other_places: further types that ``places`` is asked for.
        rewrites: further module type -> function that gives a module of the same parameters and the same names of
            children, in which linear layers see ``(batch, tokens, channels)``.
        activated: module -> names of its linear children that read the output of an activation function, none by default
            (those of timm's Mlp are known).
        tables: types of modules that hold a table of parameters and compute nothing with it.
        layouts: how each attention module lies on the image, in the order of ``attention_modules``; empty: each sees
            all patches in the order of the grid, behind the prefix tokens.
        grid: of the patches on the image, ``(rows, columns)``; None asks ``model.patch_embed.grid_size``.
        input_size: ``(height, width)``; None asks ``model.patch_embed.img_size``, else the model's configuration.
        prefix: tokens in front of the patches inside the blocks.
        passages: name of a block -> name of the module that stands between the block before and this one.
        whole_grid: why no tokens can be left out; empty if they can.
        tail: why nothing can be computed from a block's output alone up to the features; empty if it can.
    """

    name: str
    examples: Mapping[str, Mapping[str, Any]]
    models: tuple[type[nn.Module], ...]
    attention: Mapping[type[nn.Module], Callable[[Any], ExplicitAttention]]
    blocks: tuple[type[nn.Module], ...]
    places: Callable[[str, Any], list[ChannelPlace]]
    other_places: tuple[type[nn.Module], ...] = ()
    rewrites: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = field(default_factory=dict)
    activated: Callable[[nn.Module], tuple[str, ...]] = _unbounded
    tables: tuple[type[nn.Module], ...] = ()
    layouts: Callable[[Any], tuple[AttentionLayout, ...]] = _no_layouts
    grid: Callable[[Any], tuple[int, int]] | None = None
    input_size: Callable[[Any], tuple[int, int]] | None = None
    prefix: Callable[[nn.Module], int] = _model_prefix
    passages: Callable[[Any], dict[str, str]] = _no_passages
    whole_grid: str = ""
    tail: str = ""


def block_places(name: str, block: nn.Module) -> list[ChannelPlace]:
    """The places of a block that normalises in front of attention (norm1) and of its MLP (norm2).

    The values of attention could be scaled as well (into the rows of qkv and the columns of proj). Measured on ViT-Tiny
    (32 synthetic images, crops of the photographs shipped with scikit-image): the error of every proj falls, and the
    model's KL divergence rises from 0.77 to 0.91 nats at w4a8. So they are not.
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
    return resolve_model_data_config(model)["input_size"][1:]
