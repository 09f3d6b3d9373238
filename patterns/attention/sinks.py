"""Attention sinks: one more score for each head, appended before the softmax and dropped behind it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..graph.calls import argument, skip_casts
from ..graph.nodes import is_call
from ..graph.symbols import same_size
from ..graph.views import first_of_rank, read_through

aten = torch.ops.aten


def drops_sink(node: Node) -> bool:
    """True for ``weights[..., :-1]``."""
    if not is_call(node, aten.slice.Tensor):
        return False
    dim, start, end = (argument(node, i, name, None) for i, name in ((1, "dim"), (2, "start"), (3, "end")))
    return dim in (-1, node.meta["val"].dim() - 1) and not start and end == -1 and argument(node, 4, "step", 1) == 1


def _without_maximum(node: Any) -> Any:
    """x, of ``x - x.max(-1, keepdim=True)``: the softmax of both is the same."""
    node = skip_casts(node)
    if not is_call(node, aten.sub.Tensor) or node.kwargs:
        return node
    whole, largest = node.args
    if is_call(largest, operator.getitem):
        largest = largest.args[0]
    if not is_call(largest, aten.max.dim, aten.amax.default) or largest.args[0] is not whole:
        return node
    dim, keepdim = largest.args[1], argument(largest, 2, "keepdim", False)
    last = {-1, whole.meta["val"].dim() - 1}
    over_last = len(dim) == 1 and dim[0] in last if isinstance(dim, list | tuple) else dim in last
    return skip_casts(whole) if keepdim and over_last else node


def split_sinks(node: Any) -> tuple[Any, Node | None, str | None]:
    """(scores, sinks [Hq], problem) of what a softmax takes; (node, None, None) where there are no sinks."""
    node = _without_maximum(node)
    if not is_call(node, aten.cat.default) or len(node.args[0]) != 2 or node.meta["val"].dim() != 4:
        return node, None, None
    scores, column = node.args[0]
    last = argument(node, 1, "dim", 0) in (-1, 3)
    if not last or not same_size(column.meta["val"].shape[-1], 1):
        return node, None, None
    return scores, *_sinks(column)


def _sinks(column: Node) -> tuple[Node | None, str | None]:
    """The sinks [Hq] that were expanded to the column [B, Hq, L, 1], or a problem."""
    sinks = first_of_rank(column, 1)
    if sinks is not None:
        chain, node = [], column
        while node is not sinks:
            chain.append(node)
            node = node.args[0]
        read = read_through(chain[::-1], sinks)
        heads = sinks.meta["val"].shape[0]
        of_heads = [] if same_size(heads, 1) else [0]
        heads_only = read is not None and all(
            [axis.source for axis in axes if axis.source is not None] == (of_heads if dim == 1 else [])
            for dim, axes in enumerate(read.dims)
        )
        if heads_only and same_size(heads, column.meta["val"].shape[1]):
            return sinks, None
    return None, "the column of attention sinks is not one number for each query head"
