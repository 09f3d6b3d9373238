"""The buffers that a compressed cache tensor consists of, each by itself. ``format`` says which there are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

BLOCK_TOKENS = 32
"""Tokens of a block."""

MAX_QUERY_TOKENS = 16
"""The most tokens that one decode step takes, and that a cache can be rewound by without a loss."""


@dataclass(frozen=True)
class Buffer:
    """One buffer of a compressed cache tensor.

    dims: its sizes, of which "batch", "heads" and "blocks" are those of the cache and "tokens" that of a block. dtype:
    None for the cache's own.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: torch.dtype | None = None

    @property
    def grows(self) -> bool:
        """Whether it gets larger with the tokens that the cache has room for."""
        return "blocks" in self.dims

    @property
    def token_dim(self) -> int:
        """Of a buffer that grows: the dimension that runs over the tokens of a block."""
        return self.dims.index("tokens")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of a buffer that grows: what it has of one token, in the order of its dimensions."""
        return tuple(size for size in self.dims if isinstance(size, int))

    def shape(self, sizes: dict[str, Any]) -> tuple[Any, ...]:
        """Its shape, given the sizes of a cache."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)

    def stored_bytes(self, sizes: dict[str, Any], itemsize: Any) -> Any:
        """Bytes that it takes. itemsize: of the cache's dtype."""
        return math.prod(self.shape(sizes)) * (itemsize if self.dtype is None else self.dtype.itemsize)
