"""Output-aware within a channel: a token of V counts for what attention makes of it (Mustafar, arXiv 2505.22913)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..buffers import BLOCK_TOKENS, Buffer
from .by_channel import ByChannel, WeightsOf
from .rings import read, ring_tokens, write

if TYPE_CHECKING:
    from ..format import Format


class ChannelOutputAware(ByChannel):
    """Ranks ``|V| * a``, a: the sum over the latest 32 queries, and the query heads of the KV head, of their weights.

    State: ``attention`` [B, H, R, 32] float32, a ring like the window, of query tokens. Each query is one of the latest
    32 for one block: the next to leave the window. So its slot has its weights for the 32 tokens of that block; zeros
    where it sees none.
    """

    wants_attention = True

    def buffers(self, format: Format) -> tuple[Buffer, ...]:
        return (Buffer("attention", ("batch", "heads", format.ring, BLOCK_TOKENS), torch.float32),)

    def of_prompt(
        self,
        dense: Tensor,
        tokens: Tensor,
        format: Format,
        attention: Tensor | None,
        past: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        if attention is None:
            return None, [dense.new_zeros(*dense.shape[:2], format.ring, BLOCK_TOKENS, dtype=torch.float32)]
        query = ring_tokens(tokens, format.ring)
        token, seen = _next_to_leave(query, format)
        row = query - tokens.unsqueeze(-1) + attention.shape[2]  # of the slot's query among those that are known
        batch = torch.arange(dense.shape[0], device=dense.device).view(-1, 1, 1)
        place = [batch, None, row.clamp(min=0).unsqueeze(-1), token.clamp(min=0, max=attention.shape[3] - 1)]
        known = (seen & (row >= 0).unsqueeze(-1)).unsqueeze(-1)
        ring = torch.where(known, torch.ops.aten.index(attention, place), 0)
        return attention.sum(2), [ring.movedim(-1, 1).contiguous()]

    def observe(self, query: Tensor, weights_of: WeightsOf, format: Format, state: Sequence[Tensor]) -> None:
        token, seen = _next_to_leave(query, format)
        write(state[0], query, torch.where(seen.unsqueeze(1), weights_of(token), 0))

    def of_block(self, first: Tensor, format: Format, state: Sequence[Tensor]) -> Tensor:
        query = first + format.window + torch.arange(BLOCK_TOKENS, device=first.device)
        return read(state[0], query).sum(2)

    def forget(self, token: Tensor, where: Tensor, state: Sequence[Tensor]) -> None:
        write(state[0], token, torch.where(where[:, None, :, None], 0, read(state[0], token)))


def _next_to_leave(query: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """The tokens of the block in whose ranking a query has a part, and whether it sees them: [B, n] -> [B, n, 32]."""
    first = (query - format.window) // BLOCK_TOKENS * BLOCK_TOKENS
    token = first.unsqueeze(-1) + torch.arange(BLOCK_TOKENS, device=query.device)
    return token, (token >= 0) & (token <= query.unsqueeze(-1))
