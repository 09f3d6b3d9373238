"""Batch and heads as two dimensions, however many the graph has for them.

Scores are [B * Hq, L, S], [B, Hq, L, S] or [B, H, G, L, S]. Flattened in order, their leading dimensions are always
those of [B, Hq]; so all that a form needs is to be split or joined there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from ..graph.calls import call_before
from ..graph.symbols import expression, same_size

aten = torch.ops.aten


@dataclass(frozen=True)
class Frame:
    """Hq, and the sizes of the leading dimensions in the graph."""

    heads: int
    sizes: tuple[Any, ...]

    @classmethod
    def of(cls, batch: Any, sizes: tuple[Any, ...]) -> Frame | None:
        """The frame of leading dimensions ``sizes`` over ``batch`` rows, None where they are in no known form."""
        split = len(sizes) == 1
        if not sizes or len(sizes) > 3 or not (split or same_size(sizes[0], batch)):
            return None
        heads = sympy.prod([expression(size) for size in sizes])
        heads = sympy.cancel(heads / expression(batch))
        return cls(int(heads), sizes) if heads.is_Integer else None

    def split(self) -> tuple[tuple[Any, ...], ...]:
        """The ops from [leading..., X, Y] to [B, Hq, X, Y]."""
        if len(self.sizes) == 1:
            return ((aten.unflatten.int, 0, [-1, self.heads]),)
        return ((aten.flatten.using_ints, 1, 2),) if len(self.sizes) == 3 else ()

    def restore(self) -> tuple[tuple[Any, ...], ...]:
        """The ops back."""
        if len(self.sizes) == 1:
            return ((aten.flatten.using_ints, 0, 1),)
        return ((aten.unflatten.int, 1, list(self.sizes[1:])),) if len(self.sizes) == 3 else ()

    def rows(self, node: Node, place: Node) -> Node:
        """``node`` [leading..., X, Y] as [B, Hq, X, Y]."""
        for target, *args in self.split():
            node = call_before(place, target, node, *args)
        return node

    def bias(self, node: Node, place: Node) -> Node:
        """``node``, which broadcasts to [leading..., L, S], so that it broadcasts to [B, Hq, L, S]."""
        rank = node.meta["val"].dim()
        if rank <= 2 or len(self.sizes) == 2:
            return node
        if len(self.sizes) == 1:
            return node if same_size(node.meta["val"].shape[0], 1) else self.rows(node, place)
        if rank == 3:
            node = call_before(place, aten.unsqueeze.default, node, 0)
        grouped = [-1] * (node.meta["val"].dim() - 4) + list(self.sizes[1:]) + [-1, -1]
        return call_before(
            place, aten.flatten.using_ints, call_before(place, aten.expand.default, node, grouped), -4, -3
        )
