"""Which patches both networks still see while images are synthesised: fewer as the run goes on, the informative ones
of an image, or in views any.

Sparse model inversion (Hu et al., ICML 2024): what an image is about settles early in a few patches, and the others
cost as much and are pushed towards noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.models.token_choice import draw_tokens
from maskaq_brevitas.models.token_choice import patch_tokens

__all__ = ["DrawnTokens", "KeptTokens"]

# Shares of the run behind which patches are dropped, each time by the same ratio.
_CUTS = (0.1, 0.2, 0.3, 0.4)


class KeptTokens:
    """The patches of each image that are kept, by their place on the image itself.

    Args:
        geometry: of the model.
        batch: images.
        share: of the patches that is kept in the end, in (0, 1]; at least one.

    Attributes:
        places: numbers of the kept patches on the image, ``(batch, kept)``, on the CPU.
    """

    def __init__(self, geometry: Geometry, batch: int, share: float):
        self.geometry = geometry
        self.share = share
        self.cuts = 0
        self.places = torch.arange(geometry.patches).expand(batch, -1)

    def draw(self, generator: torch.Generator) -> None:
        """Called before each iteration; there is nothing to draw here."""

    def is_due(self, progress: float) -> bool:
        """Whether patches have to be dropped before the iteration at ``progress`` (0 at the first one, 1 at the last).
        """
        return self.share < 1 and sum(progress >= cut for cut in _CUTS) > self.cuts

    def cut(self, received: Tensor, progress: float) -> None:
        """Drop the patches that receive least attention.

        Args:
            received: attention that each kept patch receives, ``(batch, kept)``, in the order of :attr:`places`.
            progress: see :meth:`is_due`.
        """
        count = self._next_count(progress)
        best = received.cpu().topk(min(count, received.shape[1]), dim=1).indices
        self.places = self.places.gather(1, best)

    def tokens(self, down: int, right: int, flipped: bool) -> Tensor:
        """Token numbers of the kept patches and of all prefix tokens in images that are rolled, then perhaps mirrored.

        An offset of half a patch or more moves a place on by one patch, around the border where need be.

        Args:
            down, right: offset of the roll, in pixels.
            flipped: whether the rolled images are mirrored.

        Returns:
            ``(batch, prefix + kept)``; behind the prefix tokens in the order of :attr:`places`.
        """
        rows, columns = self.geometry.grid
        _, height, width = self.geometry.input_size
        row = (self.places // columns + round(down * rows / height)) % rows
        column = (self.places % columns + round(right * columns / width)) % columns
        if flipped:
            column = columns - 1 - column
        return patch_tokens(row * columns + column, self.geometry.prefix_tokens)

    def _next_count(self, progress: float) -> int:
        """Note the cut that is due, and tell how many patches it leaves."""
        self.cuts = sum(progress >= cut for cut in _CUTS)
        return max(1, round(self.geometry.patches * self.share ** (self.cuts / len(_CUTS))))


class DrawnTokens(KeptTokens):
    """As many patches as :class:`KeptTokens` keeps, but drawn anew for each iteration: for views, in which the same
    place shows another part of the image each time. Which ones attention falls on does not matter, and what is drawn
    are patches of the view.
    """

    def __init__(self, geometry: Geometry, batch: int, share: float):
        super().__init__(geometry, batch, share)
        self.count = geometry.patches

    def draw(self, generator: torch.Generator) -> None:
        """Draw the patches of the next iteration."""
        if self.count < self.geometry.patches:
            prefix = self.geometry.prefix_tokens
            drawn = draw_tokens(len(self.places), self.geometry.patches, self.count, prefix, generator)
            self.places = drawn[:, prefix:] - prefix

    def cut(self, received: Tensor, progress: float) -> None:
        self.count = self._next_count(progress)

    def tokens(self, down: int, right: int, flipped: bool) -> Tensor:
        return patch_tokens(self.places, self.geometry.prefix_tokens)
