"""A backbone inside a larger model (detection, segmentation): taken out by its features, and put back quantized.

Everything else in the package works on a network from images to one tensor ``(batch, outputs)``. A backbone gives what
the rest of its model reads: a list of feature maps, tokens, pooled features. :class:`HostedBackbone` shows it as such a
network, with its own layers under their own names, and puts a network of that kind, quantized or not, in the place of
the larger model's backbone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from timm.models._features import FeatureListNet
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.families import attention_modules
from maskaq_brevitas.models.families import class_count
from maskaq_brevitas.models.families import family_of
from maskaq_brevitas.models.families import known_families
from maskaq_brevitas.models.families import why_whole_grid
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.modes import evaluation_mode

__all__ = ["HostedBackbone", "tensors_in"]

#: Images on which the power of each feature map is measured, so that all of them count alike.
_PROBES = 2


class _GivesFeatures(nn.Module):
    """The features of a backbone as one tensor ``(batch, features)``: mixed in front of the backbone's own class.

    Attributes:
        own: the backbone's own class.
        gives_features: tells others that the output is a tensor already.
        intermediates: arguments of timm's ``forward_intermediates``, where a wrapper of timm's asks for that.
        weights: factor of each feature map, in the order in which the backbone gives them.
    """

    own: type[nn.Module]
    gives_features = True
    intermediates: Mapping[str, Any] | None = None
    weights: tuple[float, ...] | None = None
    forward_intermediates: Callable[..., Iterable[Tensor]]
    forward_features: Callable[[Tensor], Tensor]
    forward_head: Callable[[Tensor], Tensor]

    @property
    def num_classes(self) -> int:
        """What the larger model reads is no logits."""
        return 0

    def forward(self, images: Tensor) -> Tensor:
        maps = self.feature_maps(images)
        weights = self.weights or (1.0,) * len(maps)
        return torch.cat([part.flatten(1) * weight for part, weight in zip(maps, weights, strict=True)], dim=1)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """What the backbone gives, ``(batch, ...)`` each."""
        if self.intermediates is not None:
            return list(self.forward_intermediates(images, **self.intermediates))
        if isinstance(self, FeatureListNet) or not hasattr(self, "forward_features"):
            return list(tensors_in(self.own.forward(self, images)))
        # A timm model without classifier: the larger model may read its tokens, or what it pools from them.
        tokens = self.forward_features(images)
        return [tokens, self.forward_head(tokens)]


class HostedBackbone:
    """The backbone of a larger model.

    Args:
        model: the larger model; it is not changed.
        name: of the backbone in it: a model of a registered family, or timm's ``features_only`` wrapper of one.

    Attributes:
        network: the backbone as a network: images ``(batch, channels, height, width)`` to logits, if it has a
            classifier, else to all its features, ``(batch, features)``, each map of them scaled to the same power. It
            shares everything with the backbone in ``model``.

    Raises:
        ModelError: if there is no such module, or it is no backbone of a registered family.
    """

    def __init__(self, model: nn.Module, name: str):
        self.model = model
        self.name = _checked_name(model, name)
        self._shown = _shown_class(model.get_submodule(name), _trunk(model.get_submodule(name)))
        self.network = self.network_of(model)
        if issubclass(self._shown, _GivesFeatures):
            self._shown.weights = _equal_weights(self.network)

    @property
    def trunk_name(self) -> str:
        """Name, in the larger model, of the module whose layers are swapped; names of layers are relative to it."""
        return f"{self.name}.model" if isinstance(self.model.get_submodule(self.name), FeatureGetterNet) else self.name

    def network_of(self, model: nn.Module) -> nn.Module:
        """The backbone of ``model``, built like the larger model, as a network; both are one and the same thing.

        Raises:
            ModelError: if ``model`` has no backbone of that name and type.
        """
        try:
            trunk = model.get_submodule(self.trunk_name)
        except AttributeError:
            trunk = None
        own = getattr(self._shown, "own", self._shown)
        if type(trunk) is not own:
            raise ModelError(
                f"Expected {own.__name__} at {self.trunk_name!r} of {type(model).__name__}, as in the float model; got "
                f"{type(trunk).__name__ if trunk is not None else 'no such module'}."
            )
        return _seen_as(trunk, self._shown)

    def host(self, network: nn.Module) -> nn.Module:
        """A copy of the larger model, in evaluation mode, whose backbone is ``network``, itself and no copy.

        Args:
            network: as :attr:`network`, quantized or frozen. If it takes no gradients, the copy does not either.
        """
        trunk = self.model.get_submodule(self.trunk_name)
        backbone = _seen_as(network, getattr(self._shown, "own", self._shown))
        # Wherever the copy meets the float backbone, under all of its names, it takes this one.
        larger = copy.deepcopy(self.model, {id(trunk): backbone})
        if not any(parameter.requires_grad for parameter in network.parameters()):
            larger.requires_grad_(False)
        return larger.to(next(network.parameters()).device).eval()

    def layers_outside(self) -> Iterator[tuple[str, nn.Module]]:
        """Layers of the larger model that hold a weight matrix and are no part of the backbone, by name."""
        inside = set(self.model.get_submodule(self.trunk_name).modules())
        for name, module in self.model.named_modules():
            if module not in inside and any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)):
                yield name, module


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a model gives: a tensor, or lists, tuples and mappings of them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def _checked_name(model: nn.Module, name: str) -> str:
    """``name``, if a backbone of a registered family is there."""
    known = tuple(kind for family in known_families() for kind in family.models)
    places = [
        place
        for place, module in model.named_modules()
        if place and isinstance(module, (*known, FeatureListNet, FeatureGetterNet))
    ]
    # The model inside a wrapper gives what nobody reads.
    places = [place for place in places if not place.endswith(".model") or place.removesuffix(".model") not in places]
    hint = f"Backbones in it: {', '.join(places) or 'none of a registered family'}."
    try:
        found = model.get_submodule(name) if name else None
    except AttributeError:
        found = None
    if found is None:
        raise ModelError(f"backbone: {type(model).__name__} has no module {name!r}. {hint}")
    try:
        attention_modules(found)
    except ModelError as error:  # none, or none that is known, or one that is refused
        raise ModelError(f"backbone {name!r} of {type(model).__name__}: {error} {hint}") from error
    if name not in places:
        raise ModelError(
            f"backbone: {name!r} of {type(model).__name__} is {type(found).__name__}; expected a model of a registered "
            f"family, or timm's features_only wrapper of one. {hint}"
        )
    family = family_of(found)
    if family is not None and family.logits is not None and class_count(found):
        raise ModelError(
            f"backbone: {name!r} is {type(found).__name__}, a whole classifier, whose output is no tensor. Expected "
            f"what it is made of: {name}.{found.base_model_prefix}."
        )
    return name


def _trunk(backbone: nn.Module) -> nn.Module:
    """The module whose layers are swapped: the model inside timm's wrapper, or the backbone itself."""
    return backbone.model if isinstance(backbone, FeatureGetterNet) else backbone


def _shown_class(backbone: nn.Module, trunk: nn.Module) -> type[nn.Module]:
    """The class under which the trunk is a network with one output; its own if it gives logits already."""
    own = type(trunk)
    if isinstance(backbone, FeatureGetterNet):
        # Without a grid the values are the same, and tokens can be left out.
        needs_grid = family_of(trunk) is None or why_whole_grid(trunk)
        layout = backbone.output_fmt if needs_grid else "NLC"
        options = dict(indices=backbone.out_indices, norm=backbone.norm, output_fmt=layout, intermediates_only=True)
        return type(own.__name__, (_GivesFeatures, own), {"own": own, "intermediates": options})
    if class_count(trunk):
        return own
    return type(own.__name__, (_GivesFeatures, own), {"own": own})


def _seen_as(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """``module`` under another class, with which it shares every attribute: what changes one changes the other."""
    face = object.__new__(kind)
    object.__setattr__(face, "__dict__", module.__dict__)
    return face


@torch.no_grad()
def _equal_weights(network: Any) -> tuple[float, ...]:
    """A factor for each feature map that gives all of them the same power on images of noise."""
    like = next(network.parameters())
    noise = torch.randn(_PROBES, *read_geometry(network).input_size, generator=torch.Generator().manual_seed(0))
    with evaluation_mode(network):
        maps = network.feature_maps(noise.to(like))
    return tuple(float(part.flatten(1).square().sum(dim=1).mean().clamp_min(1e-12).rsqrt()) for part in maps)
