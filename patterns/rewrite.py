"""Stage 3: a functional graph and its matches -> a graph over compressed buffers, and the plan to call it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, Proxy

from .cache_update import CacheUpdate, recognise_shift, recognise_update
from .match import Match
from .nodes import is_tensor
from .normalise import Functional
from .plan import Argument, Attached, AttachedBuffer, Buffer, Compressed, Extended, Input, Output, Plan, Result, Size
from .symbols import same_size

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
        self.capacity_of = capacity_of
        self.release_dense = release_dense
        self.index = {node: i for i, node in enumerate(functional.placeholders)}
        self.inputs: dict[Node, Input] = {node: Argument(i) for node, i in self.index.items()}
        self.names = [r.name for r in ops.compress.default._schema.returns]
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
            self._add_buffers(placeholder, Buffer)
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
        self._drop_placeholders()
        self.graph.lint()
        module = GraphModule(self.functional.module, self.graph)
        return Plan(module, list(self.inputs.values()), outputs, self.attached)

    # Emitting nodes

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def _add_placeholder(self, name: str, source: Input) -> Node:
        with self.graph.inserting_after(next(reversed(self.inputs))):
            node = self.graph.placeholder(name)
        self.inputs[node] = source
        return node

    def _add_buffers(self, placeholder: Node, kind: type[Buffer] | type[AttachedBuffer]) -> None:
        index = self.index[placeholder]
        self.buffers[placeholder] = [
            self._add_placeholder(f"{placeholder.name}_{name}", kind(index, name)) for name in self.names
        ]

    def _size(self, node: Node, dim: int) -> Any:
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self._call(aten.sym_size.int, node, dim)

    def _tokens(self, count: Any, like: Node) -> Node:
        """A host-side count as the one-element device tensor that the ops take."""
        return self._call(aten.full.default, [1], count, dtype=torch.int64, device=like.meta["val"].device)

    def _compress(self, dense: Node, tokens: Node, layout: tuple[int, int], capacity: Any) -> list[Node]:
        packed = self._call(ops.compress.default, dense, tokens, *layout, capacity)
        return [self._call(operator.getitem, packed, i) for i in range(len(self.names))]

    def _growing_capacity(self, tokens: Any) -> Any:
        if isinstance(tokens, int):
            return self.capacity_of(tokens)
        return self.capacity_of(Proxy(tokens)).node

    # Matched attention

    def _decode(self, match: Match) -> None:
        attention = match.attention
        with self.graph.inserting_before(attention.node):
            rows, buffers, position = self._taken_in(match)
            result = self._call(
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
                result = self._call(target, result, *rest)
            if attention.dtype != attention.query.meta["val"].dtype:
                result = self._call(aten._to_copy.default, result, dtype=attention.dtype)
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
        position = self._first_position(match.key)
        for role, update in (("key", match.key), ("value", match.value)):
            rows.append(self._new_rows(update))
            buffers += self._state(update, role, position)
        if position is None and match.key.node in self.shared:
            counts = buffers[self.names.index("counts")]
            position = self._call(aten.clone.default, self._call(aten.slice.Tensor, counts, 0, 0, 1))
        self.steps[match.key.node] = rows, buffers, position
        return rows, buffers, position

    def _laid_out_as(self, original: Node, result: Node) -> Node:
        """``result`` with the strides of ``original``, on which views behind it rely.

        SDPA may give [B, L, Hq, D] in memory, the op gives [B, Hq, L, D]. For one token they are the same.
        """
        value = original.meta["val"]
        if value.dim() != 4 or same_size(value.shape[2], 1) or not value.transpose(1, 2).is_contiguous():
            return result
        swapped = self._call(aten.transpose.int, result, 1, 2)
        return self._call(aten.transpose.int, self._call(aten.contiguous.default, swapped), 1, 2)

    def _first_position(self, update: CacheUpdate) -> Node | None:
        """Where the first new token goes, on the device; None for a cache that grows by its end."""
        if update.grows:
            return None
        if not is_tensor(update.position):
            return self._tokens(update.position, update.new)
        return self._call(aten.select.int, self._call(aten.view.default, self._positions(update), [-1]), 0, 0)

    def _positions(self, update: CacheUpdate) -> Node:
        """The tensor of positions, on the cache's device: some writes take one of the host."""
        device = update.new.meta["val"].device
        if update.position.meta["val"].device == device:
            return update.position
        return self._call(aten._to_copy.default, update.position, device=device)

    def _new_rows(self, update: CacheUpdate) -> Node:
        row, dtype = update.new, update.node.meta["val"].dtype
        if row.meta["val"].dtype != dtype:
            row = self._call(aten._to_copy.default, row, dtype=dtype)
        return self._swapped(row, update.tokens_dim)

    def _swapped(self, node: Node, tokens_dim: int) -> Node:
        """``node`` between [B, S, H, D] and [B, H, S, D]; as it is where ``tokens_dim`` says that the cache is so."""
        return self._call(aten.permute.default, node, [0, 2, 1, 3]) if tokens_dim == 1 else node

    def _state(self, update: CacheUpdate, role: str, position: Node | None) -> list[Node]:
        """The buffers that a decode step works on, and what becomes of the cache that the graph returns."""
        base = update.base
        assert base is not None
        if base in self.compressed:
            if update.grows:
                self.replaced[update.node] = Extended(self.index[base], self._count(update))
            else:
                self.written.add(base)
            return self.buffers[base]
        layout = self.layout_of(role, update.node.meta["val"].shape[-1])
        if update.grows:  # a dense past: compress it now, return it compressed
            buffers = self._compress_new(base, update, layout)
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
                self._attach(update, layout, self._first_position(update))
            self.compressed[update.base] = layout

    def _attach(self, update: CacheUpdate, layout: tuple[int, int], position: Node | None) -> None:
        assert update.base is not None
        assert position is not None
        self._add_buffers(update.base, AttachedBuffer)
        self.tokens_dim[update.base] = update.tokens_dim
        shape = list(update.node.meta["val"].shape)
        if update.tokens_dim == 1:
            shape[1], shape[2] = shape[2], shape[1]
        batch, state_position = self._known_size(shape[0]), self._extract(position)
        index, tokens_dim = self.index[update.base], update.tokens_dim
        self.attached.append(
            Attached(index, tokens_dim, tuple(shape), *layout, batch, state_position, self.release_dense)
        )

    def _count(self, update: CacheUpdate) -> int | Argument:
        return self._known_size(update.new.meta["val"].shape[update.tokens_dim])

    def _known_size(self, size: Any) -> int | Argument:
        """``size``, or the argument that holds it."""
        return size if isinstance(size, int) else Argument(next(i for p, i in self.index.items() if same_size(p, size)))

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
            if node in self.index or node in needed:
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
        buffers = self._compress_new(update.node, update, layout)
        if update.base is None or update.grows:
            self.replaced[update.node] = _New(buffers, update.grows, update.tokens_dim)
            return
        for mine, new in zip(self.buffers[update.base], buffers, strict=True):
            self._call(aten.copy_.default, mine, new)
        self.written.add(update.base)
        if update.op != "shift":  # which writes all of the buffer, and rewinds nothing
            self.rewinding[update.base] = update

    def _compress_new(self, dense: Node, update: CacheUpdate, layout: tuple[int, int]) -> list[Node]:
        length, rows = self._size(dense, update.tokens_dim), self._swapped(dense, update.tokens_dim)
        if update.grows:
            return self._compress(rows, self._tokens(length, dense), layout, self._growing_capacity(length))
        return self._compress(rows, self._written_tokens(update), layout, length)

    def _written_tokens(self, update: CacheUpdate) -> Node:
        """Tokens in a static cache after a write: one more than the last position."""
        if is_tensor(update.position):
            last = self._call(aten.select.int, self._positions(update), 0, -1)
        else:
            count = self._size(update.new, update.tokens_dim)
            start = Proxy(update.position) if isinstance(update.position, Node) else update.position
            count = Proxy(count) if isinstance(count, Node) else count
            last = start + count - 1
            last = self._tokens(last.node if isinstance(last, Proxy) else last, update.new)
        return self._call(aten.add.Tensor, last, 1)

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
            user.replace_all_uses_with(self._logical_size(placeholder, user.args[1]))
            self.graph.erase_node(user)
        if placeholder.users:
            tokens_dim = self.tokens_dim[placeholder]
            length = self._logical_size(placeholder, tokens_dim)
            first_use = self._first_use(placeholder)
            with self.graph.inserting_before(first_use):
                dense = self._decompress(self._rewound(placeholder, first_use), length)
                dense = self._call(aten.contiguous.default, self._swapped(dense, tokens_dim))
            placeholder.replace_all_uses_with(dense)

    def _rewound(self, placeholder: Node, first_use: Node) -> list[Node]:
        """The buffers as they are once the cache is rewound to where the graph writes, if that is before its end.

        What comes back to the window is read exact then. Not where the graph reads the cache before it knows the place.
        """
        *rows, counts = self.buffers[placeholder]
        update = self.rewinding.get(placeholder)
        if update is None or (isinstance(update.position, Node) and not update.position < first_use):
            return [*rows, counts]
        start = self._call(aten.reshape.default, self._first_position(update), [1])
        start = self._call(aten._to_copy.default, start, dtype=torch.int64)
        tokens = self._call(aten.minimum.default, self._call(aten.slice.Tensor, counts, 0, 0, 1), start)
        return [*rows, self._call(aten.cat.default, [tokens, self._call(aten.slice.Tensor, counts, 0, 1)])]

    def _decompress(self, buffers: list[Node], length: Any) -> Node:
        """[B, H, length, D], which is nothing to decompress where the cache was cropped to no token."""
        if length == 0:
            return self._call(aten.slice.Tensor, buffers[self.names.index("window")], 2, 0, 0)
        return self._call(ops.decompress.default, *buffers, length)

    def _first_use(self, placeholder: Node) -> Node:
        """The first op on the cache: late, so that one layer is dense at a time, and before anything is written."""
        users = {user for node in (placeholder, *self.buffers[placeholder]) for user in node.users}
        return next(node for node in self.graph.nodes if node in users)

    def _logical_size(self, placeholder: Node, dim: int) -> Any:
        size = placeholder.meta["val"].shape[dim]
        if isinstance(size, int):
            return size
        for node, source in self.inputs.items():
            if isinstance(source, Argument) and same_size(node, size):
                return node
        name = f"{placeholder.name}_size_{dim}"
        known = next((n for n in self.inputs if n.name == name), None)
        if known is not None:
            return known
        node = self._add_placeholder(name, Size(self.index[placeholder], dim))
        node.meta["val"] = size
        return node

    # Calling convention

    def _set_output(self) -> list[Output]:
        """Give the graph its results, write mutated inputs back, and say what each result becomes."""
        output = self.graph.output_node()
        nodes: list[Any] = []
        final = {value: base for base, value in self.functional.mutated.items() if base not in self.compressed}
        with self.graph.inserting_before(output):
            for value, base in final.items():
                self._call(aten.copy_.default, base, value)
            outputs = [self._output(final.get(node, node), nodes) for node in self.functional.outputs]
        output.args = (tuple(nodes),)
        return outputs

    def _output(self, node: Any, nodes: list[Any]) -> Output:
        if node in self.compressed:
            return Argument(self.index[node])
        replaced = self.replaced.get(node) if isinstance(node, Node) else None
        if isinstance(replaced, Extended):
            return replaced
        if replaced is None:
            nodes.append(node)
            return Result(len(nodes) - 1)
        first = len(nodes)
        nodes += replaced.buffers
        tokens = self._size(node, replaced.tokens_dim)
        if isinstance(tokens, int):
            return Compressed(first, tokens, replaced.grows, replaced.tokens_dim)
        nodes.append(tokens)
        return Compressed(first, Result(len(nodes) - 1), replaced.grows, replaced.tokens_dim)

    def _drop_placeholders(self) -> None:
        for node in list(self.inputs):
            symbol = isinstance(node.meta.get("val"), torch.SymInt)
            if node in self.compressed or (symbol and not node.users):
                self.graph.erase_node(node)
                del self.inputs[node]
