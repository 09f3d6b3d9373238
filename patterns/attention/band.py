"""Masks that are a band around the diagonal, less some columns: causality, sliding windows and padding make such."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from ..graph.calls import is_cast
from ..graph.nodes import is_call, is_single, is_tensor
from ..graph.symbols import expression, same_size
from ..graph.views import is_move, read_through

aten = torch.ops.aten
_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_ONES = (aten.ones.default, aten.new_ones.default)
_ARANGES = (aten.arange.default, aten.arange.start)
_OF_KEYS = {  # what "keys op queries" says: which edge of the band, and what it is less than the difference of starts
    aten.le.Tensor: ("last", 0),
    aten.lt.Tensor: ("last", 1),
    aten.gt.Tensor: ("first", 0),
    aten.ge.Tensor: ("first", 1),
}
_OF_QUERIES = {  # what "queries op keys" says
    aten.ge.Tensor: ("last", 0),
    aten.gt.Tensor: ("last", 1),
    aten.lt.Tensor: ("first", 0),
    aten.le.Tensor: ("first", 1),
}


@dataclass(frozen=True)
class Edge:
    """A bound on j - i for key j and query i: the first of ``queries`` less the first of ``keys`` and ``less``.

    queries, keys: positions, whole numbers one after the other. bound: its value, where numbers of the host say so.
    """

    queries: Node
    keys: Node
    less: int
    bound: sympy.Expr | None


@dataclass(frozen=True)
class Band:
    """A mask that admits key j to query i where ``first`` < j - i <= ``last`` and all of ``columns`` admit j.

    first: None without a sliding window. columns: boolean, with one row for all queries.
    """

    last: Edge
    first: Edge | None
    columns: tuple[Node, ...]

    @property
    def begins(self) -> bool:
        """Whether query i is known to see keys 0 to i, but for what columns leave out."""
        return self.first is None and self.last.bound == 0


def read_band(mask: Node) -> Band | None:
    """The band that a mask is, None where it is none or that is not known."""
    columns: list[Node] = []
    edges: dict[str, list[Edge]] = {"last": [], "first": []}
    for term in _terms(mask):
        if is_call(term, *_ONES):
            continue
        if not _has_rows(term):
            columns.append(term)
        elif (found := _edge(term)) is not None:
            edges[found[0]].append(found[1])
        else:
            return None
    if len(edges["last"]) != 1 or len(edges["first"]) > 1:
        return None
    return Band(edges["last"][0], next(iter(edges["first"]), None), tuple(columns))


def _terms(mask: Node) -> Iterator[Node]:
    """What must hold together for a mask to admit a key."""
    if is_call(mask, *_AND):
        for operand in mask.args:
            yield from _terms(operand)
    elif _broadcasts(mask):
        yield from _terms(mask.args[0])
    else:
        yield mask


def _broadcasts(mask: Node) -> bool:
    """Whether an op does no more than broadcasting does, or moves a mask to a device."""
    if is_call(mask, aten.unsqueeze.default):
        at = mask.args[1] % mask.meta["val"].dim()
        return all(same_size(size, 1) for size in mask.meta["val"].shape[:at])
    return is_call(mask, aten.expand.default) or (is_cast(mask) and mask.args[0].meta["val"].dtype == torch.bool)


def _has_rows(term: Node) -> bool:
    return not all(same_size(size, 1) for size in term.meta["val"].shape[-2:-1])


def _edge(term: Node) -> tuple[str, Edge] | None:
    """Which edge of a band a comparison of positions is."""
    if not is_call(term, *_OF_KEYS) or term.kwargs:
        return None
    left, right = map(_run, term.args)
    if left is None or right is None or {left.dim, right.dim} != {-1, -2}:
        return None
    name, less = (_OF_KEYS if left.dim == -1 else _OF_QUERIES)[term.target]
    queries, keys = (left, right) if left.dim == -2 else (right, left)
    known = queries.start is not None and keys.start is not None
    return name, Edge(queries.node, keys.node, less, sympy.expand(queries.start - keys.start - less) if known else None)


@dataclass(frozen=True)
class _Run:
    """Whole numbers that go up by one along one dimension. dim: counted from the last. start: None where unknown."""

    node: Node
    dim: int
    start: sympy.Expr | None


def _run(numbers: Any) -> _Run | None:
    """The run that a tensor is, None where it is none or that is not known."""
    node, start = numbers, sympy.Integer(0)
    moves: list[Node] = []
    while not is_call(node, *_ARANGES):
        if _shifts(node):
            start = _moved(start, node.args[1], 1 if node.target is aten.add.Tensor else -1)
        elif isinstance(node, Node) and is_move(node):
            moves.insert(0, node)
        else:
            return None
        node = node.args[0]
    read = None if node.meta["val"].is_floating_point() else read_through(moves, node)
    along = [] if read is None else [dim for dim, axes in enumerate(read.dims) if any(a.source == 0 for a in axes)]
    if read is None or len(along) != 1 or len(read.dims[along[0]]) != 1:
        return None
    start = _moved(start, 0 if node.target is aten.arange.default else node.args[0], 1)
    return _Run(numbers, along[0] - len(read.dims), start)


def _moved(start: sympy.Expr | None, by: Any, sign: int) -> sympy.Expr | None:
    number = expression(by)
    return None if start is None or number is None else start + sign * number


def _shifts(node: Any) -> bool:
    """Whether a sum or a difference moves all numbers of a tensor by one, which may be on the device."""
    if not is_call(node, aten.add.Tensor, aten.sub.Tensor) or node.kwargs or not is_tensor(node.args[0]):
        return False
    numbers, by = node.args
    return (is_single(by) or expression(by) is not None) and _rank(numbers) == _rank(node)


def _rank(node: Node) -> int:
    return node.meta["val"].dim()
