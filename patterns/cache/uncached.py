"""Why keys or values come from no cache that can be compressed."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from ..attention.attention import Attention
from ..attention.operand import Operand
from ..graph.nodes import is_call
from ..graph.normalise import Functional
from ..graph.symbols import same_size
from ..graph.views import is_move, unmoved
from .conditions import NothingLost, Reason
from .rows import names_rows
from .update import recognise_update

aten = torch.ops.aten
_PRODUCTS = (aten.matmul.default, aten.linear.default, aten.bmm.default, aten.mm.default, aten.einsum.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
_PARTS = (*_SPLITS, operator.getitem, aten.select.int)
_ROWS = (
    "rows of the batch may be written at places of their own where the graph shows that it is all of them, as "
    "torch.arange counts them, and a token of each at one place for all heads"
)
_BROKEN_OFF = "a graph break lies between its cache and the attention, whose query comes into the graph as it is"


def why_uncached(name: str, operand: Operand, attention: Attention, functional: Functional) -> Reason:
    """Tell caches of other kinds, and those behind a graph break, from attention that has no cache at all.

    name: "keys" or "values", which ``operand`` is.
    """
    other = _kept_otherwise(name, operand.node, functional)
    if other is not None:
        return Reason(other)
    if _is_broken_off(attention, operand):
        return Reason(_BROKEN_OFF)
    return _no_update_reason(name, operand.node, functional)


def _kept_otherwise(name: str, operand: Node, functional: Functional) -> str | None:
    """Why what is cached is no tensor of keys or values alone, with four dimensions."""
    node, is_part = operand, False
    while not _takes_tokens(node, functional):
        if not (is_move(node) or is_call(node, *_PARTS)):
            return None
        is_part |= node.target in _PARTS
        node = node.args[0]
    dims = node.meta["val"].dim()
    if dims != 4:
        return f"its cache has {dims} dimensions; accepted are caches of four, [B, H, S, D] or [B, S, H, D]"
    return f"{name} are a part of what its cache holds; cache keys and values apart" if is_part else None


def _takes_tokens(node: Node, functional: Functional) -> bool:
    """Whether ``node`` is a tensor of the caller with something written into it or joined to it, for the next call."""
    joined = is_call(node, aten.cat.default) and node in functional.outputs
    return node in functional.mutated.values() or (
        joined and any(unmoved(part).op == "placeholder" for part in node.args[0])
    )


def _is_broken_off(attention: Attention, operand: Operand) -> bool:
    """Whether a step is given its query as ready as its keys or values, which it is where Dynamo breaks the graph.

    Cross-attention makes at least its query in the graph. operand: keys or values.
    """
    given = all(unmoved(x).op == "placeholder" for x in (attention.query, operand.node))
    return given and not same_size(attention.query_length, operand.node.meta["val"].shape[operand.tokens])


def _no_update_reason(name: str, operand: Node, functional: Functional) -> Reason:
    """Tell a bounded buffer that rolls, and a write that is not recognised, from attention that has no cache at all."""
    writer = _writer(operand)
    how = f"; {_ROWS}" if names_rows(writer) else ""
    written = f"its cache is written by {writer.target} in a way that is not recognised{how}"
    between: set[Node] = set()
    cached = False
    todo = [operand]
    while todo:
        node = todo.pop()
        shape = getattr(node.meta.get("val"), "shape", ())
        if node in functional.mutated and len(shape) == 4:
            if any(is_call(n, aten.roll.default, aten.cat.default) for n in between):
                return NothingLost(f"cache is bounded by a sliding window of {shape[2]}")
            return Reason(written)
        if recognise_update(node) is not None:
            cached = True
        elif node not in between and len(shape) >= 4:
            between.add(node)
            todo += node.all_input_nodes
    if cached and names_rows(writer):
        return Reason(written)
    if cached and any(is_call(node, *_PRODUCTS) for node in between):
        return Reason(f"{name} are computed from what is cached, as in latent attention")
    if cached:
        return Reason(
            f"{name} are changed once they are cached, as by a rotary embedding; cache them as attention takes them"
        )
    if unmoved(operand).op == "placeholder":
        return NothingLost("no token enters its cache, as in cross-attention")
    return NothingLost("keys and values do not come from a KV cache")


def _writer(node: Node) -> Node:
    while is_move(node) or is_call(node, aten.copy.default):
        node = node.args[node.target is aten.copy.default]
    return node
