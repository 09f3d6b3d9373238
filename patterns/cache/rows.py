"""Writes that put the new tokens of each row of the batch at a position of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..graph.calls import call_before
from ..graph.nodes import computed_alike, is_call, is_tensor
from ..graph.symbols import same_size
from ..graph.views import is_move, read_through, slice_bounds
from .write import (
    Write,
    accumulates,
    counts_along,
    index_copy,
    index_put,
    is_index,
    reads_back,
    slice_write,
    with_leading_ones,
)

aten = torch.ops.aten
_OF_ONE_ROW = {
    aten.index_copy.default: index_copy,
    aten.index_put.default: index_put,
    aten.slice_scatter.default: slice_write,
}


def of_rows(position: Node, place: Node) -> Node:
    """``position``, in which only the rows of the batch differ, as [B, 1]; made before ``place``."""
    return call_before(place, aten.reshape.default, position, [-1, 1])


def _of_tokens(position: Node, place: Node) -> Node:
    """``position``, which is the same for all rows of the batch, as [1, L]."""
    return call_before(place, aten.reshape.default, position, [1, -1])


def _of_as_many(write: Write) -> Write | None:
    """``write``, if it has a position for each of its tokens."""
    return write if write.is_of_as_many(write.position.meta["val"].shape[1]) else None


def indexed_by_row(node: Node) -> Write | None:
    """``cache[rows, :, position] = new`` or ``cache[rows, position] = new``, ``rows`` being all there are."""
    cache, indices, new = node.args[:3]
    given = {dim: index for dim, index in enumerate(indices) if index is not None}
    if list(given) not in ([0, 1], [0, 2]) or accumulates(node):
        return None
    (_, rows), (dim, position) = given.items()
    rank, new = max(index.meta["val"].dim() for index in (rows, position)), with_leading_ones(new)
    batch, shape = cache.meta["val"].shape[0], new.meta["val"].shape
    counted = rank in (1, 2) and counts_along(-rank, rows, batch)
    if not counted or not is_index(position) or len(shape) != rank + 2 or not same_size(shape[0], batch):
        return None
    if rank == 1:  # one token a row
        position, new = of_rows(position, node), call_before(node, aten.unsqueeze.default, new, 1)
    elif position.meta["val"].dim() < 2:
        position = _of_tokens(position, node)
    new = new if dim == 1 else call_before(node, aten.transpose.int, new, 1, 2)
    return _of_as_many(Write("index_put", cache, new, dim, position))


def scattered(node: Node) -> Write | None:
    """``cache.scatter(dim, index, new)``, where ``index`` is the same for all heads and channels."""
    cache, dim, index, new = node.args
    rank, shape = cache.meta["val"].dim(), index.meta["val"].shape
    if rank != 4 or dim % rank not in (1, 2) or not all(map(same_size, shape, new.meta["val"].shape)):
        return None
    dim, whole = dim % rank, same_size(shape[0], cache.meta["val"].shape[0])
    chain: list[Node] = []
    while is_move(index) and index.meta["val"].dim() > 2:
        chain.insert(0, index)
        index = index.args[0]
    read = read_through(chain, index)
    if not whole or read is None or read.prefix is not None or index.meta["val"].dim() > 2:
        return None
    rows, tokens, *others = ([axis.source for axis in read.dims[i]] for i in (0, dim, 3 - dim, 3))
    if set(others[0] + others[1]) - {None} or max(len(rows), len(tokens)) > 1:
        return None
    if not set(rows) - {None}:
        index = _of_tokens(index, node)
    elif not set(tokens) - {None}:
        index = of_rows(index, node)
    elif rows > tokens:
        return None
    return _of_as_many(Write("scatter", cache, new, dim, index))


def written_one_by_one(node: Node) -> Write | None:
    """A write of each row of the batch by itself, in any order, or of a single one of them."""
    batch, place = node.meta["val"].shape[0], node
    writes: list[tuple[Any, Write]] = []
    while (found := _write_of_one(node)) is not None:
        writes.append(found)
        node = reads_back(found[1].cache) or found[1].cache
    if len(writes) == 1 and not same_size(batch, 1):
        return _in_part(writes[0][1], place)
    if not isinstance(batch, int) or any(number not in range(-batch, batch) for number, _ in writes):
        return None
    by_row = {number % batch: write for number, write in writes}
    return _joined(node, [by_row[row] for row in range(batch)], place) if len(writes) == len(by_row) == batch else None


def _in_part(write: Write, place: Node) -> Write:
    new = write.new
    new = call_before(place, aten.unsqueeze.default, new, 0) if new.meta["val"].dim() == 3 else new
    return replace(write, new=new, in_part=True)


def _joined(cache: Node, writes: Sequence[Write], place: Node) -> Write | None:
    """The write into ``cache`` that those of its rows are together."""
    kinds = {(write.op, write.dim) for write in writes}
    new, positions = [write.new for write in writes], [write.position for write in writes]
    of_tokens = all(is_tensor(position) and position.meta["val"].dim() == 1 for position in positions)
    if len(kinds) > 1 or not of_tokens or not _alike(new) or not _alike(positions):
        return None
    together = {"new": _together(new, place), "position": _together(positions, place)}
    return _of_as_many(replace(writes[0], cache=cache, **together))


def _write_of_one(node: Node) -> tuple[Any, Write] | None:
    """The number of the row of the batch that ``node`` writes, and the write into the cache as it was before."""
    number = _row_taken(node, 2) if is_call(node, aten.select_scatter.default, aten.slice_scatter.default) else None
    row = node.args[1] if number is not None else None
    write = _OF_ONE_ROW[row.target](row) if is_call(row, *_OF_ONE_ROW) else None
    if write is None or not is_call(write.cache, aten.select.int, aten.slice.Tensor):
        return None
    same = computed_alike((write.cache.args[0], _row_taken(write.cache, 1)), (node.args[0], number))
    rank = row.meta["val"].dim()
    if not same or write.new.meta["val"].dim() != rank:
        return None
    return number, replace(write, cache=node.args[0], dim=write.dim % rank + 4 - rank)


def _row_taken(node: Node, first: int) -> Any | None:
    """The number of the row of the batch that an op takes, as its arguments from ``first`` on say; None for others."""
    if node.target in (aten.select.int, aten.select_scatter.default):
        dim, number = node.args[first:]
        return number if dim == 0 else None
    dim, start, _, step = slice_bounds(node, first)
    rows = (node if first == 1 else node.args[1]).meta["val"].shape[0]
    return start if same_size(rows, 1) and (dim, step) == (0, 1) else None


def _alike(parts: Sequence[Node]) -> bool:
    shapes = [part.meta["val"].shape for part in parts]
    return all(len(shape) == len(shapes[0]) and all(map(same_size, shape, shapes[0])) for shape in shapes)


def _together(parts: Sequence[Node], place: Node) -> Node:
    """What the rows of the batch have one by one as a tensor of all."""
    whole = parts[0].args[0] if is_call(parts[0], aten.select.int) else None
    in_order = all(is_call(x, aten.select.int) and x.args == (whole, 0, i) for i, x in enumerate(parts))
    if in_order and same_size(whole.meta["val"].shape[0], len(parts)):
        return whole
    join = aten.cat.default if parts[0].meta["val"].dim() == 4 else aten.stack.default
    return call_before(place, join, list(parts))


def names_rows(node: Node) -> bool:
    """Whether ``node`` writes rows of the batch that it names."""
    if is_call(node, aten.index_put.default):
        return node.args[1][0] is not None
    rows = is_call(node, aten.select_scatter.default, aten.slice_scatter.default) and node.args[2:3] == (0,)
    return rows or is_call(node, aten.scatter.src)
