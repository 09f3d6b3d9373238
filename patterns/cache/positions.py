"""Where new tokens go, as far as a graph shows it without knowing the values on the device."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from ..graph.nodes import is_call, is_single, is_tensor
from ..graph.symbols import expression, same_size
from ..graph.views import is_regrouping

aten = torch.ops.aten
_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_CASTS = (aten._to_copy.default, aten.detach.default, aten.lift_fresh_copy.default)
_FIRST = {  # which argument is the first of what is made
    aten.arange.start: 0,
    aten.arange.start_step: 0,
    aten.full.default: 1,
    aten.scalar_tensor.default: 0,
}


def end_of(position: Any, count: Any) -> sympy.Expr | None:
    """Tokens written once ``count`` of them, side by side, are at ``position``, if numbers of the host say so."""
    start, count = _start_of(position), expression(count)
    return None if start is None or count is None else start + count


def _start_of(position: Any) -> sympy.Expr | None:
    """The first of ``position``, if it is the same in all rows of the batch and no value on the device counts."""
    if not is_tensor(position):
        return expression(position)
    if position.op == "get_attr":  # a tensor that the graph holds
        value = getattr(position.graph.owning_module, position.target)
        return expression(value.item()) if is_single(position) else None
    if is_call(position, aten.arange.default):
        return sympy.Integer(0)
    if is_call(position, *_FIRST):
        return expression(position.args[_FIRST[position.target]])
    if is_call(position, aten.add.Tensor) and not position.kwargs:
        starts = [_start_of(x) for x in position.args]
        return None if None in starts else sum(starts)
    if is_call(position, aten.stack.default) and len(position.args[0]) == 1:
        return _start_of(position.args[0][0])
    if is_call(position, *_CASTS) or _repeats_rows(position) or (_is_view(position) and is_single(position.args[0])):
        return _start_of(position.args[0])
    return None


def is_run(position: Any) -> bool:
    """Whether tokens written at ``position`` are known to stand side by side, in order, in each row of the batch."""
    while is_tensor(position) and not is_single(position):
        if position.target in _ARANGES:
            return len(position.args) < 3 or position.args[2] == 1
        if position.target is aten.add.Tensor and not position.kwargs:
            shifted = [x for x in position.args if is_tensor(x) and not _is_single_token(x)]
            if len(shifted) != 1:
                return False
            position = shifted[0]
        elif position.target in _CASTS or _repeats_rows(position):
            position = position.args[0]
        else:
            return False
    return True


def _is_single_token(position: Node) -> bool:
    """Whether ``position`` has at most one number for each row of the batch."""
    return all(same_size(size, 1) for size in position.meta["val"].shape[-1:])


def _repeats_rows(position: Node) -> bool:
    """Whether an op leaves the last dimension of ``position`` as it is and at most repeats it."""
    if not _is_view(position):
        return False
    last = [x.meta["val"].shape[-1:] for x in (position, position.args[0])]
    return all(last) and same_size(last[0][0], last[1][0])


def _is_view(position: Node) -> bool:
    """Whether an op regroups the dimensions of ``position`` or repeats it along some."""
    return is_regrouping(position) or is_call(position, aten.expand.default)
