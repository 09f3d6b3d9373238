"""The buffers that a compressed cache tensor consists of: their sizes, and what they hold.

A cache tensor (K or V of one layer) of logical shape ``[B, H, S, D]`` is kept in these buffers:

======  ==========================  =====  =====================================================================
buffer  shape                       dtype  holds
======  ==========================  =====  =====================================================================
values  [B, H, N, kept / 8, 32, 8]  dtype  the kept elements: the ``r``-th of token ``t``, in channel order, stands
                                           at ``[.., t // 32, r // 8, t % 32, r % 8]``
bitmap  [B, H, N, 32, D / 32]       int32  which channels were kept: bit ``8 * c + i`` of word ``w`` of token ``t``,
                                           at ``[.., t // 32, t % 32, w]``, is set where channel
                                           ``32 * w + 4 * i + c`` was (c < 4, i < 8); D / 32 is rounded up
window  [B, H, R, D]                dtype  ring of the latest tokens, exact; token ``p`` stands in slot ``p % R``
counts  [B, 3]                      int64  on the device, for each row of the batch: tokens written; the first token
                                           that the ring holds; 1 if a row with an extreme value (see ``format``)
                                           was ever taken in, else 0
======  ==========================  =====  =====================================================================

``N`` is the number of blocks of 32 tokens. In a block a GPU thread that owns a token loads 8 elements at once, and the
threads of a warp read what lies side by side. ``word & (0x01010101 << i)`` is a group of four neighbouring channels,
one in each byte. Bits of channels past ``D`` are 0.

That is the order "blocks". In the order "rows", for CPUs, values are ``[B, H, N, 32, kept]``, those of a token side by
side, and channel ``32 * w + i`` is bit ``i`` of word ``w``: what an instruction that expands a row by a bitmap takes.

Kept elements may be stored in fewer bits, by a code (``codes.py`` says what the numbers mean). Then ``values`` holds an
int8 for each, or a byte for two of them (byte ``j`` of a row has its element ``2 j`` in the lower half and ``2 j + 1``
in the upper one), and there is a number or two for each row:

======  ==========================  =====  =====================================================================
peaks   [B, H, N, 32, 1]            dtype  the largest magnitude of the row; NaN where that is not finite
floors  [B, H, N, 32, 1]            uint8  int4 only: the level of the smallest kept magnitude of the row, up to 127
======  ==========================  =====  =====================================================================

A coded cache that keeps all channels has no bitmap.

Which elements of a row are kept is up to the strategy (``strategies``). One that needs to know more than the row has
small buffers of its own between ``window`` and ``counts``. By some, a packed row is no token but a channel of a block,
and its elements are 32 tokens (``by_channel``). The buffers then have ``D`` rows in a block where they have 32 above,
each with its kept elements side by side, and a word of which channel ``i`` is token ``i`` of the block.

The ring has room for the window and for ``MAX_QUERY_TOKENS`` tokens that have left it. With ``tokens`` written and the
ring holding those from ``held`` on, the tokens below ``max(held, tokens - window)`` count as pruned and are packed in
``values`` and ``bitmap``; slots from there on hold nothing that is read, and may hold anything. A cache that is rewound
to fewer tokens, to no fewer than ``held + window`` (or to any where the ring holds all), is as it was then: the tokens
that come back to the window are still in the ring. Rewound further, it keeps as pruned what the ring no longer holds.

By channel, blocks leave the window as a whole: ``tokens - window`` is rounded down to a multiple of 32, and the ring
has 31 slots more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .format import Format

CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that a cache may have to be compressed."""

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
