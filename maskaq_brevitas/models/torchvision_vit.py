"""torchvision's VisionTransformer (``vit_b_16`` ...), and PyTorch's MultiheadAttention, which it is built on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.models.vision_transformer import MLPBlock

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.attention import ChannelAffine
from maskaq_brevitas.models.attention import ExplicitAttention
from maskaq_brevitas.models.attention import plain_linear
from maskaq_brevitas.models.family import ChannelPlace
from maskaq_brevitas.models.family import Family
from maskaq_brevitas.models.family import has_affine

__all__ = ["ExplicitMultiheadAttention", "IdleMLP", "TORCHVISION_VIT", "idle_mlp_places", "only_model"]


class ExplicitMultiheadAttention(ExplicitAttention):
    """PyTorch's ``MultiheadAttention``, written out: the same arguments and results.

    The projections of q, k and v are layers of their own; their weights and biases are copies of the rows of
    ``in_proj_weight`` and ``in_proj_bias``.
    """

    def __init__(self, source: Any):
        super().__init__(source)
        if source.bias_k is not None or source.bias_v is not None or source.add_zero_attn:
            raise ModelError(
                "MultiheadAttention with add_bias_kv or add_zero_attn cannot be quantized: expected keys and values of "
                "the tokens alone."
            )
        self.scale = source.head_dim**-0.5
        self.batch_first: bool = source.batch_first
        weights = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        if source.in_proj_weight is not None:
            weights = source.in_proj_weight.chunk(3)
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        trained = source.out_proj.weight.requires_grad
        self.q_proj, self.k_proj, self.v_proj = (
            plain_linear(_copied(weight, trained), None if bias is None else _copied(bias, trained))
            for weight, bias in zip(weights, biases, strict=True)
        )
        self.add_places(nn.Dropout(source.dropout))
        self.out_proj = plain_linear(source.out_proj.weight, source.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() == 2:
            raise ModelError("MultiheadAttention got tokens without a batch axis; expected (batch, tokens, channels).")
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        bias = _additive(attn_mask, query)  # is_causal only says what kind of mask attn_mask is
        if bias is not None and bias.dim() == 3:  # (batch * heads, queries, keys)
            bias = bias.unflatten(0, (-1, self.num_heads))
        padding = _additive(key_padding_mask, query)
        if padding is not None:  # (batch, keys)
            bias = padding[:, None, None] if bias is None else bias + padding[:, None, None]
        seen: list[Tensor] = []
        if need_weights:
            self.attention.open(seen)
        (q,), (k,), (v,) = (self.heads(x) for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value)))
        x = self.out_proj(self.attend(q * self.scale, k, v, bias))
        self.attention.close(seen)
        weights = None if not need_weights else seen[0].mean(dim=1) if average_attn_weights else seen[0]
        return x if self.batch_first else x.transpose(0, 1), weights


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """PyTorch's masks of attention, boolean (True = do not attend) or additive, as an addend of the logits."""
    if mask is None or mask.dtype.is_floating_point:
        return mask
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))


def _copied(rows: Tensor, trained: bool) -> nn.Parameter:
    return nn.Parameter(rows.detach().clone(), requires_grad=trained)


class IdleMLP(nn.Sequential):
    """torchvision's ``MLP``, the same layers under the same names; a dropout that does nothing becomes an identity.

    Behind the activation function, that is where channels can be equalised.
    """

    def __init__(self, source: Any):
        super().__init__()
        for name, layer in source.named_children():
            idle = isinstance(layer, nn.Dropout) and layer.p == 0
            self.add_module(name, nn.Identity().train(layer.training) if idle else layer)
        self.training = source.training


def idle_mlp_places(name: str, block: Any, norm: str) -> list[ChannelPlace]:
    """The LayerNorm in front of the ``mlp`` of a block of torchvision, and the hidden units of that."""
    places = []
    if has_affine(getattr(block, norm)):
        places.append(ChannelPlace(f"{name}.{norm}", None, (f"{name}.mlp.0",)))
    if type(block.mlp[2]) in (nn.Identity, ChannelAffine):
        places.append(ChannelPlace(None, f"{name}.mlp.2", (f"{name}.mlp.3",)))
    return places


def only_model(kind: type[nn.Module], found: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of a model that refuses models of another class, which a family is known by its parts alone."""

    def checked(model: Any) -> Any:
        if not isinstance(model, kind):
            raise ModelError(
                f"{type(model).__name__} has blocks of {kind.__name__}, but does not tell how its tokens lie on the "
                f"image. Expected a {kind.__name__}."
            )
        return found(model)

    return checked


def _places(name: str, block: Any) -> list[ChannelPlace]:
    consumers = tuple(f"{name}.self_attention.{reader}_proj" for reader in "kvq")
    first = [ChannelPlace(f"{name}.ln_1", None, consumers)] if has_affine(block.ln_1) else []
    return [*first, *idle_mlp_places(name, block, "ln_2")]


def _head(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda tokens: model.heads[:-1](model.encoder.ln(tokens)[:, 0])


def _create(name: str, **options: Any) -> nn.Module:
    return VisionTransformer(**options)


TORCHVISION_VIT = Family(
    name="torchvision ViT",
    examples={
        "torchvision:vit_b_16": dict(
            image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
        )
    },  # fmt: skip
    create=_create,
    models=(VisionTransformer,),
    attention={nn.MultiheadAttention: ExplicitMultiheadAttention},
    blocks=(EncoderBlock,),
    places=_places,
    rewrites={MLPBlock: IdleMLP},
    activated=lambda module: ("3",) if type(module) in (MLPBlock, IdleMLP) else (),
    grid=only_model(VisionTransformer, lambda model: (model.image_size // model.patch_size,) * 2),
    input_size=lambda model: (model.image_size, model.image_size),
    prefix=lambda model: 1,
    class_token=lambda model: True,
    classifier=lambda model: (model.heads.head,),
    embedding="conv_proj*",
    token_place=lambda model: "encoder.dropout",
    head=_head,
)
