"""The ways of storing keys or values that a calibration chooses from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ..lowering.format import CHUNK, Format
from ..lowering.rows import expand, pack
from .budget import Stored

_DECIMALS = 10**4


def candidates(head_dim: int, codes: Sequence[str]) -> Iterator[Stored]:
    """All counts of kept elements, with each of the codes; the most bytes first."""
    for code in codes:
        for kept in range(head_dim, 0, -CHUNK):
            yield Stored(_sparsity(head_dim, kept), code)


def _sparsity(head_dim: int, kept: int) -> float:
    """A short number by which ``kept`` elements of a row are kept: rounded up, and so are counts."""
    return math.ceil(Fraction(head_dim - kept, head_dim) * _DECIMALS) / _DECIMALS


def format_of(stored: Stored, head_dim: int, window: int) -> Format:
    """The format that settings ask for by ``stored``."""
    return Format.of(head_dim, stored.sparsity, window, code=stored.code)


def read_back(x: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """What a cache of ``dtype`` gives for keys or values [..., D], in float32."""
    rows = x.to(dtype)
    return expand(pack(rows, format), format).to(dtype).float()
