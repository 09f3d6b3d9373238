"""Masks that are a band around the diagonal, less some columns: causality, sliding windows and padding make such."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from ..graph.calls import is_cast
from ..graph.nodes import is_call
from ..graph.runs import Run, read_run
from ..graph.symbols import same_size

aten = torch.ops.aten
_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_ONES = (aten.ones.default, aten.new_ones.default)
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

    queries, keys: positions, whole numbers one after the other.
    """

    queries: Run
    keys: Run
    less: int

    @property
    def bound(self) -> sympy.Expr | None:
        """Its value, where numbers of the host say so."""
        known = self.queries.start is not None and self.keys.start is not None
        return sympy.expand(self.queries.start - self.keys.start - self.less) if known else None


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


def read_band(mask: Node, queries: Any) -> Band | None:
    """The band that a mask of so many ``queries`` is, None where it is none or that is not known."""
    columns: list[Node] = []
    edges: dict[str, list[Edge]] = {"last": [], "first": []}
    for term in _terms(mask):
        if is_call(term, *_ONES):
            continue
        found = _edge(term) if _has_rows(term) or same_size(queries, 1) else None
        if found is not None:
            edges[found[0]].append(found[1])
        elif not _has_rows(term):
            columns.append(term)
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
    """Which edge of a band a comparison of positions is. The position of a single query has no dimension."""
    if not is_call(term, *_OF_KEYS) or term.kwargs:
        return None
    left, right = map(read_run, term.args)
    if left is None or right is None or {left.dim, right.dim} not in ({-1, -2}, {-1, None}):
        return None
    name, less = (_OF_KEYS if left.dim == -1 else _OF_QUERIES)[term.target]
    queries, keys = (right, left) if left.dim == -1 else (left, right)
    return name, Edge(queries, keys, less)
