"""What a strategy answers, checked and brought to the form that pruning goes by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..format import Format

USABLE = 2.0**-97, 2.0**97
"""Between these the largest of a row must be; else it becomes ones, and rows rank by magnitude."""


def as_weights(given: Tensor | None, rows: Tensor, format: Format, tokens: int) -> Tensor | None:
    """Weights of rows [B, H, .., D] by the strategy of ``format``, for one or for each of ``tokens``; None: ones.

    Raises ValueError unless they are [B, H, 1 or tokens, D]: kernels read so much of them.
    """
    if given is None:
        return None
    batch, heads, _, channels = rows.shape
    fits = given.dim() == 4 and given.shape[2] in (1, tokens)
    if not fits or [given.shape[i] for i in (0, 1, 3)] != [batch, heads, channels]:
        count = "1" if tokens == 1 else f"1 or {tokens}"
        raise ValueError(
            f"the strategy {format.strategy} gave weights of {list(given.shape)}; accepted are [{batch}, {heads}, "
            f"{count}, {channels}]"
        )
    return scaled(given.float())


def as_state(given: Sequence[Tensor], rows: Tensor, format: Format) -> list[Tensor]:
    """The state of a cache of rows [B, H, .., D]. Raises ValueError unless it is as the strategy says (``buffers``)."""
    wanted = format.state_shapes(rows.shape[0], rows.shape[1], rows.dtype)
    shapes = [(tuple(x.shape), x.dtype) for x in given]
    if shapes != wanted:
        raise ValueError(f"the strategy {format.strategy} gave the state {shapes}; by its buffers it is {wanted}")
    return [x.contiguous() for x in given]


def scaled(sums: Tensor) -> Tensor:
    """Rows [..., n] of float32, times powers of two: the largest of a row is from 0.5 to 1. Negative ones become zero.

    So products with them neither overflow nor get lost. Where the largest is not usable, the row becomes ones.
    """
    sums = sums.clamp(min=0)
    top = sums.amax(-1, keepdim=True)
    usable = (top > USABLE[0]) & (top < USABLE[1])
    exponent = torch.where(usable, top, 1).view(torch.int32) >> 23  # its bits, with a bias of 127
    scale = ((253 - exponent) << 23).view(torch.float32)
    return torch.where(usable, sums * scale, 1)
