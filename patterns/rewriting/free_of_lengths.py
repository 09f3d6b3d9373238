"""A graph in which sizes that are rounded up do in place of lengths.

Every value keeps its columns: what a true size would have computed stands in the first columns of what a larger one
computes, and what stands behind them reaches nothing but a mask, where attention does not look. An op is checked to
keep to that, or is changed so that it does, or is named as the reason why the graph stays as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mustafar_compile import _compat

from ..graph.nodes import is_tensor, source_line
from ..graph.symbols import expression, same_size
from ..graph.views import is_whole_slice, slice_bounds

aten = torch.ops.aten
ops = torch.ops.mustafar

Edit = Callable[[], Node]

_POINTWISE = {  # that torch does not tag
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.__xor__.Tensor,
    aten._to_copy.default,
    aten.copy.default,
    aten.cumsum.default,  # whose columns follow from the ones ahead of them
    aten.floor_divide.default,
    aten.masked_fill.Tensor,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
}
_OF_SIZES = {  # and of nothing else that could depend on a length
    aten.arange.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.empty.memory_format,
    aten.expand.default,
    aten.new_empty.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones.default,
    aten.permute.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.zeros.default,
}
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_WITH_TENSOR = {"Scalar": "Tensor", "Tensor_Scalar": "Tensor_Tensor"}
_MASK = 8
"""Which argument of decode_attention it is."""


class LengthError(Exception):
    """A graph depends on a length in a way that cannot be followed. The text says in which."""


class FreeOfLengths:
    """Frees ``graph`` of lengths, in place; use it once.

    numbers: for each length a node that holds it, rounded up. values: int64 [len(numbers)], a node with the true ones.
    """

    def __init__(self, graph: Graph, numbers: Mapping[sympy.Symbol, Node], values: Node) -> None:
        self.graph = graph
        self.numbers = numbers
        self.values = values
        self.held = _held(graph) | {symbol: (node, None) for symbol, node in numbers.items()}
        self.computed: dict[sympy.Expr, Any] = {}
        self.replaced: dict[Node, Node] = {}
        self.rules: dict[Any, Callable[[Node], Edit | None]] = {
            **dict.fromkeys(_POINTWISE, self._pointwise),
            **dict.fromkeys(_OF_SIZES, lambda node: None),
            **dict.fromkeys(_VIEWS, self._view),
            aten.arange.start: self._arange,
            aten.arange.start_step: self._arange,
            aten.full.default: self._full,
            aten.scalar_tensor.default: self._full,
            aten.slice.Tensor: self._slice,
            aten.slice_scatter.default: self._slice_scatter,
            aten.select.int: self._select,
            aten.index.Tensor: self._index,
            aten.index_select.default: self._index_select,
            aten.gather.default: self._index_select,
            aten.embedding.default: self._embedding,
            ops.decode_attention.default: self._attention,
        }

    def run(self) -> None:
        """Raises LengthError, before anything is changed, for an op that no rule fits."""
        touched = [node for node in self.graph.nodes if self._is_touched(node)]
        for node, edit in [(node, self._edit(node)) for node in touched]:
            if edit is not None:
                with self.graph.inserting_before(node):
                    new = edit()
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
                self.graph.erase_node(node)
                self.replaced[node] = new

    # What depends on lengths

    def _changes(self, size: Any) -> bool:
        e = expression(size)
        return e is not None and not e.free_symbols.isdisjoint(self.numbers)

    def _changing(self, node: Any) -> list[int]:
        """The dimensions of a tensor whose sizes change."""
        return [dim for dim, size in enumerate(_shape(node)) if self._changes(size)]

    def _is_touched(self, node: Node) -> bool:
        if node.op == "placeholder" or isinstance(node.meta.get("val"), torch.SymInt):
            return False  # a number of numbers: what takes it is looked at
        return any(self._changes(x) or self._changing(x) for x in (node, *node.all_input_nodes))

    def _edit(self, node: Node) -> Edit | None:
        """How to change ``node``, None where it may stay."""
        rule = self.rules.get(node.target)
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = self._pointwise
        if rule is None or not all(_is_plain(_shape(node)[dim]) for dim in self._changing(node)):
            raise _unfit(node)
        return rule(node)

    # Rounded sizes and true values

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """An edit may name nodes that one before it replaced."""
        return self.graph.call_function(target, map_arg(args, lambda node: self.replaced.get(node, node)), kwargs)

    def _known(self, node: Node, size: Any) -> Any:
        """``size``, if ``_number`` can make it. Raises LengthError otherwise."""
        e = expression(size)
        if e is None or not (e.is_Integer or (_is_plain(size) and e.free_symbols <= self.held.keys())):
            raise _unfit(node)
        return size

    def _number(self, size: Any) -> Any:
        """A plain size, rounded up if it changes."""
        e = expression(size)
        if e.is_Integer:
            return int(e)
        (symbol,) = e.free_symbols
        node, dim = self.held[symbol]
        whole = node if dim is None else self._call(aten.sym_size.int, node, dim)
        return self._call(operator.add, whole, int(e - symbol))

    def _value(self, node: Node, size: Any) -> Callable[[], Any]:
        """What makes the true value of a size: an int or a tensor []. Raises LengthError for no sum of lengths."""
        e = expression(size)
        if e is None or not e.as_coefficients_dict().keys() <= {1, *self.numbers}:
            raise _unfit(node)
        return lambda: self._computed(e)

    def _computed(self, e: sympy.Expr) -> Any:
        if e not in self.computed:
            factors = dict(e.as_coefficients_dict())
            total: Any = int(factors.pop(1, 0))
            for symbol, factor in factors.items():
                length = self._call(aten.select.int, self.values, 0, list(self.numbers).index(symbol))
                total = self._call(aten.add.Tensor, self._call(aten.mul.Tensor, length, int(factor)), total)
            self.computed[e] = total
        return self.computed[e]

    def _places(self, start: Any, count: Any) -> Node:
        """int64 [count]: as many places from ``start`` on, and 0 where there are none."""
        device = self.values.meta["val"].device
        columns = self._call(aten.arange.default, self._number(count), dtype=torch.int64, device=device)
        places = self._call(aten.add.Tensor, columns, start)
        return self._true_columns(places, columns, count) if self._changes(count) else places

    def _true_columns(self, index: Node, columns: Node, size: Any) -> Node:
        """``index`` with 0 in all ``columns`` behind the true ``size``."""
        inside = self._call(aten.lt.Tensor, columns, self._computed(expression(size)))
        return self._call(aten.where.ScalarOther, inside, index, 0)

    # Rules: what changes an op, None where it may stay

    def _pointwise(self, node: Node) -> Edit | None:
        if any(not same_size(_shape(x)[d], _shape(node)[d - len(_shape(x))]) for x, d in self._all_changing(node)):
            raise _unfit(node)
        if not any(self._changes(x) for x in (*node.args, *node.kwargs.values())):
            return None
        name = node.target._overloadname
        target = getattr(node.target.overloadpacket, _WITH_TENSOR.get(name, name), None)
        others = (*node.args[:1], *node.args[2:], *node.kwargs.values())
        if target is None or "Tensor" not in target._overloadname or any(self._changes(x) for x in others):
            raise _unfit(node)
        value = self._value(node, node.args[1])
        return lambda: self._call(target, node.args[0], value(), *node.args[2:], **node.kwargs)

    def _all_changing(self, node: Node) -> list[tuple[Node, int]]:
        return [(x, dim) for x in node.all_input_nodes for dim in self._changing(x)]

    def _view(self, node: Node) -> None:
        """Each size that changes must be there before and after, with as many elements to a place."""
        given, made = (
            [(_shape(x)[d], math.prod(_shape(x)[d + 1 :])) for d in self._changing(x)] for x in (node.args[0], node)
        )
        if len(given) != len(made) or not all(map(same_size, chain(*given), chain(*made))):
            raise _unfit(node)

    def _arange(self, node: Node) -> Edit | None:
        start, _, step = (*node.args, 1)[:3]
        if not self._changes(start):
            return None
        if step != 1:
            raise _unfit(node)
        value, count = self._value(node, start), self._known(node, _shape(node)[0])
        columns = aten.arange.default
        return lambda: self._call(aten.add.Tensor, self._call(columns, self._number(count), **node.kwargs), value())

    def _full(self, node: Node) -> Edit | None:
        *sizes, filled = node.args
        if not self._changes(filled):
            return None
        value, dtype, shape = self._value(node, filled), node.kwargs.get("dtype"), sizes[0] if sizes else []
        return lambda: self._call(aten.expand.default, self._call(aten._to_copy.default, value(), dtype=dtype), shape)

    def _slice(self, node: Node) -> Edit | None:
        dim, start, end, step = slice_bounds(node)
        x, count = node.args[0], _shape(node)[dim]
        size = _shape(x)[dim]
        if is_whole_slice(node) or not any(map(self._changes, (size, start, end))):
            return None
        if same_size(start, 0) and not self._changes(count) and not self._changes(end):
            return None
        if step != 1:
            raise _unfit(node)
        value, count = self._value(node, _from_start(start, size)), self._known(node, count)
        return lambda: self._call(aten.index_select.default, x, dim, self._places(value(), count))

    def _slice_scatter(self, node: Node) -> Edit | None:
        dim, start, _, step = slice_bounds(node, first=2)
        x, new = node.args[:2]
        if step != 1 or self._changing(node):
            raise _unfit(node)
        value, count = self._value(node, _from_start(start, _shape(x)[dim])), self._known(node, _shape(new)[dim])
        if self._changes(count):
            length = self._value(node, count)
            return lambda: self._written(x, dim, value(), length(), new)
        return lambda: self._call(aten.index_copy.default, x, dim, self._places(value(), count), new)

    def _written(self, x: Node, dim: int, start: Any, count: Any, new: Node) -> Node:
        """``x`` with ``count`` columns of ``new``, which has more, from ``start`` on."""
        size, device = self._call(aten.sym_size.int, x, dim), self.values.meta["val"].device
        places = self._call(aten.arange.default, size, dtype=torch.int64, device=device)
        columns = self._call(aten.sub.Tensor, places, start)
        ahead, behind = self._call(aten.lt.Scalar, columns, 0), self._call(aten.ge.Tensor, columns, count)
        kept = self._call(aten.logical_or.default, ahead, behind)
        new = self._call(aten.index_select.default, new, dim, self._call(aten.masked_fill.Scalar, columns, kept, 0))
        kept = self._call(aten.view.default, kept, [-1, *[1] * (len(_shape(x)) - 1 - dim)])
        return self._call(aten.where.self, kept, x, new)

    def _select(self, node: Node) -> Edit | None:
        x, dim, place = node.args
        size = _shape(x)[dim]
        if not self._changes(place) and not (self._changes(size) and place < 0):
            return None  # it is the same place in a larger tensor
        value, read = self._value(node, _from_start(place, size)), aten.index_select.default
        return lambda: self._call(aten.squeeze.dim, self._call(read, x, dim, self._places(value(), 1)), dim)

    def _index(self, node: Node) -> Edit | None:
        x, indices = node.args
        sizes = _shape(x)[: len(indices)]
        edits = [index and self._inside(node, index, size) for index, size in zip(indices, sizes, strict=True)]
        if not any(edits):
            return None
        return lambda: self._call(
            node.target, x, [edit() if edit else index for index, edit in zip(indices, edits, strict=True)]
        )

    def _index_select(self, node: Node) -> Edit | None:
        x, dim, index = node.args
        edit = self._inside(node, index, _shape(x)[dim])
        return edit and (lambda: self._call(node.target, x, dim, edit()))

    def _embedding(self, node: Node) -> Edit | None:
        table, index, *rest = node.args
        edit = self._inside(node, index, _shape(table)[0])
        return edit and (lambda: self._call(node.target, table, edit(), *rest))

    def _inside(self, node: Node, index: Node, size: Any) -> Edit | None:
        """``index``, into a dimension of ``size``: 0 behind its true columns, from the true end if negative."""
        changing, end = self._changing(index), self._value(node, size) if self._changes(size) else None
        if not changing and end is None:
            return None
        if index.meta["val"].dtype == torch.bool:
            raise _unfit(node)
        return lambda: self._in_true_columns(self._from_true_end(index, end), index, changing)

    def _from_true_end(self, index: Node, end: Callable[[], Any] | None) -> Node:
        if end is None:
            return index
        from_end = self._call(aten.add.Tensor, index, end())
        return self._call(aten.where.self, self._call(aten.lt.Scalar, index, 0), from_end, index)

    def _in_true_columns(self, places: Node, index: Node, changing: Sequence[int]) -> Node:
        shape, device = _shape(index), index.meta["val"].device
        for dim in changing:
            columns = self._call(aten.arange.default, self._number(shape[dim]), device=device)
            columns = self._call(aten.view.default, columns, [-1, *[1] * (len(shape) - 1 - dim)])
            places = self._true_columns(places, columns, shape[dim])
        return places

    def _attention(self, node: Node) -> None:
        """Only the columns of its mask may change."""
        mask = node.args[_MASK]
        if any(x is not mask or dim != len(_shape(x)) - 1 for x, dim in self._all_changing(node)):
            raise _unfit(node)


def _held(graph: Graph) -> dict[Any, tuple[Node, int | None]]:
    """For each size of an input, symbols above all, that input and its dimension, None where it is the size."""
    held: dict[Any, tuple[Node, int | None]] = {}
    for node in graph.find_nodes(op="placeholder"):
        sizes = enumerate(_shape(node)) if is_tensor(node) else [(None, node)]
        for dim, size in sizes:
            held.setdefault(expression(size), (node, dim))
    return held


def _unfit(node: Node) -> LengthError:
    """The error that names ``node``."""
    what = "a result" if node.op == "output" else str(node.target).removesuffix(".default")
    line = source_line(node)
    return LengthError(f"{what}{f' at {line}' if line else ''} depends on the length")


def _shape(node: Any) -> Sequence[Any]:
    return node.meta["val"].shape if is_tensor(node) else ()


def _is_plain(size: Any) -> bool:
    """Whether a size is a symbol and a constant."""
    terms = dict(expression(size).as_coefficients_dict())
    terms.pop(1, None)
    return list(terms.values()) == [1] and all(symbol.is_Symbol for symbol in terms)


def _from_start(place: Any, size: Any) -> Any:
    """A place that counts from the end of ``size`` where it is negative, which the graph is guarded on."""
    number = place.meta["val"] if isinstance(place, Node) else place
    return size + number if _compat.hint(number) < 0 else number
