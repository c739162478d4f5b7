"""Lets a Vision Transformer see only some of its patch tokens while a context is open."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.families import family_of
from maskaq_brevitas.models.families import token_place
from maskaq_brevitas.models.families import why_whole_grid

__all__ = [
    "TokenChoice",
    "check_token_choice",
    "draw_tokens",
    "patch_count",
    "patch_tokens",
    "token_choice",
    "why_all_tokens",
]


class TokenChoice(nn.Module):
    """Passes on the tokens whose ``indices`` are set, ``(batch, kept)``; all of them while that is None."""

    indices: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.indices is None:
            return tokens
        # The function and not the method: a QuantTensor takes it (and gives its plain values).
        return torch.gather(tokens, 1, self.indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


@contextmanager
def token_choice(models: Sequence[nn.Module]) -> Iterator[TokenChoice]:
    """A context in which ``models`` drop tokens behind their position embedding, all of them the same.

    What is kept keeps its position, because positions are added before. A ViT is used to that: patch dropout is a
    common augmentation of its training.

    Args:
        models: which have an idle module at that place (timm's ViTs: ``patch_drop``).

    Yields:
        Their common :class:`TokenChoice`; set its ``indices`` before a forward pass.

    Raises:
        ModelError: if a model has no such place, or drops patches itself.
    """
    for model in models:
        check_token_choice(model)
    choice = TokenChoice()
    originals = [(model, token_place(model), model.get_submodule(token_place(model))) for model in models]
    try:
        for model, place, _ in originals:
            model.set_submodule(place, choice)
        yield choice
    finally:
        for model, place, original in originals:
            model.set_submodule(place, original)


def check_token_choice(model: nn.Module) -> None:
    """Refuse a model of which no tokens can be left out.

    Raises:
        ModelError: if it has no place for that, or its family says why it needs all.
    """
    reason = why_all_tokens(model)
    if reason:
        raise ModelError(f"No tokens of {type(model).__name__} can be left out: {reason}. Use kept_tokens=1.")


def why_all_tokens(model: nn.Module) -> str:
    """Why no tokens of a model can be left out; empty if they can."""
    reason = why_whole_grid(model)
    if reason:
        return reason
    place = token_place(model)
    found = dict(model.named_modules()).get(place)
    idle = isinstance(found, nn.Identity) or (isinstance(found, nn.Dropout) and found.p == 0)
    return "" if idle else f"it has no idle {place} module behind its position embedding"


def patch_count(model: nn.Module) -> int:
    """Patch tokens of a model at its own input size.

    Raises:
        ModelError: if the model does not tell.
    """
    family = family_of(model)
    if family is not None and family.grid is not None:
        rows, columns = family.grid(model)
        return rows * columns
    count = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if count is None:
        raise ModelError(f"{type(model).__name__} does not tell its number of patches; use kept_tokens=1.")
    return count


def draw_tokens(batch: int, patches: int, kept: int, prefix: int, generator: torch.Generator) -> Tensor:
    """Indices of all ``prefix`` tokens and of ``kept`` patch tokens drawn for each image, ``(batch, prefix + kept)``.

    Example:
        >>> draw_tokens(2, 4, 4, 1, torch.Generator().manual_seed(0)).sort().values.tolist()
        [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    """
    return patch_tokens(torch.rand(batch, patches, generator=generator).argsort(dim=1)[:, :kept], prefix)


def patch_tokens(patches: Tensor, prefix: int) -> Tensor:
    """Numbers of all ``prefix`` tokens, then of the ``patches`` numbered: ``(batch, n)`` to ``(batch, prefix + n)``."""
    return torch.cat([torch.arange(prefix).expand(len(patches), -1), prefix + patches], dim=1)
