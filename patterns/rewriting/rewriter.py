"""Stage 3: a functional graph and its matches -> a graph over compressed buffers, and the plan to call it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ...lowering.layout import Layout
from ..cache.conditions import CacheInput
from ..cache.update import CacheUpdate, recognise_shift, recognise_update
from ..graph.nodes import located
from ..graph.normalise import Functional
from ..match import Match
from .caches import Cache, decompress_remaining_uses
from .emit import Emitter
from .inputs import Inputs
from .plan import Argument, Attached, AttachedBuffer, Buffer, Compressed, Extended, Output, Plan, Result
from .prompts import Prompts
from .steps import StepMasks

aten = torch.ops.aten
ops = torch.ops.mustafar


class UnsupportedWriteError(RuntimeError):
    """A graph writes into a compressed cache in a way that cannot be followed."""


@dataclass(frozen=True)
class _New:
    """A cache that the graph compresses and returns."""

    buffers: list[Node]
    format: Layout
    grows: bool
    tokens_dim: int


@dataclass(frozen=True)
class _Step:
    """New rows and buffers of K and of V, and where the first row goes; None: behind the last."""

    rows: list[Node]
    buffers: list[list[Node]]
    position: Node | None


class Rewriter:
    """Rewrites one graph in place; use it once.

    compressed: the placeholders that hold a compressed cache.
    capacity_of: tokens -> compressed slots of a growing cache.
    release_dense: whether the compressed state of a buffer of the caller is all that the graph may use of it.
    """

    def __init__(
        self,
        functional: Functional,
        compressed: Mapping[Node, CacheInput],
        capacity_of: Callable[[Any], Any],
        release_dense: bool,
    ) -> None:
        self.functional = functional
        self.graph: Graph = functional.graph
        self.release_dense = release_dense
        self.inputs = Inputs(self.graph, functional.placeholders)
        self.emit = Emitter(self.graph, capacity_of)
        self.caches = {
            node: Cache(x.format, x.tokens_dim, self.inputs.add_buffers(node, x.format, Buffer))
            for node, x in compressed.items()
        }
        self.replaced: dict[Node, Extended | _New] = {}  # outputs that become compressed caches
        self.attached: list[Attached] = []
        self.shared: set[Node] = set()  # updated keys that several attentions read
        self.steps: dict[Node, _Step] = {}  # by the updated keys
        self.masks = StepMasks(functional, self.emit, self.inputs)

    def run(self, matches: list[Match]) -> Plan:
        readers = Counter(match.key.node for match in matches)
        self.shared = {node for node, count in readers.items() if count > 1}
        if self.release_dense:
            for match in matches:
                self._attach_in_place_of_dense(match)
        for match in matches:
            with located(match.attention.node):
                (self._decode if match.phase == "decode" else self._prefill)(match)
        self.masks.check()
        if all(match.phase == "prefill" for match in matches):  # a step is recorded, and waits for nothing
            Prompts(self.functional, self.emit).run()
        self._keep_escaping_caches_compressed()
        outputs = self._set_output()
        self.graph.eliminate_dead_code()
        self.emit.places.clear()  # of which some were dead
        replaced = [node for node in self.caches if self._is_compressed(node)]
        for placeholder in replaced:
            decompress_remaining_uses(placeholder, self.caches[placeholder], self.emit, self.inputs)
        self.inputs.drop(replaced)
        self.graph.lint()
        module = GraphModule(self.functional.module, self.graph)
        return Plan(module, list(self.inputs.sources.values()), outputs, self.attached)

    def _is_compressed(self, base: Node | None) -> bool:
        """Whether a placeholder holds a compressed cache, and no dense one."""
        return base in self.caches and self.caches[base].replaces_dense

    # Matched attention

    def _decode(self, match: Match) -> None:
        attention = match.attention
        with self.graph.inserting_before(attention.node):
            step = self._step(match)
            result = self.emit.call(
                ops.decode_attention.default,
                attention.query,
                *step.rows,
                *step.buffers,
                *(format.encode() for format in match.formats),
                step.position,
                self.masks.of(match),
                attention.sinks,
                attention.scale,
                attention.softcap,
                length=None if match.key.grows else self.inputs.size_of(match.key.base, match.key.tokens_dim),
            )
            for target, *rest in attention.restore:
                result = self.emit.call(target, result, *rest)
            if attention.dtype != attention.query.meta["val"].dtype:
                result = self.emit.call(aten._to_copy.default, result, dtype=attention.dtype)
            result = self.emit.with_strides_of(attention.node, result)
        self.functional.replace(attention.node, result)

    def _step(self, match: Match) -> _Step:
        """What a step takes.

        Attentions that share a cache do the same step: taking the same tokens in again, at the same position, leaves
        the cache as it is.
        """
        known = self.steps.get(match.key.node)
        if known is not None:
            return known
        position = self.emit.first_position(match.key)
        rows = [self.emit.new_rows(update) for update, _ in match.updates]
        buffers = [self._state(match, update, format, position) for update, format in match.updates]
        if position is None and match.key.node in self.shared:
            position = self.emit.call(aten.clone.default, self.emit.call(aten.select.int, buffers[0][-1], 1, 0))
        self.steps[match.key.node] = _Step(rows, buffers, position)
        return self.steps[match.key.node]

    def _state(self, match: Match, update: CacheUpdate, format: Layout, position: Node | None) -> list[Node]:
        """The buffers that a decode step works on, and what becomes of the cache that the graph returns."""
        base = update.base
        assert base is not None
        if self._is_compressed(base):
            if update.grows:
                self.replaced[update.node] = Extended(self.inputs.index[base], self._count(update))
            else:
                self.caches[base].written = True
        elif update.grows:  # a dense past: compress it now, return it compressed
            buffers = self.emit.compress(base, update, format)
            self.replaced[update.node] = _New(buffers, format, True, update.tokens_dim)
            return buffers
        elif base not in self.caches:
            self._attach(match, update, format, position)
        return self.caches[base].buffers

    def _attach_in_place_of_dense(self, match: Match) -> None:
        """Make the buffers of the caller that ``match`` writes inputs like any compressed cache."""
        for update, format in match.updates:
            if update.base is not None and not update.grows and not self._is_compressed(update.base):
                with self.graph.inserting_before(update.node):
                    self._attach(match, update, format, self.emit.first_position(update))

    def _attach(self, match: Match, update: CacheUpdate, format: Layout, position: Node | None) -> None:
        assert update.base is not None
        assert position is not None
        base, tokens_dim, releases = update.base, update.tokens_dim, self.release_dense
        buffers = self.inputs.add_buffers(base, format, AttachedBuffer)
        self.caches[base] = Cache(format, tokens_dim, buffers, replaces_dense=releases)
        shape = list(update.node.meta["val"].shape)
        if tokens_dim == 1:
            shape[1], shape[2] = shape[2], shape[1]
        index, batch = self.inputs.index[base], self.inputs.holding(shape[0])
        first, blind = self.functional.extracted(position), match.is_blind(update)
        self.attached.append(Attached(index, tokens_dim, tuple(shape), format, batch, first, releases, blind))

    def _count(self, update: CacheUpdate) -> int | Argument:
        return self.inputs.holding(update.new.meta["val"].shape[update.tokens_dim])

    def _prefill(self, match: Match) -> None:
        """Attention stays dense; what it leaves in the cache is compressed right after it."""
        for update, format in match.updates:
            if update.base is not None and not update.grows and not self._is_compressed(update.base):
                continue  # a buffer of the caller stays dense; the first decode step compresses it
            with self.graph.inserting_before(match.attention.node.next):
                self._store(update, format, match)

    def _store(self, update: CacheUpdate, format: Layout, match: Match | None = None) -> None:
        """Compress the cache after ``update``: in place, or to be returned instead of the dense one.

        match: the attention that reads it, if any does.
        """
        cache = self.caches.get(update.base) if update.base is not None else None
        if update.node in self.replaced or (cache is not None and cache.written):
            return
        past = None if cache is None else cache.buffers
        buffers = self.emit.compress(update.node, update, format, self._seen(match, update), past)
        if cache is None or update.grows:
            self.replaced[update.node] = _New(buffers, format, update.grows, update.tokens_dim)
            return
        for mine, new in zip(cache.buffers, buffers, strict=True):
            self.emit.call(aten.copy_.default, mine, new)
        cache.written = True
        if update.op != "shift":  # which writes all of the buffer, and rewinds nothing
            cache.rewinding = update

    def _seen(self, match: Match | None, update: CacheUpdate) -> dict[str, Node]:
        """What the strategy of K or V wants to know of the attention of a prompt."""
        wanted = "" if match is None else match.wanted(update)
        if not wanted:
            return {}
        assert match is not None
        return {wanted: match.attention.query if wanted == "queries" else self.emit.latest_weights(match)}

    # Compressed caches that no match took

    def _keep_escaping_caches_compressed(self) -> None:
        with self.graph.inserting_before(self.graph.output_node()):
            for node in self.functional.outputs:
                update = recognise_update(node) if isinstance(node, Node) else None
                if update is not None and update.grows and self._joins_tokens(update):
                    self._store(update, self.caches[update.base].format)
            for base, value in self.functional.mutated.items():
                if self._is_compressed(base) and not self.caches[base].written:
                    self._store(self._followed(base, value), self.caches[base].format)

    def _joins_tokens(self, update: CacheUpdate) -> bool:
        """Whether the tokens of a compressed cache get new ones behind them."""
        return self._is_compressed(update.base) and update.tokens_dim == self.caches[update.base].tokens_dim

    def _followed(self, base: Node, value: Node) -> CacheUpdate:
        """The update by which ``base`` became ``value``."""
        update = recognise_update(value) or recognise_shift(base, value, self.caches[base].tokens_dim)
        follows = update is not None and update.base is base and not update.in_part
        if not follows or update.grows or not self._joins_tokens(update):
            raise UnsupportedWriteError(
                f"{value.target} writes into a compressed KV cache in a way that cannot be followed; accepted are "
                "index_copy_, index_put_ and slice writes of new tokens of all rows along their dimension, and rolling"
            )
        return update

    # Calling convention

    def _set_output(self) -> list[Output]:
        """Give the graph its results, write mutated inputs back, and say what each result becomes."""
        output = self.graph.output_node()
        nodes: list[Any] = []
        final = {value: base for base, value in self.functional.mutated.items() if not self._is_compressed(base)}
        with self.graph.inserting_before(output):
            for value, base in final.items():
                self.emit.call(aten.copy_.default, base, value)
            outputs = [self._output(final.get(node, node), nodes) for node in self.functional.outputs]
        output.args = (tuple(nodes),)
        return outputs

    def _output(self, node: Any, nodes: list[Any]) -> Output:
        if isinstance(node, Node) and self._is_compressed(node):
            return Argument(self.inputs.index[node])
        replaced = self.replaced.get(node) if isinstance(node, Node) else None
        if isinstance(replaced, Extended):
            return replaced
        if replaced is None:
            nodes.append(node)
            return Result(len(nodes) - 1)
        first = len(nodes)
        nodes += replaced.buffers
        tokens = self.emit.size(node, replaced.tokens_dim)
        if isinstance(tokens, int):
            return Compressed(first, replaced.format, tokens, replaced.grows, replaced.tokens_dim)
        nodes.append(tokens)
        return Compressed(first, replaced.format, Result(len(nodes) - 1), replaced.grows, replaced.tokens_dim)
