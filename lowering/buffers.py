"""The buffers that a compressed cache tensor consists of, each by itself. ``format`` says what they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .format import Format

BLOCK_TOKENS = 32
"""Tokens of a block."""

CHUNK = 8
"""Kept elements of a row that lie side by side: 16 bytes at 2 bytes an element. Rows keep a multiple of it."""

MAX_QUERY_TOKENS = 16
"""The most tokens that one decode step takes, and that a cache can be rewound by without a loss."""


def blocks_for(capacity: Any) -> Any:
    """Blocks that hold ``capacity`` tokens, at least one.

    ``capacity`` is an int, a SymInt or a sympy expression, which stands for a positive number.
    """
    return -(-(capacity or 1) // BLOCK_TOKENS)


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


_VALUES = {"none": None, "int8": torch.int8, "int4": torch.uint8}  # dtypes of the buffer ``values``, by code


def packed_buffers(format: Format) -> list[Buffer]:
    """Those that hold packed rows."""
    chunk = CHUNK // 2 if format.code == "int4" else CHUNK
    chunks, row = format.kept // CHUNK, format.head_dim if format.by_channel else "tokens"
    side_by_side = format.order == "rows" or format.by_channel
    values = (row, chunks * chunk) if side_by_side else (chunks, row, chunk)
    buffers = [Buffer("values", _in_blocks(*values), _VALUES[format.code])]
    if format.has_bitmap:
        buffers.append(Buffer("bitmap", _in_blocks(row, format.words), torch.int32))
    if format.code != "none":
        buffers.append(Buffer("peaks", _in_blocks(row, 1)))
    if format.code == "int4":
        buffers.append(Buffer("floors", _in_blocks(row, 1), torch.uint8))
    return buffers


def _in_blocks(*dims: int | str) -> tuple[int | str, ...]:
    return ("batch", "heads", "blocks", *dims)
