"""The oracle of a live cache: plain rows, and which handles of it may still be read and continued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from channels import OFF_BY, OFF_BY_ROUNDED_KEYS, TOKENS, Blocks
from mustafar_compile import CompressedKV, StaleCacheError
from ramp import first_weights, ramp_weights
from ranked import Packed
from reference import kept_count, prune, quantized

REWINDABLE = 16
"""Tokens by which a cache can be set back without a loss."""

_REMEMBERED = 5


@dataclass(frozen=True)
class Shape:
    """What does not change while a cache lives: KV heads, query heads for each, head dims, dtype, settings."""

    heads: int
    group: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    key_sparsity: float
    value_sparsity: float
    window: int
    key_code: str = "none"
    value_code: str = "none"
    key_strategy: str = "magnitude"
    value_strategy: str = "magnitude"

    def packed(self, rows: list[Tensor], query: Tensor) -> list[Packed | Blocks]:
        """What caches have of K and V that come in at once."""
        kinds = (
            (self.key_strategy, self.key_sparsity, self.key_code, query),
            (self.value_strategy, self.value_sparsity, self.value_code, None),
        )
        packed: list[Packed | Blocks] = []
        for x, (strategy, sparsity, code, queries) in zip(rows, kinds, strict=True):
            in_channel = kept_count(TOKENS, sparsity)
            if strategy.startswith("channel") and in_channel < TOKENS:
                blocks = Blocks.of_prompt(strategy, in_channel, code, self.window, x)
                off_by = OFF_BY if self.key_code == "none" else OFF_BY_ROUNDED_KEYS
                packed.append(replace(blocks, off_by=off_by))
            else:
                kept = x.shape[3] if strategy.startswith("channel") else kept_count(x.shape[3], sparsity)
                packed.append(Packed.of_prompt(strategy, kept, code, self.window, x, queries))
        return packed

    def stored(self, rows: list[Tensor], pruned: int, first: list[Tensor] | None) -> list[Tensor]:
        """K and V [B, H, n, D] of which the first ``pruned`` tokens are what the cache has of them.

        By strategies of ``ramp``. first: the first tokens that came in.
        """
        kinds = (
            (self.key_sparsity, self.key_code, self.key_strategy),
            (self.value_sparsity, self.value_code, self.value_strategy),
        )
        past = [
            _stored(x[:, :, :pruned], *kind, None if first is None else first[i])
            for i, (x, kind) in enumerate(zip(rows, kinds, strict=True))
        ]
        return [torch.cat([old, x[:, :, pruned:]], dim=2) for old, x in zip(past, rows, strict=True)]


def _stored(x: Tensor, sparsity: float, code: str, strategy: str, first: Tensor | None) -> Tensor:
    kept, weights = kept_count(x.shape[3], sparsity), ramp_weights(x) if strategy == "ramp" else None
    if strategy == "first" and first is not None:
        weights = first_weights(first).expand_as(x)
    return prune(x, kept, weights) if code == "none" else quantized(x, kept, code, weights).to(x.dtype)


@dataclass(eq=False)
class Handle:
    """K and V as a step returned them, and the exact rows [B, H, n, D] that went in.

    newest: nothing was written since. cropped: may be continued although others went further. lost: overwritten.
    """

    key: CompressedKV
    value: CompressedKV
    rows: list[Tensor]
    newest: bool = True
    cropped: bool = False
    lost: bool = False

    @property
    def tokens(self) -> int:
        return self.rows[0].shape[2]

    @property
    def continuable(self) -> bool:
        return not self.lost and (self.newest or self.cropped)

    @property
    def tensors(self) -> list[CompressedKV]:
        return [self.key, self.value]


@dataclass
class Live:
    """A cache of one layer: its handles, the one in use last, and how many of its first rows are pruned for good.

    room: slots of a static cache, which has one handle.
    """

    shape: Shape
    handles: list[Handle] = field(repr=False)
    packed: list[Packed | Blocks]
    held: int = 0
    room: int | None = None

    @classmethod
    def filled(
        cls, shape: Shape, key: CompressedKV, value: CompressedKV, rows: list[Tensor], query: Tensor, room=None
    ) -> Live:
        """After ``rows`` came in at once. query: of the last of them."""
        live = cls(shape, [Handle(key, value, rows)], shape.packed(rows, query), room=room)
        live.held = live._pruned_for_good(live.tokens)
        return live

    @property
    def latest(self) -> Handle:
        return self.handles[-1]

    @property
    def tokens(self) -> int:
        return self.latest.tokens

    @property
    def batch(self) -> int:
        return self.latest.rows[0].shape[0]

    def _pruned_for_good(self, tokens: int) -> int:
        return max(tokens - self.shape.window - REWINDABLE, 0)

    def dense(self, rows: list[Tensor]) -> list[Tensor]:
        """The cache with these exact K and V as the latest tokens see it."""
        return [packed.dense(x, self.held) for packed, x in zip(self.packed, rows, strict=True)]

    @property
    def progress(self) -> tuple[Any, ...]:
        """Caches may be joined that have come as far as each other."""
        return self.room, self.tokens, self.held, getattr(self.packed[1], "held", None)

    def write(
        self, new: list[Tensor], query: Tensor, at: int, attention: Callable[[Tensor], Tensor], value: CompressedKV
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Tokens [B, H, L, D] of K and V at ``at``, one by one: all rows then, and what each token sees.

        attention: K as a token sees it -> its weights [B, H, n]. value: V afterwards.
        """
        seen = []
        for end in range(at + 1, at + new[0].shape[2] + 1):
            rows = [
                torch.cat([x[:, :, :at], y[:, :, : end - at]], 2) for x, y in zip(self.latest.rows, new, strict=True)
            ]
            held = min(self.held, end - 1)
            self.held = max(held, self._pruned_for_good(end))
            for packed, x in zip(self.packed, rows, strict=True):
                if isinstance(packed, Blocks):
                    keys = self.packed[0].dense(rows[0], self.held)
                    packed.write(x[:, :, -1:], end - 1, attention(keys), value.dense())
                else:
                    packed.append(x, query[:, :, end - at - 1 : end - at], held)
            seen.append(self.dense(rows))
        self.latest.cropped = False
        for handle in self.handles:
            handle.newest = False
            handle.lost = handle.lost or handle.tokens > at
        return rows, seen

    def use(self, handle: Handle) -> None:
        """Make ``handle`` the one in use."""
        self.handles = [*(x for x in self.handles if x is not handle), handle][-_REMEMBERED:]

    def crop(self, tokens: int) -> None:
        """Go on from the first ``tokens``."""
        key, value = (x[:, :, :tokens] for x in self.latest.tensors)
        newest = self.latest.newest and tokens == self.tokens
        self.use(Handle(key, value, [x[:, :, :tokens] for x in self.latest.rows], newest, cropped=True))

    def extend(self, key: CompressedKV, value: CompressedKV, rows: list[Tensor]) -> None:
        """Go on with what a step returned."""
        if self.room is not None:
            self.handles = []
        self.use(Handle(key, value, rows))

    def other(self, key: CompressedKV, value: CompressedKV, rows: list[Tensor], packed: list[Packed | Blocks]) -> Live:
        """A cache of its own with another batch and the history of this one."""
        assert isinstance(key, CompressedKV)
        return Live(self.shape, [Handle(key, value, rows)], packed, self.held, self.room)

    def reset(self) -> None:
        """All zeros: of as many tokens where the cache grows, of none where it is static."""
        if self.room is not None:
            self.held = 0
        self.packed = [packed.mapped(torch.zeros_like) for packed in self.packed]
        if self.room is not None and isinstance(self.packed[1], Blocks):
            self.packed[1].held = 0
        for handle in self.handles:
            handle.rows = [torch.zeros_like(x if self.room is None else x[:, :, :0]) for x in handle.rows]

    def check(self) -> None:
        for handle in self.handles:
            if handle.lost:
                for tensor in handle.tensors:
                    with pytest.raises(StaleCacheError):
                        tensor.dense()
                    with pytest.raises(StaleCacheError):
                        tensor.clone()
                continue
            for tensor, rows in zip(handle.tensors, self.dense(handle.rows), strict=True):
                unwritten = 0 if self.room is None else self.room - handle.tokens
                assert torch.equal(tensor.dense(), torch.nn.functional.pad(rows, (0, 0, 0, unwritten)))
