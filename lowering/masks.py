"""What attention masks of any shape that broadcasts to [B, Hq, L, S] say."""

from __future__ import annotations

import torch
from torch import Tensor

MASKED = -1e4
"""What an additive mask adds at most where it leaves a token out: nothing of its exponential is left in float32."""


def decides_later(mask: Tensor | None) -> bool:
    """Whether a mask has a row for each of several queries, which then says which of the later tokens they see."""
    return mask is not None and mask.dim() > 1 and bool(mask.shape[-2] != 1)


def with_four_dims(mask: Tensor) -> Tensor:
    """``mask`` with all dimensions that it may have, [B or 1, Hq or 1, L or 1, S or 1]."""
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return mask


def admitted(mask: Tensor) -> Tensor:
    """Where a mask lets a query attend: boolean, in its shape."""
    return mask if mask.dtype == torch.bool else mask > MASKED
