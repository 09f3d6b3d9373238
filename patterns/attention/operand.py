"""Keys and values as the ops of attention take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..graph.symbols import same_size
from ..graph.views import Axis, Read


@dataclass(frozen=True)
class Operand:
    """Keys or values as an op takes them.

    leading: the dimensions that run over batch and heads, outermost first; None for one that it lacks. sizes: what
    they are broadcast to. tokens, channels: its other dimensions.
    """

    node: Node
    leading: tuple[int | None, ...]
    sizes: tuple[Any, ...]
    tokens: int
    channels: int

    @classmethod
    def of(cls, node: Node, query: Node) -> Operand:
        """[B, H, S, D], taken as it is by an op over ``query`` [B, Hq, L, D]."""
        return cls(node, (0, 1), tuple(query.meta["val"].shape[:2]), 2, 3)


def leading_axes(read: Read, operand: Operand) -> list[Axis]:
    """What batch and heads of the operand run over, outermost first, repeated as its product broadcasts them."""
    axes = []
    for dim, size in zip(operand.leading, operand.sizes, strict=True):
        own = [] if dim is None else read.dims[dim]
        axes += own or ([] if same_size(size, 1) else [Axis(None, size)])
    return axes
