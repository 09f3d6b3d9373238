"""A write of one token spelled as a choice over the whole buffer.

``torch.where(here, new, cache)`` or ``cache * (1 - here) + new * here``, where ``here`` is true at one slot of each row
of the batch: provably, as it compares all slots with one position, or with one for each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graph.nodes import is_call, is_tensor
from ..graph.symbols import same_size
from ..graph.views import is_move, read_through
from .rows import of_rows
from .write import Write, counts_along, is_index

aten = torch.ops.aten
_CASTS = (aten._to_copy.default, aten.type_as.default, aten.to.dtype)
_NOT = (aten.bitwise_not.default, aten.logical_not.default)


def masked_write(node: Node) -> Write | None:
    """The write that ``node`` is, if it is one."""
    choice = _where(node) or _blend(node)
    if choice is None:
        return None
    here, new, cache = choice
    rank, shape = node.meta["val"].dim(), new.meta["val"].shape
    slot = _slot(here, rank)
    if slot is None or len(shape) != rank or not same_size(shape[slot.dim], 1):
        return None
    return Write("masked write", cache, new, slot.dim, of_rows(slot.position, node) if slot.by_row else slot.position)


@dataclass(frozen=True)
class _Slot:
    """Where a mask is true: at one ``position`` of ``dim``. by_row: each row of the batch has one of its own."""

    dim: int
    position: Any
    by_row: bool


def _where(node: Node) -> tuple[Node, Node, Node] | None:
    if not is_call(node, aten.where.self):
        return None
    here, new, cache = node.args
    if is_call(here, *_NOT):
        here, new, cache = here.args[0], cache, new
    return here, new, cache


def _blend(node: Node) -> tuple[Node, Node, Node] | None:
    """``cache * (1 - here) + new * here``, with the operands of each op in any order."""
    if not is_call(node, aten.add.Tensor) or node.kwargs:
        return None
    for kept, put in (node.args, node.args[::-1]):
        if not is_call(kept, aten.mul.Tensor) or not is_call(put, aten.mul.Tensor):
            continue
        for cache, others in (kept.args, kept.args[::-1]):
            elsewhere = _negated(others)
            for new, here in (put.args, put.args[::-1]):
                if elsewhere is not None and _same_slot(elsewhere, here, node.meta["val"].dim()):
                    return here, new, cache
    return None


def _negated(node: Any) -> Node | None:
    """x, where ``node`` is ``1 - x`` or ``not x``."""
    if is_call(node, aten.rsub.Scalar) and node.args[1:] == (1,) and not node.kwargs:
        return node.args[0]
    return node.args[0] if is_call(node, *_NOT) else None


def _same_slot(a: Node, b: Node, rank: int) -> bool:
    slots = [_slot(x, rank) if isinstance(x, Node) else None for x in (a, b)]
    return slots[0] is not None and slots[0] == slots[1]


def _slot(here: Node, rank: int) -> _Slot | None:
    """The slot at which ``here``, broadcast to ``rank`` dimensions, is true."""
    chain: list[Node] = []
    while is_call(here, *_CASTS) or is_move(here):
        if not is_call(here, *_CASTS):
            chain.insert(0, here)
        here = here.args[0]
    found = _compared(here)
    read = read_through(chain, here) if found is not None else None
    if found is None or read is None or read.prefix is not None:
        return None
    slots, position = found
    first = rank - len(read.dims)
    sources = {first + i: [axis.source for axis in axes if axis.source is not None] for i, axes in enumerate(read.dims)}
    differing = {dim: of for dim, of in sources.items() if of}
    dim = next((dim for dim, of in differing.items() if of == [slots]), None)
    others = differing.keys() - {dim}
    if dim is None or not others <= {0} or (others and isinstance(position, int)):
        return None
    return _Slot(dim, position, by_row=bool(others))


def _compared(node: Node) -> tuple[int, Any] | None:
    """The dimension of ``node`` that runs over all slots, and the position that each of them is compared with."""
    if is_call(node, aten.one_hot.default):
        return node.args[0].meta["val"].dim(), node.args[0]
    if not is_call(node, aten.eq.Tensor, aten.eq.Scalar):
        return None
    for slots, position in (node.args, node.args[::-1]):
        dim = _counting_dim(slots) if is_tensor(slots) else None
        if dim is not None and (isinstance(position, int) or (_is_index(position) and _is_constant(position, dim))):
            return node.meta["val"].dim() + dim, position
    return None


def _counting_dim(slots: Node) -> int | None:
    """The dimension, from the end, along which ``slots`` has the numbers of all slots."""
    shape = slots.meta["val"].shape
    dims = (dim for dim in range(-len(shape), 0) if not same_size(shape[dim], 1))
    return next((dim for dim in dims if counts_along(dim, slots, shape[dim])), None)


def _is_constant(position: Node, dim: int) -> bool:
    return all(same_size(size, 1) for size in position.meta["val"].shape[dim:][:1])


def _is_index(node: Any) -> bool:
    return is_tensor(node) and is_index(node)
