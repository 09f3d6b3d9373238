"""Which tokens a query reads exactly, and when the others are pruned."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Window:
    """The latest tokens, as decoding has them.

    size: latest tokens that are exact, at least 1. block: tokens leave in whole blocks of so many, so that up to
    ``block - 1`` more are exact. prompt: so many tokens came at once. They attend to each other exactly and are pruned
    after that; each later token is a step of its own.
    """

    size: int
    block: int = 1
    prompt: int = 0

    @classmethod
    def of(cls, given: int | Window) -> Window:
        """A number stands for the latest so many tokens."""
        return cls(given) if isinstance(given, int) else given

    def first_exact(self, queries: Tensor) -> Tensor:
        """The first token that each query reads exactly; queries are positions, int64 of any shape."""
        first = (queries + 1 - self.size).clamp(min=0) // self.block * self.block
        return first.masked_fill(queries < self.prompt, 0)

    def pruned_at(self, tokens: Tensor) -> Tensor:
        """The latest query that there is when each token is pruned; tokens are positions, int64 of any shape."""
        return ((tokens // self.block + 1) * self.block + self.size - 1).clamp(min=self.prompt - 1)
