"""Stage 3: a functional graph and its matches -> a graph over compressed buffers, and the plan to call it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..cache.update import CacheUpdate, recognise_shift, recognise_update
from ..graph.normalise import Functional
from ..graph.symbols import same_size
from ..match import Match
from .emit import BUFFER_NAMES, Emitter
from .inputs import Inputs
from .plan import Argument, Attached, AttachedBuffer, Buffer, Compressed, Extended, Output, Plan, Result

aten = torch.ops.aten
ops = torch.ops.mustafar


class UnsupportedWriteError(RuntimeError):
    """A graph writes into a compressed cache in a way that cannot be followed."""


@dataclass(frozen=True)
class _New:
    """A cache that the graph compresses and returns."""

    buffers: list[Node]
    grows: bool
    tokens_dim: int


class Rewriter:
    """Rewrites one graph in place; use it once.

    compressed: placeholders that hold a compressed cache, each with its (kept, window). tokens_dim: the same
    placeholders, each with the dimension of its tokens.
    layout_of: role ("key" or "value") and head_dim -> (kept, window) of a cache to be compressed.
    capacity_of: tokens -> compressed slots of a growing cache.
    release_dense: whether the compressed state of a buffer of the caller is all that the graph may use of it.
    """

    def __init__(
        self,
        functional: Functional,
        compressed: Mapping[Node, tuple[int, int]],
        tokens_dim: Mapping[Node, int],
        layout_of: Callable[[str, int], tuple[int, int]],
        capacity_of: Callable[[Any], Any],
        release_dense: bool,
    ) -> None:
        self.functional = functional
        self.graph: Graph = functional.graph
        self.compressed = dict(compressed)
        self.tokens_dim = dict(tokens_dim)  # of attached placeholders, too
        self.layout_of = layout_of
        self.release_dense = release_dense
        self.inputs = Inputs(self.graph, functional.placeholders)
        self.emit = Emitter(self.graph, capacity_of)
        self.buffers: dict[Node, list[Node]] = {}  # of compressed and of attached placeholders
        self.replaced: dict[Node, Extended | _New] = {}  # outputs that become compressed caches
        self.written: set[Node] = set()  # compressed placeholders whose mutation happens inside an op
        self.rewinding: dict[Node, CacheUpdate] = {}  # compressed static placeholders that a dense step writes to
        self.attached: list[Attached] = []
        self.shared: set[Node] = set()  # updated keys that several attentions read
        self.steps: dict[Node, tuple[list[Node], list[Node], Node | None]] = {}  # by the updated keys

    def run(self, matches: list[Match]) -> Plan:
        readers = Counter(match.key.node for match in matches)
        self.shared = {node for node, count in readers.items() if count > 1}
        for placeholder in self.compressed:
            self.buffers[placeholder] = self.inputs.add_buffers(placeholder, Buffer)
        if self.release_dense:
            for match in matches:
                self._take_over(match)
        for match in matches:
            (self._decode if match.phase == "decode" else self._prefill)(match)
        self._keep_escaping_caches_compressed()
        outputs = self._set_output()
        self.graph.eliminate_dead_code()
        for placeholder in self.compressed:
            self._decompress_remaining_uses(placeholder)
        self.inputs.drop(self.compressed)
        self.graph.lint()
        module = GraphModule(self.functional.module, self.graph)
        return Plan(module, list(self.inputs.sources.values()), outputs, self.attached)

    # Matched attention

    def _decode(self, match: Match) -> None:
        attention = match.attention
        with self.graph.inserting_before(attention.node):
            rows, buffers, position = self._taken_in(match)
            result = self.emit.call(
                ops.decode_attention.default,
                attention.query,
                *rows,
                *buffers,
                position,
                attention.mask,
                attention.sinks,
                attention.scale,
                attention.softcap,
            )
            for target, *rest in attention.restore:
                result = self.emit.call(target, result, *rest)
            if attention.dtype != attention.query.meta["val"].dtype:
                result = self.emit.call(aten._to_copy.default, result, dtype=attention.dtype)
            result = self._laid_out_as(attention.node, result)
        result.meta = dict(attention.node.meta)
        attention.node.replace_all_uses_with(result)
        self.functional.outputs = [result if o is attention.node else o for o in self.functional.outputs]
        self.graph.erase_node(attention.node)

    def _taken_in(self, match: Match) -> tuple[list[Node], list[Node], Node | None]:
        """New rows, buffers and position of a step.

        Attentions that share a cache do the same step: taking the same tokens in again, at the same position, leaves
        the cache as it is.
        """
        known = self.steps.get(match.key.node)
        if known is not None:
            return known
        rows, buffers = [], []
        position = self.emit.first_position(match.key)
        for role, update in (("key", match.key), ("value", match.value)):
            rows.append(self.emit.new_rows(update))
            buffers += self._state(update, role, position)
        if position is None and match.key.node in self.shared:
            counts = buffers[BUFFER_NAMES.index("counts")]
            position = self.emit.call(aten.clone.default, self.emit.call(aten.slice.Tensor, counts, 0, 0, 1))
        self.steps[match.key.node] = rows, buffers, position
        return rows, buffers, position

    def _laid_out_as(self, original: Node, result: Node) -> Node:
        """``result`` with the strides of ``original``, on which views behind it rely.

        SDPA may give [B, L, Hq, D] in memory, the op gives [B, Hq, L, D]. For one token they are the same.
        """
        value = original.meta["val"]
        if value.dim() != 4 or same_size(value.shape[2], 1) or not value.transpose(1, 2).is_contiguous():
            return result
        swapped = self.emit.call(aten.transpose.int, result, 1, 2)
        return self.emit.call(aten.transpose.int, self.emit.call(aten.contiguous.default, swapped), 1, 2)

    def _state(self, update: CacheUpdate, role: str, position: Node | None) -> list[Node]:
        """The buffers that a decode step works on, and what becomes of the cache that the graph returns."""
        base = update.base
        assert base is not None
        if base in self.compressed:
            if update.grows:
                self.replaced[update.node] = Extended(self.inputs.index[base], self._count(update))
            else:
                self.written.add(base)
            return self.buffers[base]
        layout = self.layout_of(role, update.node.meta["val"].shape[-1])
        if update.grows:  # a dense past: compress it now, return it compressed
            buffers = self.emit.compress(base, update, layout)
            self.replaced[update.node] = _New(buffers, True, update.tokens_dim)
            return buffers
        if base not in self.buffers:
            self._attach(update, layout, position)
        return self.buffers[base]

    def _take_over(self, match: Match) -> None:
        """Make the buffers of the caller that ``match`` writes inputs like any compressed cache."""
        for role, update in (("key", match.key), ("value", match.value)):
            if update.base is None or update.grows or update.base in self.compressed:
                continue
            layout = self.layout_of(role, update.node.meta["val"].shape[-1])
            with self.graph.inserting_before(update.node):
                self._attach(update, layout, self.emit.first_position(update))
            self.compressed[update.base] = layout

    def _attach(self, update: CacheUpdate, layout: tuple[int, int], position: Node | None) -> None:
        assert update.base is not None
        assert position is not None
        self.buffers[update.base] = self.inputs.add_buffers(update.base, AttachedBuffer)
        self.tokens_dim[update.base] = update.tokens_dim
        shape = list(update.node.meta["val"].shape)
        if update.tokens_dim == 1:
            shape[1], shape[2] = shape[2], shape[1]
        batch, state_position = self.inputs.holding(shape[0]), self._extract(position)
        index, tokens_dim = self.inputs.index[update.base], update.tokens_dim
        self.attached.append(
            Attached(index, tokens_dim, tuple(shape), *layout, batch, state_position, self.release_dense)
        )

    def _count(self, update: CacheUpdate) -> int | Argument:
        return self.inputs.holding(update.new.meta["val"].shape[update.tokens_dim])

    def _extract(self, value: Node) -> GraphModule:
        """A graph of the original arguments that computes ``value`` alone."""
        graph = Graph()
        copies: dict[Node, Node] = {}
        needed, todo = set(), [value]
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                todo += node.all_input_nodes
        for node in self.graph.nodes:
            if node in self.inputs.index or node in needed:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[value])
        return GraphModule(self.functional.module, graph)

    def _prefill(self, match: Match) -> None:
        """Attention stays dense; what it leaves in the cache is compressed right after it."""
        for role, update in (("key", match.key), ("value", match.value)):
            if update.base is not None and not update.grows and update.base not in self.compressed:
                continue  # a buffer of the caller stays dense; the first decode step compresses it
            layout = self.compressed.get(update.base) or self.layout_of(role, update.node.meta["val"].shape[-1])
            with self.graph.inserting_before(match.attention.node.next):
                self._store(update, layout)

    def _store(self, update: CacheUpdate, layout: tuple[int, int]) -> None:
        """Compress the cache after ``update``: in place, or to be returned instead of the dense one."""
        if update.node in self.replaced or update.base in self.written:
            return
        buffers = self.emit.compress(update.node, update, layout)
        if update.base is None or update.grows:
            self.replaced[update.node] = _New(buffers, update.grows, update.tokens_dim)
            return
        for mine, new in zip(self.buffers[update.base], buffers, strict=True):
            self.emit.call(aten.copy_.default, mine, new)
        self.written.add(update.base)
        if update.op != "shift":  # which writes all of the buffer, and rewinds nothing
            self.rewinding[update.base] = update

    # Compressed caches that no match took

    def _keep_escaping_caches_compressed(self) -> None:
        with self.graph.inserting_before(self.graph.output_node()):
            for node in self.functional.outputs:
                update = recognise_update(node) if isinstance(node, Node) else None
                if update is not None and update.grows and self._joins_tokens(update):
                    self._store(update, self.compressed[update.base])
            for base, value in self.functional.mutated.items():
                if base in self.compressed and base not in self.written:
                    self._store(self._followed(base, value), self.compressed[base])

    def _joins_tokens(self, update: CacheUpdate) -> bool:
        """Whether the tokens of a compressed cache get new ones behind them."""
        return update.base in self.compressed and update.tokens_dim == self.tokens_dim[update.base]

    def _followed(self, base: Node, value: Node) -> CacheUpdate:
        """The update by which ``base`` became ``value``."""
        update = recognise_update(value) or recognise_shift(base, value, self.tokens_dim[base])
        if update is None or update.base is not base or update.grows or not self._joins_tokens(update):
            raise UnsupportedWriteError(
                f"{value.target} writes into a compressed KV cache in a way that cannot be followed; accepted are "
                "index_copy_, index_put_ and slice writes of new tokens along their dimension, and rolling"
            )
        return update

    def _decompress_remaining_uses(self, placeholder: Node) -> None:
        for user in [u for u in placeholder.users if u.target is aten.sym_size.int]:
            user.replace_all_uses_with(self.inputs.size_of(placeholder, user.args[1]))
            self.graph.erase_node(user)
        if placeholder.users:
            tokens_dim = self.tokens_dim[placeholder]
            length = self.inputs.size_of(placeholder, tokens_dim)
            first_use = self._first_use(placeholder)
            with self.graph.inserting_before(first_use):
                dense = self.emit.decompress(self._rewound(placeholder, first_use), length, tokens_dim)
            placeholder.replace_all_uses_with(dense)

    def _rewound(self, placeholder: Node, first_use: Node) -> list[Node]:
        """The buffers as they are once the cache is rewound to where the graph writes, if that is before its end.

        What comes back to the window is read exact then. Not where the graph reads the cache before it knows the place.
        """
        *rows, counts = self.buffers[placeholder]
        update = self.rewinding.get(placeholder)
        if update is None or (isinstance(update.position, Node) and not update.position < first_use):
            return [*rows, counts]
        start = self.emit.call(aten.reshape.default, self.emit.first_position(update), [1])
        start = self.emit.call(aten._to_copy.default, start, dtype=torch.int64)
        tokens = self.emit.call(aten.minimum.default, self.emit.call(aten.slice.Tensor, counts, 0, 0, 1), start)
        return [*rows, self.emit.call(aten.cat.default, [tokens, self.emit.call(aten.slice.Tensor, counts, 0, 1)])]

    def _first_use(self, placeholder: Node) -> Node:
        """The first op on the cache: late, so that one layer is dense at a time, and before anything is written."""
        users = {user for node in (placeholder, *self.buffers[placeholder]) for user in node.users}
        return next(node for node in self.graph.nodes if node in users)

    # Calling convention

    def _set_output(self) -> list[Output]:
        """Give the graph its results, write mutated inputs back, and say what each result becomes."""
        output = self.graph.output_node()
        nodes: list[Any] = []
        final = {value: base for base, value in self.functional.mutated.items() if base not in self.compressed}
        with self.graph.inserting_before(output):
            for value, base in final.items():
                self.emit.call(aten.copy_.default, base, value)
            outputs = [self._output(final.get(node, node), nodes) for node in self.functional.outputs]
        output.args = (tuple(nodes),)
        return outputs

    def _output(self, node: Any, nodes: list[Any]) -> Output:
        if node in self.compressed:
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
            return Compressed(first, tokens, replaced.grows, replaced.tokens_dim)
        nodes.append(tokens)
        return Compressed(first, Result(len(nodes) - 1), replaced.grows, replaced.tokens_dim)
