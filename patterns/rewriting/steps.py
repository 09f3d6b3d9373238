"""Masks of decode steps: left out where they say what the op knows, else made once for all layers."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch.fx import Node

from ..attention.band import Band, read_band
from ..cache.update import CacheUpdate
from ..graph.calls import call_before
from ..graph.nodes import computed_alike, is_call
from ..graph.normalise import Functional
from ..graph.runs import Run, read_run
from ..graph.symbols import expression, same_size
from ..match import Match
from .emit import Emitter
from .inputs import Inputs

aten = torch.ops.aten
_UNEVEN = (
    "mustafar: static KV caches of layers under one mask hold different numbers of tokens; accepted are caches that "
    "were given the same tokens"
)


class StepMasks:
    """The masks that ``decode_attention`` is to get.

    Without one, each token of a step attends to all tokens up to itself. Transformers makes a mask of just that, as its
    static caches have slots behind the last token. It is left out where the graph shows that it says no more.
    """

    def __init__(self, functional: Functional, emit: Emitter, inputs: Inputs) -> None:
        self.functional = functional
        self.emit = emit
        self.inputs = inputs
        self.bands: dict[Node, Band | None] = {}
        self.whole: dict[tuple[Node, Any], Node] = {}  # over all slots of a cache, by the mask and their number
        self.counters: dict[Node, None] = {}  # that count on alike, if the mask of one is to be that of another

    def of(self, match: Match) -> Node | None:
        """The mask of a step; where it is of the first slots alone, it is to leave out all behind them."""
        mask, attended = match.attention.mask, match.prefix
        if mask is None or (attended is None and self._says_nothing(match, mask)):
            return None
        if attended is not None and same_size(mask.meta["val"].shape[-1], attended):
            return self._over_all_slots(mask, self.inputs.size_of(match.key.base, match.key.tokens_dim), match)
        while is_call(mask, aten.expand.default) and mask.meta["val"].dim() == mask.args[0].meta["val"].dim():
            mask = mask.args[0]  # Inductor would lay a repeated one out for each layer
        return mask

    def check(self) -> None:
        """Assert what leaving masks out takes for granted."""
        first = next(iter(self.counters), None)
        if first is None or len(self.counters) == 1:
            return
        with self.functional.graph.inserting_before(
            next(n for n in self.functional.graph.nodes if n.op != "placeholder")
        ):
            counts = [self.emit.call(aten.reshape.default, counter, [1]) for counter in self.counters]
            alike = self.emit.call(aten.eq.Tensor, self.emit.call(aten.cat.default, counts), counts[0])
            self.emit.call(aten._assert_async.msg, self.emit.call(aten.all.default, alike), _UNEVEN)

    def _says_nothing(self, match: Match, mask: Node) -> bool:
        """Whether ``mask`` admits to each token of a step just the tokens up to itself."""
        if mask not in self.bands:
            self.bands[mask] = read_band(mask, match.attention.query_length)
        band = self.bands[mask]
        if band is None or band.first is not None or band.columns:
            return False
        edge, queries = band.last, match.attention.query_length
        if match.key.grows:  # in whose mask the tokens of the step are the last columns
            counts = [expression(x) for x in (mask.meta["val"].shape[-1], queries)]
            return edge.bound is not None and None not in counts and edge.bound == counts[0] - counts[1]
        tokens = self._places(match.key)
        if tokens is None or None in (tokens.offset, edge.queries.offset, edge.keys.start):
            return False
        ahead = sympy.expand(edge.queries.offset - edge.keys.start - edge.less - tokens.offset)
        return ahead == 0 and self._alike(tokens.shift, edge.queries.shift, queries)

    @staticmethod
    def _places(update: CacheUpdate) -> Run | None:
        """Where the tokens of a step go in a static cache; None where it may be told from the end, too."""
        return None if update.op == "index_put" else read_run(update.position)

    def _alike(self, place: Node | None, seen: Node | None, count: Any) -> bool:
        """Whether two numbers on the device are the same, as long as all layers were given the same tokens."""
        if place is seen or computed_alike(place, seen):
            return True
        if not (self._counts(place, count) and self._counts(seen, count)):
            return False
        self.counters |= dict.fromkeys((seen, place))
        return True

    def _counts(self, number: Any, count: Any) -> bool:
        """Whether ``number`` is one of the caller's that each step moves on by the ``count`` of its tokens."""
        after = self.functional.mutated.get(number)
        return is_call(after, aten.add.Tensor) and after.args[0] is number and same_size(after.args[1], count)

    def _over_all_slots(self, mask: Node, slots: Any, match: Match) -> Node:
        """``mask``, of the first slots of a cache, over all ``slots``, the others left out."""
        if (mask, slots) not in self.whole:
            self.whole[mask, slots] = self._widened(mask, slots, match.attention.node)
        return self.whole[mask, slots]

    def _widened(self, mask: Node, slots: Any, place: Node) -> Node:
        value = mask.meta["val"]
        dtype = value.dtype if value.dtype == torch.bool or value.is_floating_point() else torch.float32
        if value.dtype != dtype:
            mask = call_before(place, aten._to_copy.default, mask, dtype=dtype)
        *rows, columns = (self.emit.size(mask, dim) for dim in range(value.dim()))
        out, how = False if dtype == torch.bool else -math.inf, {"dtype": dtype, "device": value.device}
        whole = call_before(place, aten.full.default, [*rows, slots], out, **how)
        return call_before(place, aten.slice_scatter.default, whole, mask, len(rows), 0, columns)
