"""The oracle of one layer under the compiler: what each call attends to, from plain exact rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from live_caches import REWINDABLE, Shape
from reference import reference_attention


@dataclass
class History:
    """The K and V of one layer, and how many of the first tokens are pruned for good.

    rows: K and V as they came in, [B, H, n, D] each. held: None while the cache is dense. room: slots of a static
    cache. of_caller: whether that is a dense buffer, which stays right beside the compressed state. first: of a growing
    cache, the K and V that came in first, [B, H, 1, D] each.
    """

    shape: Shape
    rows: list[Tensor]
    held: int | None = None
    room: int | None = None
    of_caller: bool = False
    first: list[Tensor] | None = None

    @classmethod
    def empty(cls, shape: Shape, batch: int, room: int | None = None, of_caller: bool = False) -> History:
        dims = shape.key_dim, shape.value_dim
        rows = [torch.zeros(batch, shape.heads, 0, dim, dtype=shape.dtype) for dim in dims]
        return cls(shape, rows, room=room, of_caller=of_caller)

    @property
    def tokens(self) -> int:
        return self.rows[0].shape[2]

    def seen(self) -> list[Tensor]:
        """K and V as the latest token sees them."""
        if self.held is None:
            return self.rows
        return self.shape.stored(self.rows, max(self.held, self.tokens - self.shape.window), self.first)

    def attend(self, query: Tensor, new: list[Tensor], at: int, mask: Tensor | None, eager: bool, **how) -> Tensor:
        """What queries [B, Hq, L, D] get as their K and V come in at ``at``. mask: [B or 1, Hq or 1, L, at + L].

        eager: without the compiler. how: more arguments of ``reference_attention``.
        """
        count = query.shape[2]
        if mask is None:
            mask = torch.ones(count, at + count, dtype=torch.bool).tril(at)[None, None]
        if not eager and self._takes_one_by_one(count):
            return torch.cat([self._step(query, new, at, mask, i, how) for i in range(count)], dim=2)
        if not self.of_caller:
            self.rows = self.seen()
        self._write(new, at)
        self.held = None if self.of_caller or eager else self._for_good(self.tokens)
        return reference_attention(query, *self.rows, 0, 0, 1, mask, **how)

    def _takes_one_by_one(self, count: int) -> bool:
        """Whether a call with so many new tokens equals as many calls with one."""
        if self.room is None:
            return count == 1 or (self.tokens > 0 and count <= REWINDABLE)
        return count <= max(1, min(REWINDABLE, self.shape.window))

    def _for_good(self, tokens: int) -> int:
        return max(tokens - self.shape.window - REWINDABLE, 0)

    def _write(self, new: list[Tensor], at: int) -> None:
        self.rows = [torch.cat([x[:, :, :at], y], dim=2) for x, y in zip(self.rows, new, strict=True)]
        self.first = self.first or [x[:, :, :1] for x in self.rows]

    def _step(self, query: Tensor, new: list[Tensor], at: int, mask: Tensor, i: int, how: dict) -> Tensor:
        """Token ``i`` of a call."""
        start, end = at + i, at + i + 1
        held = self._for_good(start) if self.held is None else min(self.held, start)
        self._write([x[:, :, i : i + 1] for x in new], start)
        self.held = max(held, self._for_good(end))
        return reference_attention(query[:, :, i : i + 1], *self.seen(), 0, 0, 1, mask[:, :, i : i + 1, :end], **how)

    def crop(self, tokens: int) -> None:
        self.rows = [x[:, :, :tokens] for x in self.rows]

    def copied(self) -> History:
        """Of a copy of the cache, which takes no state of a dense buffer along."""
        return replace(self, held=None if self.of_caller else self.held)

    def selected(self, picks: list[int]) -> History:
        """Of a copy of these rows of the batch."""
        first = self.first and [x[picks] for x in self.first]
        return replace(self.copied(), rows=[x[picks] for x in self.rows], first=first)

    def reset(self) -> None:
        self.crop(0)
        self.held = None if self.of_caller or self.room is None else 0
        self.first = None
