"""Sums of what was seen, as weights."""

from __future__ import annotations

import torch
from torch import Tensor

USABLE = 2.0**-97, 2.0**97
"""Between these the largest of a row must be; else it becomes ones, and rows rank by magnitude."""


def scaled(sums: Tensor) -> Tensor:
    """Rows [..., n] of float32, none negative, times powers of two: the largest of a row is from 0.5 to 1.

    So products with them neither overflow nor get lost. Where the largest is not usable, the row becomes ones.
    """
    top = sums.amax(-1, keepdim=True)
    usable = (top > USABLE[0]) & (top < USABLE[1])
    exponent = torch.where(usable, top, 1).view(torch.int32) >> 23  # its bits, with a bias of 127
    scale = ((253 - exponent) << 23).view(torch.float32)
    return torch.where(usable, sums * scale, 1)
