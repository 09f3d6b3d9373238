"""Sizes of a graph that are rounded up, and the true ones on the device.

A size that changes from step to step is a plain one, a length and a constant, wherever a tensor has it. A graph may
compute with any sum of lengths.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..graph.nodes import is_tensor, source_line
from ..graph.symbols import expression

aten = torch.ops.aten


class LengthError(Exception):
    """A graph depends on a length in a way that cannot be followed. The text says in which."""


class RoundedSizes:
    """The sizes of ``graph`` that change with lengths, for those who change its ops.

    numbers: for each length a node that holds it, rounded up. values: int64 [len(numbers)], a node with the true ones.
    """

    def __init__(self, graph: Graph, numbers: Mapping[sympy.Symbol, Node], values: Node) -> None:
        self.graph = graph
        self.numbers = numbers
        self.values = values
        self.held = _held(graph) | {symbol: (node, None) for symbol, node in numbers.items()}
        self.computed: dict[sympy.Expr, Any] = {}
        self.replaced: dict[Node, Node] = {}  # nodes that an edit took the place of

    def changes(self, size: Any) -> bool:
        """Whether a size depends on a length."""
        e = expression(size)
        return e is not None and not e.free_symbols.isdisjoint(self.numbers)

    def changing(self, node: Any) -> list[int]:
        """The dimensions of a tensor whose sizes change."""
        return [dim for dim, size in enumerate(shape_of(node)) if self.changes(size)]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """An edit may name nodes that one before it replaced."""
        return self.graph.call_function(target, map_arg(args, lambda node: self.replaced.get(node, node)), kwargs)

    def known(self, node: Node, size: Any) -> Any:
        """``size``, if ``number`` can make it. Raises LengthError otherwise."""
        e = expression(size)
        if e is None or not (e.is_Integer or (is_plain(size) and e.free_symbols <= self.held.keys())):
            raise unfit(node)
        return size

    def number(self, size: Any) -> Any:
        """A plain size, rounded up if it changes."""
        e = expression(size)
        if e.is_Integer:
            return int(e)
        (symbol,) = e.free_symbols
        node, dim = self.held[symbol]
        whole = node if dim is None else self.call(aten.sym_size.int, node, dim)
        return self.call(operator.add, whole, int(e - symbol))

    def value(self, node: Node, size: Any) -> Callable[[], Any]:
        """What makes the true value of a size: an int or a tensor []. Raises LengthError for no sum of lengths."""
        e = expression(size)
        if e is None or not e.as_coefficients_dict().keys() <= {1, *self.numbers}:
            raise unfit(node)
        return lambda: self.true_value(e)

    def true_value(self, e: sympy.Expr) -> Any:
        """A sum of lengths: an int or a tensor []."""
        if e not in self.computed:
            factors = dict(e.as_coefficients_dict())
            total: Any = int(factors.pop(1, 0))
            for symbol, factor in factors.items():
                length = self.call(aten.select.int, self.values, 0, list(self.numbers).index(symbol))
                total = self.call(aten.add.Tensor, self.call(aten.mul.Tensor, length, int(factor)), total)
            self.computed[e] = total
        return self.computed[e]

    def places(self, start: Any, count: Any) -> Node:
        """int64 [count]: as many places from ``start`` on, and 0 where there are none."""
        device = self.values.meta["val"].device
        columns = self.call(aten.arange.default, self.number(count), dtype=torch.int64, device=device)
        places = self.call(aten.add.Tensor, columns, start)
        return self.true_columns(places, columns, count) if self.changes(count) else places

    def true_columns(self, index: Node, columns: Node, size: Any) -> Node:
        """``index`` with 0 in all ``columns`` behind the true ``size``."""
        inside = self.call(aten.lt.Tensor, columns, self.true_value(expression(size)))
        return self.call(aten.where.ScalarOther, inside, index, 0)


def _held(graph: Graph) -> dict[Any, tuple[Node, int | None]]:
    """For each size of an input, symbols above all, that input and its dimension, None where it is the size."""
    held: dict[Any, tuple[Node, int | None]] = {}
    for node in graph.find_nodes(op="placeholder"):
        sizes = enumerate(shape_of(node)) if is_tensor(node) else [(None, node)]
        for dim, size in sizes:
            held.setdefault(expression(size), (node, dim))
    return held


def unfit(node: Node) -> LengthError:
    """The error that names ``node``."""
    what = "a result" if node.op == "output" else str(node.target).removesuffix(".default")
    line = source_line(node)
    return LengthError(f"{what}{f' at {line}' if line else ''} depends on the length")


def shape_of(node: Any) -> Sequence[Any]:
    """The sizes of a tensor, none of anything else."""
    return node.meta["val"].shape if is_tensor(node) else ()


def is_plain(size: Any) -> bool:
    """Whether a size is a symbol and a constant."""
    terms = dict(expression(size).as_coefficients_dict())
    terms.pop(1, None)
    return list(terms.values()) == [1] and all(symbol.is_Symbol for symbol in terms)
