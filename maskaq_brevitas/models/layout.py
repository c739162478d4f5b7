"""Where the tokens of an attention module lie on the image: whole image or windows, shifted, padded, coarser or finer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["AttentionLayout"]


@dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """How the queries and keys of one attention module lie on the image.

    Attributes:
        grid: ``(rows, columns)`` of the key tokens over the whole image.
        window: ``(rows, columns)`` of a window; None if every query sees all keys.
        shift: tokens by which the grid is rolled up and to the left before windows are cut; the last rows and columns
            of windows that do not fit are padding.
        prefix: tokens in front of the keys, and of the queries unless these are ``pooling``.
        class_token: whether the first query stands for the whole image.
        pooling: queries that are no tokens of the image (a class token of its own, latent vectors); 0 if queries are
            tokens.
        query_grid: ``(rows, columns)`` of the queries where they are more than the keys; None: the same tokens.
    """

    grid: tuple[int, int]
    window: tuple[int, int] | None = None
    shift: tuple[int, int] = (0, 0)
    prefix: int = 0
    class_token: bool = False
    pooling: int = 0
    query_grid: tuple[int, int] | None = None

    @property
    def windows(self) -> tuple[int, int]:
        """How many windows lie below and beside each other."""
        if self.window is None:
            return 1, 1
        return -(-self.grid[0] // self.window[0]), -(-self.grid[1] // self.window[1])

    @property
    def count(self) -> int:
        """Windows of one image."""
        return self.windows[0] * self.windows[1]

    @property
    def queries(self) -> int:
        """Queries of one window that speak for a place or for the whole image, prefix tokens apart."""
        rows, columns = self.query_grid or self.window or self.grid
        return self.pooling or rows * columns

    def describe(self) -> str:
        """In words, for tables."""
        if self.pooling:
            return "pooling"
        if self.window is None:
            return "whole image" if self.query_grid is None else "whole image (coarse keys)"
        return "shifted windows" if any(self.shift) else "windows"

    def among_patches(self, attention: Tensor) -> Tensor:
        """Attention of patches (or of the pooling queries) to patches, ``(batch * windows, heads, queries, keys)``.

        Args:
            attention: ``(batch * windows, heads, all queries, all keys)``.
        """
        return attention[..., 0 if self.pooling else self.prefix :, self.prefix :]

    def received(self, attention: Tensor, grid: tuple[int, int]) -> Tensor:
        """Head-mean attention that each patch of a common grid receives: from the class token, or on average.

        A patch has what the token receives that covers its place.

        Args:
            attention: ``(batch * windows, heads, all queries, all keys)``.
            grid: ``(rows, columns)`` of the common grid.

        Returns:
            ``(batch, patches)`` in float32; fewer patches if the model left out tokens of that very grid.
        """
        if self.class_token:
            rows = attention[:, :, 0, self.prefix :]
        else:
            among = self.among_patches(attention)
            rows = self._weighted(among) if self._is_padded else among.mean(dim=2)
        rows = rows.float().mean(dim=1)  # (batch * windows, keys)
        if self.window is None and self.grid == grid:
            return rows
        places = self._on_grid(rows).unsqueeze(1)  # (batch, 1, rows, columns)
        return F.interpolate(places, size=grid, mode="nearest").flatten(1) if self.grid != grid else places.flatten(1)

    @property
    def _is_padded(self) -> bool:
        return self.window is not None and any(side % part for side, part in zip(self.grid, self.window, strict=True))

    def _weighted(self, among: Tensor) -> Tensor:
        """Mean over the queries of each window that are no padding, ``(batch * windows, heads, keys)``."""
        # (windows, queries): 1 for a token of the image, 0 for padding
        height, width = self.window  # type: ignore[misc]
        down, across = self.windows
        padding = (0, across * width - self.grid[1], 0, down * height - self.grid[0])
        inside = F.pad(torch.ones(self.grid, device=among.device), padding)
        inside = inside.reshape(down, height, across, width).transpose(1, 2).reshape(self.count, -1)
        weights = (inside / inside.sum(dim=1, keepdim=True)).to(among.dtype)
        among = among.unflatten(0, (-1, self.count))  # (batch, windows, heads, queries, keys)
        return (among * weights[:, None, :, None]).sum(dim=-2).flatten(0, 1)

    def _on_grid(self, rows: Tensor) -> Tensor:
        """One value per key token, ``(batch * windows, keys)``, at its place on the image, ``(batch, rows, columns)``.
        """
        if self.window is None:
            return rows.reshape(-1, *self.grid)
        height, width = self.window
        down, across = self.windows
        # (batch * windows, height * width) -> (batch, down * height, across * width)
        places = rows.reshape(-1, down, across, height, width).transpose(2, 3).flatten(3).flatten(1, 2)
        places = places[:, : self.grid[0], : self.grid[1]]
        return torch.roll(places, self.shift, dims=(1, 2)) if any(self.shift) else places
