"""Output-aware: a channel of K counts for as much as queries make of it (Mustafar, arXiv 2505.22913, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..buffers import MAX_QUERY_TOKENS, Buffer
from .rings import ring_tokens, rows_at, write
from .strategy import Strategy

if TYPE_CHECKING:
    from ..format import Format

QUERIES = 32
"""The latest queries that count."""

SLOTS = QUERIES + MAX_QUERY_TOKENS
"""Of the ring that holds them: so many that a cache may be rewound and its earlier queries still are there."""


class OutputAware(Strategy):
    """Ranks ``|K| * w``, w: the sum over the latest 32 queries, and the query heads of the KV head, of ``|Q|``.

    State: ``queries`` [B, H, 48, D] in the dtype of the cache, a ring of those sums over heads; the one of token ``p``
    stands in slot ``p % 48``. Where w is zero throughout, as where no query was seen, rows rank by magnitude. A cache
    that was rewound by more than 16 tokens may count queries that were given up until new ones take their slots.

    Sums are in float64, in which they are exact but in rare cases, so that w does not depend on the order of sums.
    """

    roles = ("key",)
    wants_queries = True
    step_kernel = "weigh_queries_kernel"

    def buffers(self, format: Format) -> tuple[Buffer, ...]:
        return (Buffer("queries", ("batch", "heads", SLOTS, format.head_dim)),)

    def of_prompt(
        self, dense: Tensor, tokens: Tensor, format: Format, queries: Tensor | None, past: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        batch, heads, _, head_dim = dense.shape
        ring = dense.new_zeros(batch, heads, SLOTS, head_dim) if past is None else past[0]
        held = ring_tokens(tokens, SLOTS)
        if queries is not None:
            count = queries.shape[2]
            place = held - tokens.unsqueeze(-1) + count  # of the slot's token among ``queries``
            known = (held >= 0) & (place >= 0)
            latest = rows_at(queries, place.clamp(min=0))
            ring = torch.where(known[:, None, :, None], over_heads(latest, heads, ring.dtype), ring).contiguous()
        elif past is not None:
            ring = ring.clone()
        counted = (held >= 0) & (held >= tokens.unsqueeze(-1) - QUERIES)
        return _weights(ring, counted.unsqueeze(1)), [ring]

    def of_step(self, query: Tensor, position: Tensor, format: Format, state: Sequence[Tensor]) -> Tensor:
        (ring,), count = state, query.shape[2]
        new = over_heads(query, ring.shape[1], ring.dtype)
        held = ring_tokens(position + count, SLOTS)
        place = held - position.unsqueeze(-1)  # of the slot's token among the new ones
        ring = torch.where((place >= 0)[:, None, :, None], rows_at(new, place.clamp(min=0)), ring)
        ahead = torch.arange(count, device=ring.device).view(-1, 1) - place.unsqueeze(1)  # of each token, of each slot
        return _weights(ring, (held >= 0).unsqueeze(1) & (ahead >= 0) & (ahead < QUERIES))

    def of_text(self, x: Tensor, format: Format, queries: Tensor | None) -> Tensor:
        assert queries is not None, "keys have queries"
        tokens = x.shape[2]
        sums, span = over_heads(queries, x.shape[1], x.dtype).double(), 1
        while span < QUERIES:
            sums = sums + torch.nn.functional.pad(sums, (0, 0, span, 0))[:, :, :tokens]
            span *= 2
        last = (torch.arange(tokens, device=x.device) + format.window).clamp(max=tokens - 1)  # when a row leaves
        return sums.index_select(2, last).float()

    def remember(self, query: Tensor, position: Tensor, format: Format, state: Sequence[Tensor]) -> None:
        (ring,), count = state, query.shape[2]
        token = position.unsqueeze(-1) + torch.arange(count, device=ring.device)
        write(ring, token, over_heads(query, ring.shape[1], ring.dtype))


def over_heads(query: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """The sums of ``|Q|`` over the query heads of each KV head: [B, Hq, n, D] -> [B, H, n, D]."""
    return query.unflatten(1, (heads, -1)).abs().sum(2, dtype=torch.float64).float().to(dtype)


def _weights(ring: Tensor, counted: Tensor) -> Tensor:
    """The sums over slots that count: a ring [B, H, R, D], boolean [B, L, R] -> [B, H, L, D]."""
    summed = torch.where(counted[:, None, :, :, None], ring.unsqueeze(2), 0).sum(3, dtype=torch.float64)
    return summed.float()
