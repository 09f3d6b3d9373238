"""Adding to a graph the ops that take caches apart and put them together."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy

from ...lowering.layout import Layout
from ..attention.band import Band, read_band
from ..cache.update import CacheUpdate
from ..graph.nodes import is_tensor, symbolic_size
from ..graph.symbols import same_size
from ..match import Match

aten = torch.ops.aten
ops = torch.ops.mustafar


def packed_swapped(graph: Graph, node: Node) -> Node:
    """``node`` laid out contiguous but for a swap of its second and third dimension."""
    swapped = graph.call_function(aten.transpose.int, (node, 1, 2))
    packed = graph.call_function(aten.contiguous.default, (swapped,))
    return graph.call_function(aten.transpose.int, (packed, 1, 2))


class Emitter:
    """Adds ops to ``graph``, where it is told to insert. capacity_of: tokens -> compressed slots of a growing cache."""

    def __init__(self, graph: Graph, capacity_of: Callable[[Any], Any]) -> None:
        self.graph = graph
        self.capacity_of = capacity_of
        self.places: dict[tuple[Node, int, Any, torch.device], Node] = {}  # of new tokens

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def size(self, node: Node, dim: int) -> Any:
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else symbolic_size(self.graph, node, dim)

    def tokens(self, count: Any, like: Node) -> Node:
        """A host-side count as the one-element device tensor that the ops take."""
        return self.call(aten.full.default, [1], count, dtype=torch.int64, device=like.meta["val"].device)

    def swapped(self, node: Node, tokens_dim: int) -> Node:
        """``node`` between [B, S, H, D] and [B, H, S, D]; as it is where ``tokens_dim`` says that the cache is so."""
        return self.call(aten.permute.default, node, [0, 2, 1, 3]) if tokens_dim == 1 else node

    def with_strides_of(self, original: Node, result: Node) -> Node:
        """``result`` with the strides of ``original``, on which views behind it rely.

        SDPA may give [B, L, Hq, D] in memory, the op gives [B, Hq, L, D]. For one token they are the same.
        """
        value = original.meta["val"]
        if value.dim() != 4 or same_size(value.shape[2], 1) or not value.transpose(1, 2).is_contiguous():
            return result
        return packed_swapped(self.graph, result)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """``node`` in ``dtype``."""
        return node if node.meta["val"].dtype == dtype else self.call(aten._to_copy.default, node, dtype=dtype)

    def columns(self, band: Band) -> Node | None:
        """All columns that a mask leaves out, None where there are none."""
        both = functools.partial(self.call, aten.logical_and.default)
        return functools.reduce(both, band.columns) if band.columns else None

    def new_rows(self, update: CacheUpdate) -> Node:
        """The new tokens [B, H, L, D] in the dtype of the cache."""
        return self.swapped(self.cast(update.new, update.node.meta["val"].dtype), update.tokens_dim)

    def first_position(self, update: CacheUpdate) -> Node | None:
        """Where the first new token goes, on the device, [1] or [B]; None for a cache that grows by its end."""
        if update.grows:
            return None
        if not is_tensor(update.position):
            return self.tokens(update.position, update.new)
        return self._position(update, 0)

    def _position(self, update: CacheUpdate, token: int) -> Node:
        """Where a new token goes, by its number: int64 [1], or [B] of each row of the batch, on the cache's device."""
        device = update.new.meta["val"].device
        # Only index_put takes positions that count from the end.
        slots = self.size(update.node, update.tokens_dim) if update.op == "index_put" else None
        if isinstance(slots, Node):  # which is nowhere ahead of the write
            return self._read_position(update.position, token, slots, device)
        asked = update.position, token, slots, device
        if asked not in self.places:  # made once for all layers, which would launch a kernel each
            with self.graph.inserting_before(_behind(update.position)):
                self.places[asked] = self._read_position(*asked)
        return self.places[asked]

    def _read_position(self, positions: Node, token: int, slots: Any, device: torch.device) -> Node:
        """One of ``positions`` [L] or [B, L]. slots: to add where it counts from the end, if it may."""
        value = positions.meta["val"]
        if value.device != device:  # some writes take one of the host
            positions = self.call(aten._to_copy.default, positions, device=device)
        if value.dim() != 2:
            positions = self.call(aten.view.default, positions, [1, -1])
        position = self.call(aten.select.int, positions, 1, token)
        if slots is None:
            return position
        from_end = self.call(aten.add.Tensor, position, slots)
        return self.call(aten.where.self, self.call(aten.lt.Scalar, position, 0), from_end, position)

    def compress(
        self,
        dense: Node,
        update: CacheUpdate,
        format: Layout,
        seen: Mapping[str, Node] = {},
        past: list[Node] | None = None,
    ) -> list[Node]:
        """The buffers of ``dense``, which is the cache before or after ``update``.

        seen: arguments of the op that say more of the last of its tokens, where that is known. past: the buffers of the
        cache that it continues, if that is compressed.
        """
        length, rows = self.size(dense, update.tokens_dim), self.swapped(dense, update.tokens_dim)
        if update.grows:
            tokens, capacity = self.tokens(length, dense), self._growing_capacity(length)
        else:
            tokens, capacity = self._written_tokens(update), length
        known: dict[str, Any] = dict(seen)
        if past is not None and (state := format.state_of(past)):
            known["past"] = state
        packed = self.call(ops.compress.default, rows, tokens, format.encode(), capacity, **known)
        return [self.call(operator.getitem, packed, i) for i in range(len(format.buffers))]

    def latest_weights(self, match: Match) -> Node:
        """The attention weights of the last tokens of a prompt."""
        attention, keys = match.attention, self.swapped(match.key.node, match.key.tokens_dim)
        mask, causal = attention.mask, attention.is_causal
        band = None if mask is None else read_band(mask, attention.query_length)
        if band is not None and band.begins:  # the mask itself may then be left out
            mask, causal = self.columns(band), True
        how = attention.sinks, causal, attention.scale, attention.softcap
        return self.call(ops.latest_weights.default, attention.query, keys, mask, *how)

    def _growing_capacity(self, tokens: Any) -> Any:
        return self.capacity_of(tokens) if isinstance(tokens, int) else self.capacity_of(Proxy(tokens)).node

    def _written_tokens(self, update: CacheUpdate) -> Node:
        """Tokens in a static cache after a write: one more than the last position."""
        if is_tensor(update.position):
            last = self._position(update, -1)
        else:
            count = self.size(update.new, update.tokens_dim)
            start = Proxy(update.position) if isinstance(update.position, Node) else update.position
            count = Proxy(count) if isinstance(count, Node) else count
            last = start + count - 1
            last = self.tokens(last.node if isinstance(last, Proxy) else last, update.new)
        return self.call(aten.add.Tensor, last, 1)

    def decompress(self, buffers: list[Node], format: Layout, length: Any, tokens_dim: int) -> Node:
        """The dense cache, of ``length`` tokens. Where that is none there is nothing to decompress."""
        if length == 0:
            parts = zip(format.parts, format.split(buffers), strict=True)
            empty = [self.call(aten.slice.Tensor, own[part.place("window")], 2, 0, 0) for part, own in parts]
            dense = empty[0] if len(empty) == 1 else self.call(aten.cat.default, empty, 1)
        else:
            dense = self.call(ops.decompress.default, buffers, format.encode(), length)
        return self.call(aten.contiguous.default, self.swapped(dense, tokens_dim))


def _behind(node: Node) -> Node:
    """What stands behind ``node``, and behind all inputs if it is one."""
    behind = node.next
    while behind.op == "placeholder":
        behind = behind.next
    return behind
