"""A write of one token spelled as a choice over the whole buffer.

``torch.where(here, new, cache)`` or ``cache * (1 - here) + new * here``, where ``here`` is true at one slot: provably,
as it compares all slots with one position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graph.nodes import is_call, is_single
from ..graph.symbols import same_size
from ..graph.views import is_move, read_through

aten = torch.ops.aten
_CASTS = (aten._to_copy.default, aten.type_as.default, aten.to.dtype)
_NOT = (aten.bitwise_not.default, aten.logical_not.default)


@dataclass(frozen=True)
class MaskedWrite:
    """``new`` [.., 1, ..] goes into ``cache`` at ``position`` (int, or a tensor of one element) of ``dim``."""

    cache: Node
    new: Node
    dim: int
    position: Any


def masked_write(node: Node) -> MaskedWrite | None:
    """The write that ``node`` is, if it is one."""
    choice = _where(node) or _blend(node)
    if choice is None:
        return None
    here, new, cache = choice
    rank, shape = node.meta["val"].dim(), new.meta["val"].shape
    slot = _one_slot(here, rank)
    if slot is None or len(shape) != rank or not same_size(shape[slot[0]], 1):
        return None
    return MaskedWrite(cache, new, *slot)


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
    slot = _one_slot(a, rank) if isinstance(a, Node) and isinstance(b, Node) else None
    return slot is not None and slot == _one_slot(b, rank)


def _one_slot(here: Node, rank: int) -> tuple[int, Any] | None:
    """(dim, position) where ``here``, broadcast to ``rank`` dimensions, is true at one position of one of them."""
    chain: list[Node] = []
    while is_call(here, *_CASTS) or is_move(here):
        if not is_call(here, *_CASTS):
            chain.insert(0, here)
        here = here.args[0]
    position = _compared_position(here)
    read = read_through(chain, here) if position is not None else None
    if read is None or read.prefix is not None:
        return None
    slots = [i for i, axes in enumerate(read.dims) if any(axis.source is not None for axis in axes)]
    return (rank - len(read.dims) + slots[0], position) if len(slots) == 1 else None


def _compared_position(node: Node) -> Any | None:
    """The position that ``node`` compares all slots with."""
    if is_call(node, aten.one_hot.default):
        return node.args[0] if is_single(node.args[0]) else None
    if not is_call(node, aten.eq.Tensor, aten.eq.Scalar):
        return None
    for slots, position in (node.args, node.args[::-1]):
        if _counts_from_zero(slots) and (isinstance(position, int) or _is_index(position)):
            return position
    return None


def _counts_from_zero(node: Any) -> bool:
    while isinstance(node, Node) and is_move(node) and node.target is not aten.slice.Tensor:
        node = node.args[0]
    if is_call(node, aten.arange.default):
        return True
    return is_call(node, aten.arange.start) and node.args[0] == 0


def _is_index(node: Any) -> bool:
    return is_single(node) and not node.meta["val"].is_floating_point()
