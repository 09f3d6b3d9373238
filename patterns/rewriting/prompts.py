"""Attention that stays dense, as that of a prompt: where its mask is a band, it is not made.

It would have the square of the prompt's length.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ..attention.attention import Attention
from ..attention.band import Band, Edge, read_band
from ..attention.fused import read_sdpa
from ..attention.operand import Operand
from ..cache.conditions import sees_groups
from ..graph.nodes import located
from ..graph.normalise import Functional
from ..graph.symbols import same_size
from ..graph.views import is_move, read_through
from .emit import Emitter

aten = torch.ops.aten
ops = torch.ops.mustafar


class Prompts:
    """Puts ``band_attention`` in the place of attention under masks that are bands, whatever becomes of its cache."""

    def __init__(self, functional: Functional, emit: Emitter) -> None:
        self.functional = functional
        self.emit = emit
        self.bands: dict[Node, tuple[Node | None, Node]] = {}  # columns and limits by mask: the host waits for these

    def run(self) -> None:
        for node in self.functional.graph.find_nodes(
            op="call_function", target=aten.scaled_dot_product_attention.default
        ):
            with located(node), self.functional.graph.inserting_before(node):
                attention = read_sdpa(node)
                band = read_band(attention.mask, attention.query_length) if _takes_a_band(attention) else None
                if band is not None:
                    self._replace(attention, band)

    def _replace(self, attention: Attention, band: Band) -> None:
        node, mask = attention.node, attention.mask
        if mask not in self.bands:
            columns = self.emit.columns(band)
            self.bands[mask] = columns, self._limits(band, columns)
        operands = attention.query, *(_ungrouped(x, attention.query) for x in (attention.key, attention.value))
        operands = (self.emit.cast(x, attention.dtype) for x in operands)
        result = self.emit.call(ops.band_attention.default, *operands, *self.bands[mask], attention.scale)
        result = self.emit.call(aten.transpose.int, result, 1, 2)
        if not node.meta["val"].transpose(1, 2).is_contiguous():  # as views behind it rely on
            result = self.emit.call(aten.contiguous.default, result)
        self.functional.replace(node, result)

    def _limits(self, band: Band, columns: Node | None) -> Node:
        edges = (None if edge is None else self._bound(edge) for edge in (band.last, band.first))
        return self.emit.call(ops.band_limits.default, *edges, columns)

    def _bound(self, edge: Edge) -> Node:
        queries, keys = (
            self.emit.call(aten.select.int, self.emit.call(aten.reshape.default, x, [-1]), 0, 0)
            for x in (edge.queries.node, edge.keys.node)
        )
        return self.emit.call(aten.sub.Tensor, self.emit.call(aten.sub.Tensor, queries, keys), edge.less)


def _takes_a_band(attention: Attention) -> bool:
    query, key = (x.meta["val"] for x in (attention.query, attention.key.node))
    several = not same_size(attention.query_length, 1) and same_size(query.shape[0], key.shape[0])
    return several and attention.problem is None and attention.mask is not None and not attention.is_causal


def _ungrouped(operand: Operand, query: Node) -> Node:
    """Keys or values as they are before each head is repeated for its group, where nothing else is done to them."""
    found = node = operand.node
    moves: list[Node] = []
    while is_move(node):
        moves.insert(0, node)
        node = node.args[0]
        same = node.meta["val"].dim() == 4 and node.meta["val"].dtype == found.meta["val"].dtype
        read = read_through(moves, node) if same else None
        if read is not None and read.prefix is None and sees_groups(read, operand, 2, query):
            found = node
    return found
