"""Writes of new tokens into a cache, and those that put them at the same place in all rows of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graph.calls import is_cast
from ..graph.nodes import is_call
from ..graph.symbols import same_size
from ..graph.views import is_move, read_through, slice_bounds

aten = torch.ops.aten
_INDICES = (torch.int32, torch.int64)
_EXACT = (*_INDICES, torch.float32, torch.float64)  # in which all numbers of tokens and rows are what they are


@dataclass(frozen=True)
class Write:
    """``new`` goes into ``cache``, along dimension ``dim`` of it, at ``position``.

    op: what the report calls it. position: of the first token, an int; of each of L tokens, a tensor [L]; of each token
    of each row of the batch, [B, L] or [1, L]. That of a single token may have any shape. in_part: whether only some
    rows of the batch are written.
    """

    op: str
    cache: Node
    new: Node
    dim: int
    position: Any
    in_part: bool = False

    def is_of_as_many(self, positions: Any) -> bool:
        """Whether each of as many ``positions`` has a token of its own: an assignment repeats a single one."""
        shape = self.new.meta["val"].shape
        return len(shape) == self.cache.meta["val"].dim() and same_size(shape[self.dim], positions)


def index_copy(node: Node) -> Write:
    """``cache.index_copy(dim, position, new)``."""
    cache, dim, position, new = node.args
    return Write("index_copy", cache, new, dim, position)


def index_put(node: Node) -> Write | None:
    """``cache[:, :, position] = new``."""
    cache, indices, new = node.args[:3]
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or accumulates(node) or not is_index(given[0][1]) or given[0][1].meta["val"].dim() != 1:
        return None
    dim, position = given[0]
    write = Write("index_put", cache, with_leading_ones(new), dim, position)
    return write if write.is_of_as_many(position.meta["val"].shape[0]) else None


def accumulates(node: Node) -> bool:
    """Whether an index_put adds to what is there."""
    return bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False))


def is_index(node: Node) -> bool:
    """Whether a tensor holds numbers of elements: a boolean one says which."""
    return node.meta["val"].dtype in _INDICES


def with_leading_ones(new: Node) -> Node:
    """``new`` as the model made it: indexed assignment drops its leading dimensions of size 1."""
    if not is_call(new, aten.view.default):
        return new
    shape, viewed = new.args[0].meta["val"].shape, new.meta["val"].shape
    dropped = len(shape) - len(viewed)
    same = dropped > 0 and all(map(same_size, shape, (*[1] * dropped, *viewed)))
    return new.args[0] if same else new


def slice_write(node: Node) -> Write | None:
    """``cache[:, :, start:end] = new``."""
    cache, new = node.args[:2]
    dim, start, _, step = slice_bounds(node, first=2)
    if is_call(new, aten.copy.default):  # x[a:b] = y copies y into a slice of x
        new = new.args[1]
    size = node.meta["val"].shape[dim]
    if isinstance(start, int) and start < 0:  # from the end
        start = max(start + size, 0) if isinstance(size, int) else None
    return Write("slice write", cache, new, dim, start) if step == 1 and start is not None else None


def reads_back(node: Node) -> Node | None:
    """x, where ``node`` reads the batch rows that ``x`` was just written to."""
    source = node.args[0] if is_call(node, aten.slice.Tensor) else None
    if not is_call(source, aten.slice_scatter.default):
        return None
    same = slice_bounds(node)[0] == 0 and all(
        a == b or same_size(a, b) for a, b in zip(slice_bounds(node), slice_bounds(source, 2), strict=True)
    )
    return source.args[1] if same else None


def counts_along(dim: int, node: Any, size: Any) -> bool:
    """Whether ``node`` counts 0 .. size - 1 along dimension ``dim``, from the end, and is the same along all others."""
    chain: list[Node] = []
    while is_move(node) or is_cast(node):
        if node.meta["val"].dtype not in _EXACT:
            return False
        if not is_cast(node):
            chain.insert(0, node)
        node = node.args[0]
    from_zero = is_call(node, aten.arange.default) or (is_call(node, aten.arange.start) and node.args[0] == 0)
    if not from_zero or node.meta["val"].dtype not in _EXACT or not same_size(node.meta["val"].shape[0], size):
        return False
    read = read_through(chain, node)
    if read is None or read.prefix is not None or len(read.dims) < -dim:
        return False
    sources = ([axis.source for axis in axes] for axes in read.dims)
    counting = {i - len(read.dims): found for i, found in enumerate(sources) if set(found) - {None}}
    return counting == ({} if same_size(size, 1) else {dim: [0]})
