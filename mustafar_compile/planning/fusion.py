"""How much memory a graph needs that Inductor compiles, from the graph alone.

A model of what Inductor does, in the order of the graph:

- Elementwise ops, and what Inductor makes elementwise (copies, lookups, normalizations), are computed where their
  result is read. It becomes a buffer only if something else reads it: a matrix product, attention, an op of ours, any
  op that is not known here, the caller. Or if it is read more than once and computed from more than four buffers
  (``realize_reads_threshold`` of Inductor's config), or from more than eight. So a residual stream stays unsummed over
  some layers.
- All other ops make buffers. A buffer stands until the last kernel that reads it.
- Elementwise kernels that read the same are one kernel, at the place of the first.
- An elementwise kernel may write in the place of what it reads for the last time. But Inductor also keeps free buffers
  for later ones of their size, as long as it expects no higher peak than it would have without such places. So the true
  peak lies between the two, and ``KEPT`` says where.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Interpreter, Node

from .. import _compat
from ..lowering import ops
from ..patterns.graph.symbols import expression

Buffer = int
"""Memory of a value, by the number of its storage."""

KEPT = sympy.Rational(2, 3)
"""The share of places that could be written again and stand for nothing. ``benchmarks/RESULTS.md`` has 0.40 to 0.84."""

_READS, _MOST_READS = 4, 8

aten = torch.ops.aten
_ELEMENTWISE = {  # beside the ops that torch tags so
    aten._softmax, aten._to_copy, aten.arange, aten.cat, aten.constant_pad_nd, aten.contiguous, aten.dropout,
    aten.embedding, aten.full, aten.full_like, aten.gather, aten.glu, aten.index, aten.index_select, aten.layer_norm,
    aten.native_dropout, aten.native_layer_norm, aten.ones, aten.ones_like, aten.repeat, aten.repeat_interleave,
    aten.reshape, aten.rms_norm, aten.softmax, aten.stack, aten.tril, aten.triu, aten.zeros, aten.zeros_like,
}  # fmt: skip


class UnknownMemoryError(Exception):
    """No formula is found for a graph."""


@dataclass(frozen=True)
class _Kernel:
    """What makes buffers of others. elementwise: so that it can write in the place of what it reads."""

    makes: list[Buffer]
    reads: frozenset[Buffer]
    elementwise: bool


def peak(gm: GraphModule, inputs: Sequence[Any], symbols: Mapping[int, sympy.Symbol]) -> sympy.Expr:
    """The most bytes that stand at one time beside the inputs and the cache that is returned, by ``symbols``.

    gm: a graph of ATen, as the backend gives it to ``compile_fx``. inputs: fake tensors and symbolic sizes. symbols: by
    the number that a symbolic size was traced with, what it stands for. The cache is what ``compress`` makes and each
    result of four dims. Raises UnknownMemoryError for other symbolic sizes and for a graph in the graph, sympy's
    PolynomialError where bytes are no polynomial, and what an op raises that wants to know a size.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = [node.meta.get("example_value", x) for node, x in zip(placeholders, inputs, strict=True)]
    values = _Values(gm)
    with _compat.tracing.fake_results(inputs):
        values.run(*inputs)
    meant = _stand_for(inputs, symbols)
    sizes = {x: _polynomial(values.size(x), meant, tuple(symbols.values())) for x in values.made}
    nothing = sympy.Poly(0, *symbols.values())
    moments = set(_moments(_kernels(values), sizes, values.returned, nothing))
    most = [m for m in moments if not any(other != m and _at_least(other, m) for other in moments)]
    return sympy.Max(0, *(m.termwise(lambda _, share: sympy.ceiling(share)).as_expr() for m in most))


def _stand_for(inputs: Iterable[Any], symbols: Mapping[int, sympy.Symbol]) -> dict[sympy.Symbol, sympy.Symbol]:
    """What the symbols stand for that the sizes of the inputs are."""
    given = [size for x in inputs for size in (x.shape if isinstance(x, torch.Tensor) else [x])]
    traced = [size for size in given if isinstance(size, torch.SymInt)]
    known = {_compat.symbols.symbolic_expression(size): symbols.get(_compat.symbols.hint(size)) for size in traced}
    return {symbol: meant for symbol, meant in known.items() if symbol.is_Symbol and meant is not None}


def _polynomial(
    size: int | torch.SymInt, meant: Mapping[sympy.Symbol, sympy.Symbol], symbols: Sequence[sympy.Symbol]
) -> sympy.Poly:
    found = sympy.sympify(expression(size)).subs(meant)
    if not found.free_symbols <= set(symbols):
        raise UnknownMemoryError(f"{found} bytes are made, which are known by {symbols} alone")
    return sympy.Poly(found, *symbols)


class _Values(Interpreter):
    """Runs a graph and notes the buffers of its values.

    tensors: of each node. made: what nodes make, the rest is given. cache, returned: buffers that are no activations,
    and those that outlive the graph.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.tensors: dict[Node, list[torch.Tensor]] = {}
        self.made: dict[Buffer, torch.Tensor] = {}
        self.makes: dict[Node, list[Buffer]] = {}
        self.passed_on: dict[Buffer, Buffer] = {}
        self.cache: set[Buffer] = set()
        self.returned: set[Buffer] = set()

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, GraphModule):
            raise UnknownMemoryError(f"{n.target} is a graph in the graph")
        self.tensors[n] = [x for x in _compat.tensors.tree_leaves(result) if isinstance(x, torch.Tensor)]
        if n.op == "output":
            self.returned = set(self.of(n))
            self.cache |= {self._buffer(x) for x in self.tensors[n] if x.dim() == 4}
        elif n.op == "call_function":
            self._note(n)
        return result

    def of(self, node: Node) -> list[Buffer]:
        """The buffers that a node's value is in."""
        return list(dict.fromkeys(map(self._buffer, self.tensors[node])))

    def read_by(self, node: Node) -> set[Buffer]:
        """The buffers that a node is given."""
        return {buffer for argument in node.all_input_nodes for buffer in self.of(argument)}

    def size(self, buffer: Buffer) -> int | torch.SymInt:
        """Bytes, of the cache none."""
        x = self.made[buffer]
        return 0 if buffer in self.cache else x.numel() * x.dtype.itemsize

    def _buffer(self, x: torch.Tensor) -> Buffer:
        number = _compat.memory.storage_number(x)
        return self.passed_on.get(number, number)

    def _note(self, n: Node) -> None:
        given = self.read_by(n)
        results = {self._buffer(x): x for x in self.tensors[n]}
        new = {buffer: x for buffer, x in results.items() if buffer not in given}
        joined = [x for node in n.all_input_nodes for x in self.tensors[node] if not _is_empty(x)]
        if n.target is aten.cat.default and len(joined) == 1:  # with nothing, as the first tokens of a growing cache
            self.passed_on |= dict.fromkeys(new, self._buffer(joined[0]))
            return
        if new:
            self.made |= new
            self.makes[n] = list(new)
        if n.target is ops.compress:
            self.cache |= set(new)


def _is_empty(x: torch.Tensor) -> bool:
    return any(size == 0 for size in x.shape if isinstance(size, int))


def _kernels(values: _Values) -> list[_Kernel]:
    """In the order of the graph, but elementwise ones that read the same are one, where the first of them is."""
    kernels: list[_Kernel] = []
    not_made: dict[Buffer, frozenset[Buffer]] = {}  # what is computed where it is read, and from what
    readers = _readers(values)
    for node, makes in values.makes.items():
        reads = frozenset[Buffer]().union(*(not_made.get(x, {x}) for x in values.read_by(node)))
        elementwise = _is_elementwise(node)
        users = [user for buffer in makes for user in readers[buffer]]
        few = len(reads) <= (_READS if len(users) > 1 else _MOST_READS)
        if elementwise and few and all(map(_fuses, users)) and not values.returned.intersection(makes):
            not_made |= dict.fromkeys(makes, reads)
            continue
        made = reads & values.made.keys()
        same = next((k for k in kernels if elementwise and k.elementwise and made and k.reads == made), None)
        if same is None:
            kernels.append(_Kernel(list(makes), made, elementwise))
        else:
            same.makes.extend(makes)
    return kernels


def _readers(values: _Values) -> dict[Buffer, list[Node]]:
    """The nodes that read a buffer, without views of it."""
    readers: dict[Buffer, list[Node]] = defaultdict(list)
    for node in values.tensors:
        for buffer in values.read_by(node) - set(values.of(node)):
            readers[buffer].append(node)
    return readers


def _is_elementwise(node: Node) -> bool:
    return _has_tag(node, torch.Tag.pointwise) or getattr(node.target, "overloadpacket", None) in _ELEMENTWISE


def _fuses(node: Node) -> bool:
    """Whether it computes by itself what it reads."""
    return _is_elementwise(node) or _has_tag(node, torch.Tag.reduction)


def _has_tag(node: Node, tag: torch.Tag) -> bool:
    return tag in getattr(node.target, "tags", ())


def _moments(
    kernels: Sequence[_Kernel], sizes: Mapping[Buffer, sympy.Poly], returned: Collection[Buffer], nothing: sympy.Poly
) -> Iterator[sympy.Poly]:
    """What stands while each kernel runs."""
    last = {buffer: i for i, kernel in enumerate(kernels) for buffer in (*kernel.makes, *kernel.reads)}
    live = nothing
    for i, kernel in enumerate(kernels):
        freed = [sizes[x] for x in kernel.reads if last[x] == i and x not in returned]
        unread = [sizes[x] for x in kernel.makes if last[x] == i and x not in returned]
        made = [sizes[x] for x in kernel.makes]
        places = list((Counter(freed) & Counter(made)).elements()) if kernel.elementwise else []
        yield live + sum(made, nothing) - (1 - KEPT) * sum(places, nothing)
        live += sum(made, nothing) - sum((*freed, *unread), nothing)


def _at_least(a: sympy.Poly, b: sympy.Poly) -> bool:
    """Whether a is nowhere smaller than b, as far as coefficients tell."""
    return all(x >= 0 for x in (a - b).coeffs())
