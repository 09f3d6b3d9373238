"""Recognising how a cache takes up new tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..attention.operand import Operand, leading_axes
from ..graph.calls import factor_of
from ..graph.nodes import is_call, is_tensor
from ..graph.normalise import Functional
from ..graph.symbols import same_size
from ..graph.views import changes_nothing, is_move, read_through, slice_bounds, unmoved
from .masked_write import masked_write
from .positions import end_of
from .rows import indexed_by_row, scattered, written_one_by_one
from .write import Write, index_copy, index_put, reads_back, slice_write

aten = torch.ops.aten
_ALLOCATIONS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.full.default)


@dataclass(frozen=True)
class CacheUpdate:
    """New tokens entering the cache of K or V.

    node: the cache afterwards. base: the cache before (a placeholder), None where it begins here. new: the tokens,
    [B, H, L, D] or [B, L, H, D]. tokens_dim: the dimension of the tokens, 2 or 1. op: how it is written.
    position: where the tokens go, as in ``Write``, an int may be symbolic; None for a cache that grows by its end.
    batch: the rows that are used, where they are only the first of a larger buffer; else None. in_part: whether it is
    some rows of the batch that are written, which may be others.
    """

    node: Node
    base: Node | None
    new: Node
    tokens_dim: int
    op: str
    position: Any | None = None
    batch: Any | None = None
    in_part: bool = False

    @property
    def grows(self) -> bool:
        return self.position is None

    @property
    def by_row(self) -> bool:
        """Whether each row of the batch has a position of its own."""
        shape = self.position.meta["val"].shape if is_tensor(self.position) else ()
        return len(shape) == 2 and not same_size(shape[0], 1)

    @property
    def end(self) -> Any:
        """Tokens written afterwards, as a sympy expression; None where the graph does not show it."""
        return end_of(self.position, self.new.meta["val"].shape[self.tokens_dim])


def _is_empty(node: Any) -> bool:
    return isinstance(node, Node) and any(same_size(size, 0) for size in node.meta["val"].shape)


@dataclass(frozen=True)
class _Base:
    """Where a write goes: a placeholder, or None for a buffer that begins in this graph.

    batch: how many rows, where not all. in_part: whether they are not the first ones.
    """

    node: Node | None
    batch: Any | None = None
    in_part: bool = False


def _base(node: Any) -> _Base | None:
    """The buffer behind ``node``, None where it is something else."""
    batch, first = None, 0
    while isinstance(node, Node) and is_move(node):
        if not changes_nothing(node):
            dim, start, _, step = slice_bounds(node) if node.target is aten.slice.Tensor else (None, 0, 0, 1)
            if batch is not None or (dim, step) != (0, 1):
                return None
            batch, first = node.meta["val"].shape[0], start
        node = node.args[0]
    if isinstance(node, Node) and node.op == "placeholder":
        return _Base(node, batch, in_part=first != 0)
    allocated = isinstance(node, Node) and node.op == "call_function" and node.target in _ALLOCATIONS
    return _Base(None) if allocated and batch is None else None


def _past(node: Node) -> _Base | None:
    """As ``_base``, of a cache that grows."""
    base = _base(node)
    return None if base is None or base.in_part else base


def _cat(node: Node) -> CacheUpdate | None:
    parts = node.args[0]
    dim = (node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].dim()
    if len(parts) != 2:
        return None
    past, new = parts
    base = _Base(None) if _is_empty(past) else _past(past)
    if base is None or (base.node is None and not _is_empty(past)):
        return None
    return CacheUpdate(node, base.node, new, dim, "cat", batch=base.batch)


def _copy(node: Node) -> CacheUpdate | None:
    """``cache.copy_(updated)``: the same update."""
    target, source = node.args[:2]
    same = all(map(same_size, target.meta["val"].shape, source.meta["val"].shape))
    update = recognise_update(source) if same and target.meta["val"].dtype == source.meta["val"].dtype else None
    return replace(update, node=node) if update is not None and update.base is target else None


_WRITES: dict[Any, tuple[Callable[[Node], Write | None], ...]] = {
    aten.index_copy.default: (index_copy,),
    aten.index_put.default: (index_put, indexed_by_row),
    aten.scatter.src: (scattered,),
    aten.slice_scatter.default: (slice_write, written_one_by_one),
    aten.select_scatter.default: (written_one_by_one,),
    aten.where.self: (masked_write,),
    aten.add.Tensor: (masked_write,),
}


def recognise_update(node: Node) -> CacheUpdate | None:
    """The update that ``node`` is, if it is one of a cache of four dimensions."""
    update = _updated(node) if node.op == "call_function" else None
    four_dims = update is not None and update.node.meta["val"].dim() == 4 and update.new.meta["val"].dim() == 4
    return update if four_dims and update.tokens_dim in (1, 2) else None


def _updated(node: Node) -> CacheUpdate | None:
    if node.target is aten.cat.default:
        return _cat(node)
    if node.target is aten.copy.default:
        return _copy(node)
    writes = (write_of(node) for write_of in _WRITES.get(node.target, ()))
    write = next((write for write in writes if write is not None and write.dim % 4 in (1, 2)), None)
    base = None if write is None else _base(write.cache)
    if write is None or base is None:
        return None
    how = {"batch": base.batch, "in_part": base.in_part or write.in_part}
    return CacheUpdate(node, base.node, write.new, write.dim % 4, write.op, write.position, **how)


def joins_changed_past(read: Node) -> bool:
    """Whether new tokens join a past that is not the graph's input as it came, and attention reads them together."""
    node = unmoved(read)
    if not is_call(node, aten.cat.default) or _is_empty(node.args[0][0]):
        return False
    past = node.args[0][0]
    return unmoved(past).op == "placeholder" and _past(past) is None


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
        written = reads_back(node)
        if written is None:
            chain.append(node)
        node = written or node.args[0]


def _tokens_dim(node: Node, chain: list[Node], operand: Operand) -> int:
    """Where the tokens of ``node`` are: 1 if attention reads them from there or, of one token, the heads from 2."""
    read = read_through(chain, node)
    if read is None:
        return 2
    axes = read.dims[operand.tokens], leading_axes(read, operand)
    of_tokens, of_heads = ([axis.source for axis in x] for x in axes)
    return 1 if of_tokens == [1] or 2 in of_heads else 2


def is_written_back(update: CacheUpdate, functional: Functional) -> bool:
    """Whether the updated cache is what its buffer holds after the call."""
    value = functional.mutated.get(update.base) if update.base is not None else None
    if is_call(value, aten.slice_scatter.default) and update.batch is not None:
        dim, _, _, step = slice_bounds(value, first=2)
        value = value.args[1] if (dim, step) == (0, 1) else None
    return value is update.node


def sliding_window(update: CacheUpdate, functional: Functional) -> int | None:
    """The window, where only the latest tokens of the updated cache are kept."""
    for user in update.node.users:
        if user.op == "call_function" and user.target is aten.slice.Tensor and user in functional.outputs:
            _, start, _, _ = slice_bounds(user)
            if isinstance(start, int) and start < 0:
                return 1 - start
    return None
