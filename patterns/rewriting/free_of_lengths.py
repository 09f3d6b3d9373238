"""A graph in which sizes that are rounded up do in place of lengths.

Every value keeps its columns: what a true size would have computed stands in the first columns of what a larger one
computes, and what stands behind them reaches nothing but a mask, where attention does not look. An op is checked to
keep to that, or is changed so that it does, or is named as the reason why the graph stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from mustafar_compile import _compat

from ..graph.symbols import same_size
from ..graph.views import is_whole_slice, slice_bounds
from .rounded_sizes import RoundedSizes, is_plain, shape_of, unfit

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


class FreeOfLengths(RoundedSizes):
    """Frees its graph of lengths, in place; use it once."""

    def __init__(self, graph: Graph, numbers: Mapping[sympy.Symbol, Node], values: Node) -> None:
        super().__init__(graph, numbers, values)
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

    def _is_touched(self, node: Node) -> bool:
        if node.op == "placeholder" or isinstance(node.meta.get("val"), torch.SymInt):
            return False  # a number of numbers: what takes it is looked at
        return any(self.changes(x) or self.changing(x) for x in (node, *node.all_input_nodes))

    def _edit(self, node: Node) -> Edit | None:
        """How to change ``node``, None where it may stay."""
        rule = self.rules.get(node.target)
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = self._pointwise
        if rule is None or not all(is_plain(shape_of(node)[dim]) for dim in self.changing(node)):
            raise unfit(node)
        return rule(node)

    # Rules: what changes an op, None where it may stay

    def _pointwise(self, node: Node) -> Edit | None:
        if any(
            not same_size(shape_of(x)[d], shape_of(node)[d - len(shape_of(x))]) for x, d in self._all_changing(node)
        ):
            raise unfit(node)
        if not any(self.changes(x) for x in (*node.args, *node.kwargs.values())):
            return None
        name = node.target._overloadname
        target = getattr(node.target.overloadpacket, _WITH_TENSOR.get(name, name), None)
        others = (*node.args[:1], *node.args[2:], *node.kwargs.values())
        if target is None or "Tensor" not in target._overloadname or any(self.changes(x) for x in others):
            raise unfit(node)
        value = self.value(node, node.args[1])
        return lambda: self.call(target, node.args[0], value(), *node.args[2:], **node.kwargs)

    def _all_changing(self, node: Node) -> list[tuple[Node, int]]:
        return [(x, dim) for x in node.all_input_nodes for dim in self.changing(x)]

    def _view(self, node: Node) -> None:
        """Each size that changes must be there before and after, with as many elements to a place."""
        given, made = (
            [(shape_of(x)[d], math.prod(shape_of(x)[d + 1 :])) for d in self.changing(x)] for x in (node.args[0], node)
        )
        if len(given) != len(made) or not all(map(same_size, chain(*given), chain(*made))):
            raise unfit(node)

    def _arange(self, node: Node) -> Edit | None:
        start, _, step = (*node.args, 1)[:3]
        if not self.changes(start):
            return None
        if step != 1:
            raise unfit(node)
        value, count = self.value(node, start), self.known(node, shape_of(node)[0])
        columns = aten.arange.default
        return lambda: self.call(aten.add.Tensor, self.call(columns, self.number(count), **node.kwargs), value())

    def _full(self, node: Node) -> Edit | None:
        *sizes, filled = node.args
        if not self.changes(filled):
            return None
        value, dtype, shape = self.value(node, filled), node.kwargs.get("dtype"), sizes[0] if sizes else []
        return lambda: self.call(aten.expand.default, self.call(aten._to_copy.default, value(), dtype=dtype), shape)

    def _slice(self, node: Node) -> Edit | None:
        dim, start, end, step = slice_bounds(node)
        x, count = node.args[0], shape_of(node)[dim]
        size = shape_of(x)[dim]
        if is_whole_slice(node) or not any(map(self.changes, (size, start, end))):
            return None
        if same_size(start, 0) and not self.changes(count) and not self.changes(end):
            return None
        if step != 1:
            raise unfit(node)
        value, count = self.value(node, _from_start(start, size)), self.known(node, count)
        return lambda: self.call(aten.index_select.default, x, dim, self.places(value(), count))

    def _slice_scatter(self, node: Node) -> Edit | None:
        dim, start, _, step = slice_bounds(node, first=2)
        x, new = node.args[:2]
        if step != 1 or self.changing(node):
            raise unfit(node)
        value, count = self.value(node, _from_start(start, shape_of(x)[dim])), self.known(node, shape_of(new)[dim])
        if self.changes(count):
            length = self.value(node, count)
            return lambda: self._written(x, dim, value(), length(), new)
        return lambda: self.call(aten.index_copy.default, x, dim, self.places(value(), count), new)

    def _written(self, x: Node, dim: int, start: Any, count: Any, new: Node) -> Node:
        """``x`` with ``count`` columns of ``new``, which has more, from ``start`` on."""
        size, device = self.call(aten.sym_size.int, x, dim), self.values.meta["val"].device
        places = self.call(aten.arange.default, size, dtype=torch.int64, device=device)
        columns = self.call(aten.sub.Tensor, places, start)
        ahead, behind = self.call(aten.lt.Scalar, columns, 0), self.call(aten.ge.Tensor, columns, count)
        kept = self.call(aten.logical_or.default, ahead, behind)
        new = self.call(aten.index_select.default, new, dim, self.call(aten.masked_fill.Scalar, columns, kept, 0))
        kept = self.call(aten.view.default, kept, [-1, *[1] * (len(shape_of(x)) - 1 - dim)])
        return self.call(aten.where.self, kept, x, new)

    def _select(self, node: Node) -> Edit | None:
        x, dim, place = node.args
        size = shape_of(x)[dim]
        if not self.changes(place) and not (self.changes(size) and place < 0):
            return None  # it is the same place in a larger tensor
        value, read = self.value(node, _from_start(place, size)), aten.index_select.default
        return lambda: self.call(aten.squeeze.dim, self.call(read, x, dim, self.places(value(), 1)), dim)

    def _index(self, node: Node) -> Edit | None:
        x, indices = node.args
        sizes = shape_of(x)[: len(indices)]
        edits = [index and self._inside(node, index, size) for index, size in zip(indices, sizes, strict=True)]
        if not any(edits):
            return None
        return lambda: self.call(
            node.target, x, [edit() if edit else index for index, edit in zip(indices, edits, strict=True)]
        )

    def _index_select(self, node: Node) -> Edit | None:
        x, dim, index = node.args
        edit = self._inside(node, index, shape_of(x)[dim])
        return edit and (lambda: self.call(node.target, x, dim, edit()))

    def _embedding(self, node: Node) -> Edit | None:
        table, index, *rest = node.args
        edit = self._inside(node, index, shape_of(table)[0])
        return edit and (lambda: self.call(node.target, table, edit(), *rest))

    def _inside(self, node: Node, index: Node, size: Any) -> Edit | None:
        """``index``, into a dimension of ``size``: 0 behind its true columns, from the true end if negative."""
        changing, end = self.changing(index), self.value(node, size) if self.changes(size) else None
        if not changing and end is None:
            return None
        if index.meta["val"].dtype == torch.bool:
            raise unfit(node)
        return lambda: self._in_true_columns(self._from_true_end(index, end), index, changing)

    def _from_true_end(self, index: Node, end: Callable[[], Any] | None) -> Node:
        if end is None:
            return index
        from_end = self.call(aten.add.Tensor, index, end())
        return self.call(aten.where.self, self.call(aten.lt.Scalar, index, 0), from_end, index)

    def _in_true_columns(self, places: Node, index: Node, changing: Sequence[int]) -> Node:
        shape, device = shape_of(index), index.meta["val"].device
        for dim in changing:
            columns = self.call(aten.arange.default, self.number(shape[dim]), device=device)
            columns = self.call(aten.view.default, columns, [-1, *[1] * (len(shape) - 1 - dim)])
            places = self.true_columns(places, columns, shape[dim])
        return places

    def _attention(self, node: Node) -> None:
        """Only the columns of its mask may change."""
        mask = node.args[_MASK]
        if any(x is not mask or dim != len(shape_of(x)) - 1 for x, dim in self._all_changing(node)):
            raise unfit(node)


def _from_start(place: Any, size: Any) -> Any:
    """A place that counts from the end of ``size`` where it is negative, which the graph is guarded on."""
    number = place.meta["val"] if isinstance(place, Node) else place
    return size + number if _compat.symbols.hint(number) < 0 else number
