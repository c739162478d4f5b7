"""What the vision models of Hugging Face transformers (5.x) have in common. Importing this imports no transformers.

Their names for things are read from the model that its class calls the base model (``vit``, ``deit``, ``dinov2``,
``swin``), which may be the model itself. Their image processors are apart from the models: mean and standard deviation
are told by ``pretrained_cfg``, see :func:`~maskaq_brevitas.models.geometry.read_geometry`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from typing import cast

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD
from timm.layers import Mlp
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.attention import additive_mask
from maskaq_brevitas.models.family import ChannelPlace
from maskaq_brevitas.models.family import has_affine
from maskaq_brevitas.models.family import mlp_places

__all__ = [
    "IMAGENET",
    "SMALL",
    "ExplicitHFAttention",
    "class_features",
    "gives_maps",
    "hf_places",
    "hf_traits",
    "timm_mlp",
    "trunk_name",
]

#: Normalisation of the usual checkpoints on the hub, where the model does not tell.
IMAGENET = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)


#: Configuration of a small model, for the examples of families.
SMALL = dict(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
    num_labels=10
)  # fmt: skip


class ExplicitHFAttention(ExplicitAttention):
    """The attention of transformers' ViT, DeiT and DINOv2, written out: ``(batch, tokens, dim)`` to the same, and None.

    The attention function that the configuration names (``sdpa``, ``eager`` ...) is not called.
    """

    def __init__(self, source: Any):
        super().__init__(source, source.num_attention_heads)
        self.scale = source.scaling
        self.q_proj, self.k_proj, self.v_proj = source.q_proj, source.k_proj, source.v_proj
        self.add_places(nn.Dropout(source.attention_dropout))
        self.o_proj = source.o_proj

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_ignored: Any
    ) -> tuple[Tensor, None]:
        return self.attended(hidden_states, additive_mask(attention_mask, False, hidden_states)), None

    def attended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of ``(batch, tokens, dim)`` to itself, projected; for ``bias`` see :meth:`attend`."""
        (q,), (k,), (v,) = (self.heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.attend(q * self.scale, k, v, bias))


def timm_mlp(source: Any) -> nn.Module:
    """An MLP of transformers as timm's ``Mlp``: the same ``fc1`` and ``fc2``, with a place to equalise the hidden
    units.
    """
    mlp = Mlp(1, device="meta")
    mlp.fc1, mlp.act, mlp.fc2 = source.fc1, source.activation_fn, source.fc2
    return mlp.train(source.training)


def hf_places(first: str, second: str) -> Callable[[str, nn.Module], list[ChannelPlace]]:
    """Where channels may be equalised in blocks whose LayerNorms have these names."""

    def places(name: str, block: Any) -> list[ChannelPlace]:
        readers = tuple(f"{name}.attention.{reader}_proj" for reader in "kvq")
        found = [ChannelPlace(f"{name}.{first}", None, readers)] if has_affine(getattr(block, first)) else []
        return [*found, *mlp_places(name, block, norm=second)]

    return places


def class_features(model: Any) -> Callable[[Tensor], Tensor] | None:
    """Tokens -> the normalised class token, ``(batch, channels)``; None for a backbone, which gives no such thing."""
    return None if gives_maps(model) else lambda tokens: model.base_model.layernorm(tokens)[:, 0]


def gives_maps(model: Any) -> bool:
    """Whether a model is a backbone (``Dinov2Backbone``, ``SwinBackbone``): feature maps of several blocks."""
    return hasattr(model, "out_features")


def trunk_name(model: Any) -> str:
    """Name of the base model in a model, with a dot behind it; empty if it is the model itself."""
    return f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""


def _sides(value: int | tuple[int, int]) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _answer(output: Any) -> Tensor:
    """The tensor in what a model gives: logits, else what it pools, else its tokens or feature maps in one row."""
    for name in ("logits", "pooler_output"):
        if getattr(output, name, None) is not None:
            return cast(Tensor, getattr(output, name))
    parts = output.feature_maps if "feature_maps" in output else (output.last_hidden_state,)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def hf_traits(
    *classifiers: type[nn.Module],
    without_classes: tuple[type[nn.Module], ...],
    prefix: int,
    data: dict[str, Any] = IMAGENET,
) -> dict[str, Any]:
    """The arguments of a ``Family`` that all have in common.

    Args:
        classifiers: classes of its models that give logits.
        without_classes: those that give features.
        prefix: tokens in front of the patches; the first one is a class token, if there is one.
        data: normalisation of the usual checkpoints.
    """

    models = (*classifiers, *without_classes)

    def classes(model: Any) -> int:
        if isinstance(model, without_classes):
            return 0
        if not isinstance(model, classifiers):
            names = " or ".join(kind.__name__ for kind in models)
            raise ModelError(
                f"{type(model).__name__} of transformers gives neither logits nor features. Expected {names}."
            )
        return int(cast(Any, model).config.num_labels)

    def grid(model: Any) -> tuple[int, int]:
        rows, columns = (
            side // step
            for side, step in zip(_sides(model.config.image_size), _sides(model.config.patch_size), strict=True)
        )
        return rows, columns

    def classifier(model: Any) -> tuple[nn.Module, ...]:
        names = ("classifier", "cls_classifier", "distillation_classifier")
        return tuple(getattr(model, name) for name in names if hasattr(model, name))

    def create(name: str, **options: Any) -> nn.Module:
        kind: Any
        (kind,) = [kind for kind in models if kind.__name__ == name.partition(":")[2]]
        return kind(kind.config_class(**options))

    return dict(
        models=models,
        create=create,
        classes=classes,
        classifier=classifier,
        class_token=lambda model: prefix > 0,
        data=data,
        embedding="*embeddings.patch_embeddings.*",
        grid=grid,
        input_size=lambda model: _sides(model.config.image_size),
        logits=_answer,
        prefix=lambda model: prefix,
        token_place=lambda model: f"{trunk_name(model)}embeddings.dropout",
    )
