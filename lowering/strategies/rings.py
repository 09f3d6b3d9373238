"""Rings: the slot of a token is its number modulo the slots."""

from __future__ import annotations

import torch
from torch import Tensor


def ring_tokens(tokens: Tensor, slots: int) -> Tensor:
    """The token that each slot of a ring holds after ``tokens`` (int64 [B]) were put in: [B, slots]; negative: none."""
    last = (tokens - 1).unsqueeze(-1)
    return last - torch.remainder(last - torch.arange(slots, device=tokens.device), slots)
