"""The byte layout of a compressed cache tensor, and the formulas of its sizes.

A cache tensor (K or V of one layer) of logical shape ``[B, H, S, D]`` is kept in four buffers:

======  ==========================  =====  =====================================================================
buffer  shape                       dtype  holds
======  ==========================  =====  =====================================================================
values  [B, H, N, kept / 8, 32, 8]  dtype  the kept elements: the ``r``-th of token ``t``, in channel order, stands
                                           at ``[.., t // 32, r // 8, t % 32, r % 8]``
bitmap  [B, H, N, 32, D / 32]       int32  which channels were kept: bit ``8 * c + i`` of word ``w`` of token ``t``,
                                           at ``[.., t // 32, t % 32, w]``, is set where channel
                                           ``32 * w + 4 * i + c`` was (c < 4, i < 8); D / 32 is rounded up
window  [B, H, R, D]                dtype  ring of the latest tokens, exact; token ``p`` stands in slot ``p % R``
counts  [3]                         int64  on the device: tokens written; the first token that the ring holds; 1 if
                                           a row with an extreme value (see ``EXTREME``) was ever taken in, else 0
======  ==========================  =====  =====================================================================

``N`` is the number of blocks of 32 tokens. In a block a GPU thread that owns a token loads 8 elements at once, and the
threads of a warp read what lies side by side. ``word & (0x01010101 << i)`` is a group of four neighbouring channels,
one in each byte. Bits of channels past ``D`` are 0.

The ring has room for the window and for ``MAX_QUERY_TOKENS`` tokens that have left it. With ``tokens`` written and the
ring holding those from ``held`` on, the tokens below ``max(held, tokens - window)`` count as pruned and are packed in
``values`` and ``bitmap``; slots from there on hold nothing that is read, and may hold anything. A cache that is rewound
to fewer tokens, to no fewer than ``held + window`` (or to any where the ring holds all), is as it was then: the tokens
that come back to the window are still in the ring. Rewound further, it keeps as pruned what the ring no longer holds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that a cache may have to be compressed."""

BUFFERS = ("values", "bitmap", "window", "counts")
"""Names of the buffers, in the order in which the ops take them."""

BLOCK_TOKENS = 32
"""Tokens of a block."""

CHUNK = 8
"""Kept elements of a token that lie side by side: 16 bytes at 2 bytes an element. Rows keep a multiple of it."""

WORD_CHANNELS = 32
"""Channels of a word of the bitmap."""

MAX_QUERY_TOKENS = 16
"""The most tokens that one decode step takes, and that a cache can be rewound by without a loss."""

EXTREME = 2.0**97
"""NaN, infinities and magnitudes from here on are extreme: tricks of fast kernels are not exact with them."""

_CAPACITY_STEP = 64


def blocks_for(capacity: Any) -> Any:
    """Blocks that hold ``capacity`` tokens, at least one.

    ``capacity`` is an int, a SymInt or a sympy expression, which stands for a positive number.
    """
    return -(-(capacity or 1) // BLOCK_TOKENS)


def kept_elements(head_dim: int, sparsity: float) -> int:
    """Elements kept of a row of ``head_dim``: ``ceil((1 - sparsity) * head_dim)``, rounded up to a multiple of 8.

    ``sparsity`` is taken at its decimal value, so that ``0.7`` of 80 channels keeps 24 and not 32.
    """
    exact = (1 - Fraction(repr(float(sparsity)))) * head_dim
    rounded_up = -(-exact // CHUNK) * CHUNK
    return min(int(rounded_up), head_dim)


def window_of(ring: Tensor) -> int:
    """The window of a cache with this buffer ``window`` [B, H, R, D]."""
    return ring.shape[2] - MAX_QUERY_TOKENS


@dataclass(frozen=True)
class Layout:
    """How one cache tensor is compressed.

    head_dim: channels of a row, a multiple of 8.
    kept: elements kept of each pruned row, a multiple of 8, at most ``head_dim``.
    window: latest tokens that stay dense and exact, at least 1.
    """

    head_dim: int
    kept: int
    window: int

    @classmethod
    @functools.cache
    def interned(cls, head_dim: int, kept: int, window: int) -> Layout:
        """The one object for these values: guards compare layouts on every call."""
        return cls(head_dim, kept, window)

    @classmethod
    def of(cls, head_dim: int, sparsity: float, window: int) -> Layout:
        """The layout for a sparsity in [0, 1)."""
        return cls.interned(head_dim, kept_elements(head_dim, sparsity), window)

    @classmethod
    def of_buffers(cls, values: Tensor, bitmap: Tensor, window: Tensor, counts: Tensor) -> Layout:
        """The layout that these buffers have."""
        return cls.interned(window.shape[3], CHUNK * values.shape[3], window_of(window))

    def __deepcopy__(self, memo: Any) -> Layout:
        """Itself, so that Dynamo's guards, which keep a copy, compare one object with itself."""
        return self

    @property
    def words(self) -> int:
        """Words of the bitmap of a row."""
        return -(-self.head_dim // WORD_CHANNELS)

    @property
    def ring(self) -> int:
        """Slots of the ring of exact tokens."""
        return self.window + MAX_QUERY_TOKENS

    def buffers(self, batch: Any, heads: Any, capacity: Any, dtype: torch.dtype) -> list[tuple[tuple, torch.dtype]]:
        """(shape, dtype) of each buffer, in the order of ``BUFFERS``. ``capacity`` is in tokens."""
        blocks = blocks_for(capacity)
        return [
            ((batch, heads, blocks, self.kept // CHUNK, BLOCK_TOKENS, CHUNK), dtype),
            ((batch, heads, blocks, BLOCK_TOKENS, self.words), torch.int32),
            ((batch, heads, self.ring, self.head_dim), dtype),
            ((3,), torch.int64),
        ]

    def token_bytes(self, itemsize: Any) -> Any:
        """Bytes of one compressed token of one KV head."""
        return self.kept * itemsize + 4 * self.words

    def stored_bytes(self, batch: Any, heads: Any, capacity: Any, itemsize: Any) -> Any:
        """Bytes of all buffers of one cache tensor. The arguments may be numbers or sympy symbols."""
        compressed = blocks_for(capacity) * BLOCK_TOKENS * self.token_bytes(itemsize)
        return batch * heads * (compressed + self.ring * self.head_dim * itemsize) + 3 * 8


def grown_capacity(tokens: Any) -> Any:
    """Tokens that a growing cache has room for when it holds ``tokens`` (an int or a SymInt).

    An eighth more than needed, in steps of 64: growing copies each token about eight times in all, and at most an
    eighth of the memory is slack.
    """
    return ((tokens + tokens // 8) // _CAPACITY_STEP + 1) * _CAPACITY_STEP
