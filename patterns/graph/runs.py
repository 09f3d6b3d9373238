"""Whole numbers one after the other, as the positions of tokens are, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from .nodes import is_call, is_single, is_tensor
from .symbols import expression
from .views import is_move, read_through

aten = torch.ops.aten
_ARANGES = (aten.arange.default, aten.arange.start)


@dataclass(frozen=True)
class Run:
    """Numbers that go up by one along one dimension, from ``offset`` plus ``shift`` on.

    node: the tensor of them. dim: counted from the last; None of a single number. offset: what numbers of the host make
    of the first, None where that is unknown. shift: the one number on the device that is in all of them, None without.
    """

    node: Node
    dim: int | None
    offset: sympy.Expr | None
    shift: Node | None

    @property
    def start(self) -> sympy.Expr | None:
        """The first, where numbers of the host say so."""
        return self.offset if self.shift is None else None


def read_run(numbers: Any) -> Run | None:
    """The run that a tensor is, None where it is none or that is not known."""
    if not is_tensor(numbers) or numbers.meta["val"].is_floating_point():
        return None
    node, offset, shifts = numbers, sympy.Integer(0), []
    moves: list[Node] = []
    while not is_call(node, *_ARANGES):
        if _shifts(node):
            by = node.args[1]
            if is_single(by) and node.target is aten.add.Tensor:
                shifts.append(by)
            else:
                offset = _moved(offset, by, 1 if node.target is aten.add.Tensor else -1)
        elif isinstance(node, Node) and is_move(node):
            moves.insert(0, node)
        elif is_single(node):
            shifts.append(node)
            break
        else:
            return None
        node = node.args[0]
    else:
        offset = _moved(offset, 0 if node.target is aten.arange.default else node.args[0], 1)
    read = read_through(moves, node)
    along = [] if read is None else [dim for dim, axes in enumerate(read.dims) if any(a.source == 0 for a in axes)]
    if (
        read is None
        or len(along) > 1
        or any(len(read.dims[dim]) != 1 for dim in along)
        or not (along or is_single(numbers))
    ):
        return None
    if len(shifts) > 1:
        offset = None
    return Run(numbers, along[0] - len(read.dims) if along else None, offset, shifts[0] if len(shifts) == 1 else None)


def _moved(offset: sympy.Expr | None, by: Any, sign: int) -> sympy.Expr | None:
    number = expression(by)
    return None if offset is None or number is None else offset + sign * number


def _shifts(node: Any) -> bool:
    """Whether a sum or a difference moves all numbers of a tensor by one, which may be on the device."""
    if not is_call(node, aten.add.Tensor, aten.sub.Tensor) or node.kwargs or not is_tensor(node.args[0]):
        return False
    numbers, by = node.args
    return (is_single(by) or expression(by) is not None) and _rank(numbers) == _rank(node)


def _rank(node: Node) -> int:
    return node.meta["val"].dim()
