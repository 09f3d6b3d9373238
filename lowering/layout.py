"""The byte layout of a compressed cache tensor, and the formulas of its sizes.

A cache tensor (K or V of one layer) of logical shape ``[B, H, S, D]`` is kept in four buffers:

=========  ===================  ========  ==========================================================
buffer     shape                dtype     holds
=========  ===================  ========  ==========================================================
values     [B, H, C, kept]      dtype     the kept elements of token ``i``, in channel order, in slot ``i``
bitmap     [B, H, C, D / 8]     uint8     bit ``c % 8`` of byte ``c // 8`` is set where channel ``c`` was kept
window     [B, H, W, D]         dtype     ring of the latest tokens, exact; token ``p`` stands in slot ``p % W``
counts     [2]                  int64     tokens written, and how many of them are pruned (on the device)
=========  ===================  ========  ==========================================================

``C`` (capacity) is the number of compressed slots. Slots at or past the pruned count hold nothing that is read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that a cache may have to be compressed."""

BUFFERS = ("values", "bitmap", "window", "counts")
"""Names of the buffers, in the order in which the ops take them."""

_ROW_MULTIPLE = 8  # kept elements per row: 16-byte rows at 2 bytes an element
_CAPACITY_STEP = 64


def kept_elements(head_dim: int, sparsity: float) -> int:
    """Elements kept of a row of ``head_dim``: ``ceil((1 - sparsity) * head_dim)``, rounded up to a multiple of 8.

    ``sparsity`` is taken at its decimal value, so that ``0.7`` of 80 channels keeps 24 and not 32.
    """
    exact = (1 - Fraction(repr(float(sparsity)))) * head_dim
    rounded_up = -(-exact // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return min(int(rounded_up), head_dim)


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

    def token_bytes(self, itemsize: Any) -> Any:
        """Bytes of one compressed token of one KV head."""
        return self.kept * itemsize + self.head_dim // 8

    def stored_bytes(self, batch: Any, heads: Any, capacity: Any, itemsize: Any) -> Any:
        """Bytes of all buffers of one cache tensor. The arguments may be numbers or sympy symbols."""
        window_bytes = self.window * self.head_dim * itemsize
        return batch * heads * (capacity * self.token_bytes(itemsize) + window_bytes) + 2 * 8


def grown_capacity(tokens: Any) -> Any:
    """Compressed slots given to a growing cache that holds ``tokens`` (an int or a SymInt).

    An eighth more than needed, in steps of 64: growing copies each token about eight times in all, and at most an
    eighth of the memory is slack.
    """
    return ((tokens + tokens // 8) // _CAPACITY_STEP + 1) * _CAPACITY_STEP
