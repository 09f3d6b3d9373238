"""ThinK: whole channels are kept, the same for all tokens of a head (arXiv 2407.21018). The structured baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..buffers import Buffer
from .output_aware import QUERIES
from .strategy import Strategy

if TYPE_CHECKING:
    from ..format import Format


class Think(Strategy):
    """Keeps the channels with the largest means of squares, over the tokens of the first prompt.

    Of K they are times the mean of Q squared, over the last 32 queries and the query heads of the KV head, where those
    are known. State: ``channels`` [B, H, 1, D] float32, 1 where kept, else 0. The weights are these, so a row that is
    zero in a kept channel has room for another. Before the first prompt, none is chosen and rows rank by magnitude.
    """

    wants_queries = True

    def buffers(self, format: Format) -> tuple[Buffer, ...]:
        return (Buffer("channels", ("batch", "heads", 1, format.head_dim), torch.float32),)

    def of_prompt(
        self, dense: Tensor, tokens: Tensor, format: Format, queries: Tensor | None, past: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        written = torch.arange(dense.shape[2], device=dense.device) < tokens.unsqueeze(-1)
        score = _squares(dense, written[:, None])  # sums rank as means do
        if queries is not None:
            place = torch.arange(QUERIES, device=dense.device) + (queries.shape[2] - QUERIES)
            latest = queries.index_select(2, place.clamp(min=0)).unflatten(1, (dense.shape[1], -1))
            score = score * _squares(latest, place >= 0).sum(2)
        best = score.topk(format.kept, dim=-1).indices
        channels = torch.zeros_like(score).scatter(-1, best, 1.0) * (tokens > 0).view(-1, 1, 1, 1)
        if past is not None:
            channels = torch.where(_chosen(past[0]), past[0], channels)
        return _weights(channels), [channels]

    def of_step(self, query: Tensor, position: Tensor, format: Format, state: Sequence[Tensor]) -> Tensor:
        return _weights(state[0])


def _squares(x: Tensor, counts: Tensor) -> Tensor:
    """The sums of squares [..., 1, D] over the tokens of [..., n, D] that count, boolean [..., n]."""
    return torch.where(counts.unsqueeze(-1), x, 0).float().square().sum(-2, keepdim=True)


def _chosen(channels: Tensor) -> Tensor:
    return channels.amax(-1, keepdim=True) > 0


def _weights(channels: Tensor) -> Tensor:
    return torch.where(_chosen(channels), channels, 1)
