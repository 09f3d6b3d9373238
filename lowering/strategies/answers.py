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
    """Weights [B, H, 1 or tokens, D] of rows [B, H, .., D] by the strategy of ``format``; None: ones.

    Raises ValueError for other sizes, but for 1 in place of B and H: kernels read as much as these sizes say.
    """
    if given is None:
        return None
    batch, heads, _, channels = rows.shape
    fits = given.dim() == 4 and given.shape[3] == channels
    if not fits or any(given.shape[i] not in (1, size) for i, size in enumerate((batch, heads, tokens))):
        sizes = ", ".join(str(size) if size == 1 else f"{size} or 1" for size in (batch, heads, tokens))
        raise ValueError(
            f"the strategy {format.strategy} gave weights of {list(given.shape)}; accepted are [{sizes}, {channels}]"
        )
    return scaled(given.float()).expand(batch, heads, -1, -1)


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
