"""Taking attention scores apart: ``cap(scale * query @ key) + bias``, in any order of steps that comes to this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from ..graph.calls import call_before, factor_of, is_cast
from ..graph.nodes import is_call, is_single, is_tensor
from ..graph.symbols import same_size
from ..graph.views import first_of_rank, is_regrouping
from .frame import Frame
from .operand import Operand
from .products import Product, read_product

aten = torch.ops.aten
_MASKED = -1e4  # what is filled in at masked scores: nothing of its exponential is left in float32


@dataclass(frozen=True)
class Scores:
    """query: [B, Hq, L, D]. bias: additive, broadcastable to [B, Hq, L, S]. softcap: as ``Attention`` has it."""

    reader: Node
    query: Node
    key: Operand
    heads: int
    batch: Any
    scale: float = 1.0
    softcap: float = 0.0
    bias: Node | None = None

    def times(self, factor: float, place: Node) -> Scores:
        """c * tanh(s * x) is a cap of c over a scale of c * s, so a factor scales both alike."""
        bias = None if self.bias is None else call_before(place, aten.mul.Tensor, self.bias, factor)
        return replace(self, scale=self.scale * factor, softcap=self.softcap * factor, bias=bias)


_Read = Callable[[Any], Scores | None]
"""Reads the scores inside of a step."""


def _frame(scores: Scores, node: Node) -> Frame | None:
    """The frame of ``node``, a step of the scores; None where the step makes them larger."""
    shape = node.meta["val"].shape
    frame = Frame.of(scores.batch, tuple(shape[:-2]))
    sizes = scores.reader.meta["val"].shape[-2:]
    larger = any(same_size(a, 1) != same_size(b, 1) for a, b in zip(sizes, shape[-2:], strict=True))
    return frame if frame is not None and frame.heads == scores.heads and not larger else None


def _from_product(product: Product) -> Scores | None:
    *leading, row, column = product.labels
    if row in product.right.labels:
        product = product.swapped()
    left, right = product.left, product.right
    channels = set(left.labels) & set(right.labels) - set(product.labels)
    known = set(left.labels) == {*leading, row, *channels} and set(right.labels) <= {*leading, column, *channels}
    if len(channels) != 1 or not known or column not in right.labels:
        return None
    channel = channels.pop()
    key = product.operand(right, "".join(leading), column, channel)
    batch = first_of_rank(right.node, 4)
    frame = None if batch is None else Frame.of(batch.meta["val"].shape[0], key.sizes)
    if frame is None:
        return None
    query, scale = _unscaled(left.node)
    order = [left.labels.index(label) for label in (*leading, row, channel)]
    if order != sorted(order):
        query = call_before(product.node, aten.permute.default, query, order)
    query = frame.rows(query, product.node)
    scores = Scores(product.node, query, key, frame.heads, batch.meta["val"].shape[0], product.scale * scale)
    return scores if product.bias is None else _plus(scores, product.bias, product.node)


def _unscaled(query: Node) -> tuple[Node, float]:
    """What is multiplied by a number to give the query; so a query that is scaled in float32 keeps its dtype."""
    scale = 1.0
    while True:
        while is_cast(query) and _size_of(query.args[0]) <= _size_of(query):  # one that was rounded stays so
            query = query.args[0]
        factor = factor_of(query)
        if factor is None:
            return query, scale
        query, scale = query.args[0], scale * factor


def _size_of(node: Node) -> int:
    return node.meta["val"].dtype.itemsize


def _scaled(node: Node, read: _Read) -> Scores | None:
    factor, inner = factor_of(node), read(node.args[0])
    if inner is None:
        return None
    if factor is not None:
        return inner.times(factor, node)
    factor = node.args[1]
    if not is_single(factor) or inner.bias is not None or inner.softcap or node.kwargs:
        return None
    factor = call_before(node, aten.reshape.default, factor, [])
    return replace(inner, query=call_before(node, node.target, inner.query, factor))


def _capped(node: Node, read: _Read) -> Scores | None:
    inner = read(node.args[0])
    if inner is None or inner.bias is not None or inner.softcap:
        return None
    return replace(inner, softcap=1.0)


def _depends_on(node: Node, other: Node) -> bool:
    """Whether ``node`` is computed from ``other``."""
    seen, todo = {node}, [node]
    while todo:
        new = {x for x in todo.pop().all_input_nodes if not x < other} - seen  # what comes before it cannot
        seen |= new
        todo += new
    return other in seen


def _plus(scores: Scores, bias: Node, place: Node) -> Scores | None:
    frame = _frame(scores, place)
    if frame is None or _depends_on(bias, scores.reader):
        return None
    bias = frame.bias(bias, place)
    both = bias if scores.bias is None else call_before(place, aten.add.Tensor, scores.bias, bias)
    return replace(scores, bias=both)


def _biased(node: Node, read: _Read) -> Scores | None:
    if node.kwargs or not all(map(is_tensor, node.args)):
        return None
    for inner, bias in (node.args, node.args[::-1]):
        scores = read(inner)
        if scores is not None:
            return _plus(scores, bias, node)
    return None


def _lessened(node: Node, read: _Read) -> Scores | None:
    if node.kwargs or not is_tensor(node.args[1]):
        return None
    scores = read(node.args[0])
    return None if scores is None else _plus(scores, call_before(node, aten.neg.default, node.args[1]), node)


def _constant(value: Any) -> Any:
    """The number that ``value`` is: a number, or a tensor without dimensions that was made of one."""
    while is_cast(value) or is_call(value, aten.lift_fresh_copy.default):
        value = value.args[0]
    if is_call(value, aten.full.default, aten.scalar_tensor.default) and not value.meta["val"].dim():
        return value.args[-1]
    if isinstance(value, Node) and value.op == "get_attr" and not value.meta["val"].dim():
        return getattr(value.graph.owning_module, value.target).item()
    return value


def _floored(node: Node, read: _Read) -> Scores | None:
    """Scores that are at least the lowest float: that raises what a mask made infinite, and nothing else."""
    lowest = torch.finfo(node.meta["val"].dtype).min
    for inner, floor in (node.args, node.args[::-1]):
        scores = read(inner)
        if scores is not None and _constant(floor) == lowest:
            bias = None if scores.bias is None else call_before(node, aten.clamp_min.default, scores.bias, lowest)
            return replace(scores, bias=bias)
    return None


def _masked(node: Node, read: _Read, inner: Node, condition: Node, fill: Any, where_true: bool) -> Scores | None:
    """Scores replaced by a very negative number where ``condition`` is ``where_true``."""
    scores, fill = read(inner), _constant(fill)
    if scores is None or not isinstance(fill, int | float) or fill > _MASKED:
        return None
    frame = _frame(scores, node)
    if frame is None or _depends_on(condition, scores.reader):
        return None
    condition = frame.bias(condition, node)
    if not where_true:
        condition = call_before(node, aten.logical_not.default, condition)
    if scores.bias is None:
        bias = call_before(node, aten.where.Scalar, condition, fill, 0.0)
    else:
        bias = call_before(node, aten.where.ScalarSelf, condition, fill, scores.bias)
    return replace(scores, bias=bias)


def _filled(node: Node, read: _Read) -> Scores | None:
    return _masked(node, read, *node.args, where_true=True)


def _where(node: Node, read: _Read) -> Scores | None:
    condition, chosen, other = node.args
    kept = _masked(node, read, chosen, condition, other, where_true=False)
    return kept or _masked(node, read, other, condition, chosen, where_true=True)


_STEPS: dict[Any, Callable[[Node, _Read], Scores | None]] = {
    aten.mul.Tensor: _scaled,
    aten.mul.Scalar: _scaled,
    aten.div.Tensor: _scaled,
    aten.div.Scalar: _scaled,
    aten.tanh.default: _capped,
    aten.add.Tensor: _biased,
    aten.sub.Tensor: _lessened,
    aten.maximum.default: _floored,
    aten.max.other: _floored,
    aten.masked_fill.Scalar: _filled,
    aten.masked_fill.Tensor: _filled,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
}


def keeps_matrices(node: Node) -> bool:
    """True for a view that regroups leading dimensions only."""
    if not is_regrouping(node):
        return False
    before, after = (x.meta["val"].shape[-2:] for x in (node.args[0], node))
    return all(map(same_size, before, after))


def read_scores(node: Any) -> Scores | None:
    """The scores that ``node`` is, None where it is something else or cannot be brought into this form."""

    @cache  # both sides of a sum may come from the same scores: reading each node once keeps the time linear
    def read(node: Any) -> Scores | None:
        return _read(node, read) if isinstance(node, Node) and node.op == "call_function" else None

    return read(node)


def _read(node: Node, read: _Read) -> Scores | None:
    product = read_product(node)
    if product is not None:
        return _from_product(product)
    if node.target in _STEPS:
        return _STEPS[node.target](node, read)
    return read(node.args[0]) if is_cast(node) or keeps_matrices(node) else None
