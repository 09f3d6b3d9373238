"""How many: blocks for tokens, tokens that there is room for, elements kept of a row."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from .buffers import BLOCK_TOKENS, CHUNK

_CAPACITY_STEP = 64


def blocks_for(capacity: Any) -> Any:
    """Blocks that hold ``capacity`` tokens, at least one.

    ``capacity`` is an int, a SymInt or a sympy expression, which stands for a positive number.
    """
    return -(-(capacity or 1) // BLOCK_TOKENS)


def grown_capacity(tokens: Any) -> Any:
    """Tokens that a growing cache has room for when it holds ``tokens`` (an int or a SymInt).

    An eighth more than needed, in steps of 64: growing copies each token about eight times in all, and at most an
    eighth of the memory is slack.
    """
    return ((tokens + tokens // 8) // _CAPACITY_STEP + 1) * _CAPACITY_STEP


def kept_elements(head_dim: int, sparsity: float) -> int:
    """Elements kept of a row of ``head_dim``: ``ceil((1 - sparsity) * head_dim)``, rounded up to a multiple of 8.

    ``sparsity`` is taken at its decimal value, so that ``0.7`` of 80 channels keeps 24 and not 32.
    """
    exact = (1 - Fraction(repr(float(sparsity)))) * head_dim
    rounded_up = -(-exact // CHUNK) * CHUNK
    return min(int(rounded_up), head_dim)
