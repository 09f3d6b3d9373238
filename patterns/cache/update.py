"""Recognising how a cache takes up new tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..attention.operand import Operand, leading_axes
from ..graph.calls import factor_of
from ..graph.nodes import is_call, is_single, is_tensor
from ..graph.normalise import Functional
from ..graph.symbols import expression, same_size
from ..graph.views import changes_nothing, is_move, read_through, slice_bounds, unmoved
from .masked_write import masked_write

aten = torch.ops.aten
_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_CASTS = (aten._to_copy.default, aten.alias.default, aten.detach.default)
_ALLOCATIONS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.full.default)


@dataclass(frozen=True)
class CacheUpdate:
    """New tokens entering the cache of K or V.

    node: the cache afterwards. base: the cache before (a placeholder), None where it begins here. new: the tokens,
    [B, H, L, D] or [B, L, H, D]. tokens_dim: the dimension of the tokens, 2 or 1. op: how it is written.
    position: where the tokens go, as an int64 tensor or a (symbolic) int; None for a cache that grows by its end.
    batch: the rows that are used, where they are only the first of a larger buffer; else None.
    """

    node: Node
    base: Node | None
    new: Node
    tokens_dim: int
    op: str
    position: Any | None = None
    batch: Any | None = None

    @property
    def grows(self) -> bool:
        return self.position is None


def _is_empty(node: Any) -> bool:
    return isinstance(node, Node) and any(same_size(size, 0) for size in node.meta["val"].shape)


@dataclass(frozen=True)
class _Base:
    """Where a write goes: a placeholder, or None for a buffer that begins in this graph."""

    node: Node | None
    batch: Any | None = None


def _takes_first_rows(node: Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    dim, start, _, step = slice_bounds(node)
    return (dim, start, step) == (0, 0, 1)


def _base(node: Any) -> _Base | None:
    """The buffer behind ``node``, None where it is something else."""
    batch = None
    while isinstance(node, Node) and is_move(node):
        if not changes_nothing(node):
            if batch is not None or not _takes_first_rows(node):
                return None
            batch = node.meta["val"].shape[0]
        node = node.args[0]
    if isinstance(node, Node) and node.op == "placeholder":
        return _Base(node, batch)
    allocated = isinstance(node, Node) and node.op == "call_function" and node.target in _ALLOCATIONS
    return _Base(None) if allocated and batch is None else None


def _cat(node: Node) -> CacheUpdate | None:
    parts = node.args[0]
    dim = (node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].dim()
    if len(parts) != 2:
        return None
    past, new = parts
    base = _Base(None) if _is_empty(past) else _base(past)
    if base is None or (base.node is None and not _is_empty(past)):
        return None
    return CacheUpdate(node, base.node, new, dim, "cat", batch=base.batch)


def _write(node: Node, cache: Any, new: Node, dim: int, op: str, position: Any) -> CacheUpdate | None:
    base = _base(cache)
    if base is None:
        return None
    return CacheUpdate(node, base.node, new, dim % node.meta["val"].dim(), op, position, base.batch)


def _index_copy(node: Node) -> CacheUpdate | None:
    cache, dim, position, new = node.args
    return _write(node, cache, new, dim, "index_copy", position)


def _index_put(node: Node) -> CacheUpdate | None:
    cache, indices, new = node.args[:3]
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    accumulate = node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False)
    if len(given) != 1 or accumulate or given[0][1].meta["val"].dim() != 1:
        return None
    return _write(node, cache, _with_leading_ones(new), given[0][0], "index_put", given[0][1])


def _with_leading_ones(new: Node) -> Node:
    """``new`` as the model made it: indexed assignment drops its leading dimensions of size 1."""
    if not is_call(new, aten.view.default):
        return new
    shape, viewed = new.args[0].meta["val"].shape, new.meta["val"].shape
    dropped = len(shape) - len(viewed)
    same = dropped > 0 and all(map(same_size, shape, (*[1] * dropped, *viewed)))
    return new.args[0] if same else new


def _slice_scatter(node: Node) -> CacheUpdate | None:
    cache, new = node.args[:2]
    dim, start, _, step = slice_bounds(node, first=2)
    if new.op == "call_function" and new.target is aten.copy.default:  # x[a:b] = y copies y into a slice of x
        new = new.args[1]
    size = node.meta["val"].shape[dim]
    if isinstance(start, int) and start < 0:  # from the end
        start = max(start + size, 0) if isinstance(size, int) else None
    return _write(node, cache, new, dim, "slice write", start) if step == 1 and start is not None else None


def _masked(node: Node) -> CacheUpdate | None:
    write = masked_write(node)
    return None if write is None else _write(node, write.cache, write.new, write.dim, "masked write", write.position)


def _copy(node: Node) -> CacheUpdate | None:
    """``cache.copy_(updated)``: the same update."""
    target, source = node.args[:2]
    same = all(map(same_size, target.meta["val"].shape, source.meta["val"].shape))
    update = recognise_update(source) if same and target.meta["val"].dtype == source.meta["val"].dtype else None
    return replace(update, node=node) if update is not None and update.base is target else None


_WRITES = {
    aten.cat.default: _cat,
    aten.index_copy.default: _index_copy,
    aten.index_put.default: _index_put,
    aten.slice_scatter.default: _slice_scatter,
    aten.where.self: _masked,
    aten.add.Tensor: _masked,
    aten.copy.default: _copy,
}


def recognise_update(node: Node) -> CacheUpdate | None:
    """The update that ``node`` is, if it is one of a cache of four dimensions."""
    if node.op != "call_function" or node.target not in _WRITES:
        return None
    update = _WRITES[node.target](node)
    four_dims = update is not None and update.node.meta["val"].dim() == 4 and update.new.meta["val"].dim() == 4
    return update if four_dims and update.tokens_dim in (1, 2) else None


def joins_changed_past(read: Node) -> bool:
    """Whether new tokens join a past that is not the graph's input as it came, and attention reads them together."""
    node = unmoved(read)
    if not is_call(node, aten.cat.default) or _is_empty(node.args[0][0]):
        return False
    past = node.args[0][0]
    return unmoved(past).op == "placeholder" and _base(past) is None


def recognise_shift(base: Node, value: Node, tokens_dim: int) -> CacheUpdate | None:
    """The update by which a full buffer drops its oldest tokens for new ones, if ``value`` comes of one."""
    node = value
    while isinstance(node, Node) and node is not base and node.op == "call_function":
        if is_call(node, aten.roll.default, aten.cat.default):
            return CacheUpdate(value, base, value, tokens_dim, "shift", position=0)
        node = node.args[node.target is aten.copy.default]
    return None


def find_update(operand: Operand, functional: Functional) -> tuple[CacheUpdate | None, list[Node]]:
    """The cache update behind the keys or values of attention, and the ops between them, first op first.

    A tensor that leaves the graph as it is counts as a cache that begins here (a prefill that returns its keys).
    """
    chain: list[Node] = []
    node = operand.node
    while True:
        update = recognise_update(node)
        if update is not None:
            return update, chain[::-1]
        if node in functional.outputs and node.op == "call_function" and node.meta["val"].dim() == 4:
            return CacheUpdate(node, None, node, _tokens_dim(node, chain[::-1], operand), "returned"), chain[::-1]
        if not is_move(node) and factor_of(node) is None:
            return None, chain[::-1]
        scattered = _reads_back(node)
        if scattered is None:
            chain.append(node)
            node = node.args[0]
        else:
            node = scattered


def _tokens_dim(node: Node, chain: list[Node], operand: Operand) -> int:
    """Where the tokens of ``node`` are: 1 if attention reads them from there or, of one token, the heads from 2."""
    read = read_through(chain, node)
    if read is None:
        return 2
    axes = read.dims[operand.tokens], leading_axes(read, operand)
    of_tokens, of_heads = ([axis.source for axis in x] for x in axes)
    return 1 if of_tokens == [1] or 2 in of_heads else 2


def _reads_back(node: Node) -> Node | None:
    """x, where ``node`` reads the batch rows that ``x`` was just written to."""
    source = node.args[0]
    if node.target is not aten.slice.Tensor or source.target is not aten.slice_scatter.default:
        return None
    same = slice_bounds(node)[0] == 0 and all(
        a == b or same_size(a, b) for a, b in zip(slice_bounds(node), slice_bounds(source, 2), strict=True)
    )
    return source.args[1] if same else None


def is_written_back(update: CacheUpdate, functional: Functional) -> bool:
    """Whether the updated cache is what its buffer holds after the call."""
    value = functional.mutated.get(update.base) if update.base is not None else None
    if value is not None and update.batch is not None and value.target is aten.slice_scatter.default:
        dim, start, _, step = slice_bounds(value, first=2)
        value = value.args[1] if (dim, start, step) == (0, 0, 1) else None
    return value is update.node


def sliding_window(update: CacheUpdate, functional: Functional) -> int | None:
    """The window, where only the latest tokens of the updated cache are kept."""
    for user in update.node.users:
        if user.op == "call_function" and user.target is aten.slice.Tensor and user in functional.outputs:
            _, start, _, _ = slice_bounds(user)
            if isinstance(start, int) and start < 0:
                return 1 - start
    return None


def end_of(update: CacheUpdate) -> Any:
    """Tokens written after the update, as a sympy expression where the position is known on the host."""
    start, count = expression(update.position), expression(update.new.meta["val"].shape[update.tokens_dim])
    return None if start is None or count is None else start + count


def is_run(position: Any) -> bool:
    """Whether tokens written at ``position`` are known to stand side by side, in order."""
    while is_tensor(position) and not is_single(position):
        if position.target in _ARANGES:
            return len(position.args) < 3 or position.args[2] == 1
        if position.target is aten.add.Tensor and not position.kwargs:
            shifted = [x for x in position.args if is_tensor(x) and not is_single(x)]
            if len(shifted) != 1:
                return False
            position = shifted[0]
        elif position.target in _CASTS:
            position = position.args[0]
        else:
            return False
    return True
