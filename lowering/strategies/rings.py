"""Rings: the slot of a token is its number modulo the slots."""

from __future__ import annotations

import torch
from torch import Tensor


def ring_tokens(tokens: Tensor, slots: int) -> Tensor:
    """The token that each slot of a ring holds after ``tokens`` (int64 [B]) were put in: [B, slots]; negative: none."""
    last = (tokens - 1).unsqueeze(-1)
    return last - torch.remainder(last - torch.arange(slots, device=tokens.device), slots)


def read(ring: Tensor, token: Tensor) -> Tensor:
    """What stands in a ring [B, H, R, n] for ``token`` [B, k]: [B, H, k, n]."""
    return rows_at(ring, torch.remainder(token, ring.shape[2]))


def write(ring: Tensor, token: Tensor, rows: Tensor) -> None:
    """Put rows [B, H, k, n] in the slots of ``token`` [B, k] of a ring [B, H, R, n]."""
    torch.ops.aten.index_put_(ring, _index(ring, torch.remainder(token, ring.shape[2])), rows.transpose(1, 2))


def rows_at(x: Tensor, place: Tensor) -> Tensor:
    """The rows at ``place`` [B, k] of [B, H, m, n]: [B, H, k, n]."""
    return torch.ops.aten.index(x, _index(x, place)).transpose(1, 2)


def _index(x: Tensor, place: Tensor) -> list[Tensor | None]:
    return [torch.arange(x.shape[0], device=x.device).unsqueeze(-1), None, place]
