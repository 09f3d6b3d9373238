"""The oracle of values that are pruned by channel: what a cache holds of each token, as tokens come in one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from reference import kept_mask, prune, quantized

TOKENS = 32
"""Of a block."""

LATEST = 32
"""Queries that count."""

REWINDABLE = 16

OFF_BY = 1e-5
"""How much attention weights may be off, relative to what they are: sums in float32, in another order."""

OFF_BY_ROUNDED_KEYS = 1e-2
"""The same where keys are decoded from levels: the op does not round these to 16 bits, and the oracle does."""


def summed_over_heads(weights: Tensor, heads: int) -> Tensor:
    """[B, Hq, L, n] -> [B, H, L, n]."""
    return torch.stack([group.sum(1) for group in weights.chunk(heads, dim=1)], dim=1)


def ranking(sums: Tensor) -> Tensor:
    """Weights by which the tokens of a block rank, from sums of attention weights [B, H, 32]; ones where all are 0."""
    _, exponent = torch.frexp(sums.float().amax(-1, keepdim=True))
    return torch.where(sums.amax(-1, keepdim=True) > 0, torch.ldexp(sums.float(), -exponent), 1.0)


def certain(channels: Tensor, kept: int, weights: Tensor, off_by: float = OFF_BY) -> Tensor:
    """Whether the same tokens of a channel [..., 32] are kept if weights are off by so much: boolean [..., 1]."""
    mask = kept_mask(channels, kept, weights)
    place = torch.arange(TOKENS - 1, -1, -1) / TOKENS  # ties go to the earlier token
    low, high = (_order((channels.abs().float() * weights * (1 + off)).to(channels.dtype)) for off in (-off_by, off_by))
    least = (low + place).masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    return least > (high + place).masked_fill(mask, -torch.inf).amax(-1, keepdim=True)


def _order(x: Tensor) -> Tensor:
    """Numbers from 0 on as whole numbers, float64, in their order."""
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).double()


@dataclass
class Blocks:
    """A cache tensor that is pruned by channel, ``kept`` of the 32 tokens of a block.

    rows: [B, H, n, D], exact; below ``held`` as they were pruned. packed: the blocks that left the window, end to end.
    seen: for each query token that counts, its weights [B, H, n] of the tokens up to itself, summed over query heads.
    off_by: how much the weights of the cache may be off, relative to these.
    """

    strategy: str
    kept: int
    code: str
    window: int
    rows: Tensor
    packed: Tensor
    held: int = 0
    seen: dict[int, Tensor] = field(default_factory=dict)
    off_by: float = OFF_BY

    @classmethod
    def of_prompt(
        cls,
        strategy: str,
        kept: int,
        code: str,
        window: int,
        x: Tensor,
        attention: Tensor | None = None,
        actual: Tensor | None = None,
    ) -> Blocks:
        """Of tokens [B, H, n, D] that come in at once. attention: [B, H, n, n], of each of them, where it is known.

        actual: as of ``write``.
        """
        blocks, tokens = cls(strategy, kept, code, window, x, x[:, :, :0]), x.shape[2]
        known = [] if attention is None else range(max(tokens - LATEST, 0), tokens)
        blocks.seen = {query: attention[:, :, query, : query + 1] for query in known}
        sums = sum(F.pad(x, (0, tokens - x.shape[-1])) for x in blocks.seen.values()) if blocks.seen else None
        for first in range(0, blocks._left(tokens), TOKENS):
            blocks._pack(first, None if sums is None else sums[..., first : first + TOKENS], actual)
        blocks._give_up(max(tokens - blocks.ring, 0))
        return blocks

    @property
    def ring(self) -> int:
        return self.window + REWINDABLE + TOKENS - 1

    def _left(self, tokens: int) -> int:
        return max(tokens - self.window, 0) // TOKENS * TOKENS

    def write(self, row: Tensor, at: int, weights: Tensor | None = None, actual: Tensor | None = None) -> Tensor:
        """One token [B, H, 1, D] at ``at``; what it sees. weights: [B, H, at + 1], with which it attends.

        actual: the cache, which says what is kept where weights are too near to each other to tell.
        """
        self.rows = torch.cat([self.rows[:, :, :at], row], dim=2)
        self.held, end = min(self.held, at), at + 1
        if self._left(at) < self.held:
            self.seen = {query: x for query, x in self.seen.items() if not self._begun <= query < self.held}
            self.held = self._begun
        self.seen = {query: x for query, x in self.seen.items() if query < at}
        if weights is not None:
            self.seen[at] = weights
        first = self._left(end) - TOKENS
        if first >= max(self._left(at), self.held):
            queries = range(max(end - LATEST, self.held), end)
            sums = [F.pad(self.seen[q], (0, TOKENS))[..., first : first + TOKENS] for q in queries if q in self.seen]
            self._pack(first, sum(sums) if sums else None, actual)
        self._give_up(max(self.held, end - self.ring))
        return self.dense(self.rows)

    @property
    def _begun(self) -> int:
        """The first token of the block in which the exact ones begin."""
        return self.held // TOKENS * TOKENS

    def _pack(self, first: int, sums: Tensor | None, actual: Tensor | None) -> None:
        """Prune the block that begins with token ``first``."""
        kept, place = self.kept, slice(first, first + TOKENS)
        channels = self.rows[:, :, place].transpose(2, 3)
        aware = self.strategy == "channel-output-aware" and sums is not None
        weights = ranking(sums).unsqueeze(2) if aware else None
        new = prune(channels, kept, weights) if self.code == "none" else quantized(channels, kept, self.code, weights)
        if aware and actual is not None:
            new = torch.where(certain(channels, kept, weights, self.off_by), new, actual[:, :, place].transpose(2, 3))
        new = new.transpose(2, 3).to(self.rows.dtype)
        self.packed = torch.cat([self.packed[:, :, :first], new], dim=2)

    def _give_up(self, held: int) -> None:
        self.held = held
        self.rows = torch.cat([self.packed[:, :, :held], self.rows[:, :, held:]], dim=2)

    def dense(self, x: Tensor, held: int | None = None) -> Tensor:
        """The cache as the last of its first tokens ``x`` [B, H, n, D] sees it. held: its own counts, not that of K."""
        tokens = x.shape[2]
        first = min(max(self.held, self._left(tokens)), tokens)
        return torch.cat([self.packed[:, :, :first], self.rows[:, :, first:tokens]], dim=2)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Blocks:
        """With ``change`` applied to each tensor, all of which have the batch first."""
        seen = {query: change(x) for query, x in self.seen.items()}
        return replace(self, rows=change(self.rows), packed=change(self.packed), seen=seen)

    def joined(self, other: Blocks, tokens: int) -> Blocks:
        """Both batches, as far as the first ``tokens``."""
        assert self.held == other.held
        left, seen = max(self.held, self._left(tokens)), {}
        for query in self.seen.keys() | other.seen.keys():
            parts = [x.seen.get(query, x.rows.new_zeros(*x.rows.shape[:2], query + 1)) for x in (self, other)]
            seen[query] = torch.cat(parts)
        rows = torch.cat([self.rows[:, :, :tokens], other.rows[:, :, :tokens]])
        packed = torch.cat([self.packed[:, :, :left], other.packed[:, :, :left]])
        return replace(self, rows=rows, packed=packed, seen=seen)
