"""Recognising attention that is spelled out around a softmax: scores, softmax, weights times values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ..graph.calls import is_cast, is_inert_dropout
from ..graph.nodes import is_call
from .attention import Attention
from .frame import Frame
from .operand import Operand
from .products import Product, read_product
from .scores import keeps_matrices, read_scores
from .sinks import drops_sink, split_sinks

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_WEIGHTS_LEAVE = (
    "the attention weights are used by more than the product with the values, as with output_attentions=True; "
    "they are never all computed over a compressed cache"
)


_CHANGES = (
    aten.dropout.default,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.masked_fill.Scalar,
    aten.where.self,
    aten.where.ScalarOther,
    aten.nan_to_num.default,
)
"""What changes the weights of some models between the softmax and the product."""


@dataclass(frozen=True)
class _Use:
    """The product of weights and values. shared: whether something else takes the weights too. changed: by which op."""

    product: Product
    sink_dropped: bool
    shared: bool
    changed: Node | None

    @property
    def problem(self) -> str | None:
        if self.changed is not None and is_call(self.changed, aten.dropout.default):
            return "dropout is active; call model.eval()"
        if self.changed is not None:
            return f"the attention weights are changed by {self.changed.target} before the product with the values"
        return _WEIGHTS_LEAVE if self.shared else None


def _use_of(weights: Node) -> _Use | None:
    """Follow the weights through casts, dropout and views to the product that takes them as its rows."""
    products, sink_dropped, others, changed = [], False, 0, None
    todo = [weights]
    while todo:
        node = todo.pop()
        for user in node.users:
            product = read_product(user)
            if product is not None:
                product = product.swapped() if product.right.node is node else product
                products.append(product)
            elif is_cast(user) or is_inert_dropout(user) or keeps_matrices(user):
                todo.append(user)
            elif drops_sink(user):
                sink_dropped = True
                todo.append(user)
            elif is_call(user, *_CHANGES) and weights.meta["val"].dim() == 4:  # of a router there are fewer
                changed = user
                todo.append(user)
            elif not is_call(user, aten.sym_size.int):
                others += 1
    return _Use(products[0], sink_dropped, len(products) + others > 1, changed) if products else None


def _value(product: Product) -> tuple[Operand, tuple[int, ...]] | None:
    """The values of ``weights @ values``, and the order of the result's dimensions: leading, row, channel."""
    *leading, row, token = product.left.labels
    right = product.right.labels
    channels = set(right) - set(product.left.labels)
    if len(channels) != 1 or token not in right or row in right or token in product.labels:
        return None
    channel = channels.pop()
    if set(product.labels) != {*leading, row, channel}:
        return None
    order = tuple(product.labels.index(label) for label in (*leading, row, channel))
    return product.operand(product.right, "".join(leading), token, channel), order


def _restore(order: tuple[int, ...], frame: Frame) -> tuple[tuple, ...]:
    steps = frame.restore()
    if order != tuple(sorted(order)):
        steps += ((aten.permute.default, [order.index(dim) for dim in range(len(order))]),)
    return steps


def read_softmax(softmax: Node) -> Attention | None:
    """The attention around a softmax, None where the softmax does something else."""
    use = _use_of(softmax)
    over_last = softmax.args[1] in (-1, softmax.meta["val"].dim() - 1)
    value = _value(use.product) if use is not None and over_last else None
    if use is None or value is None:
        return None
    inputs, sinks, problem = split_sinks(softmax.args[0])
    scores = read_scores(inputs)
    operand, order = value
    if scores is None:
        return _unreadable(softmax, use.product, operand)
    frame = Frame.of(scores.batch, operand.sizes)
    if frame is None or frame.heads != scores.heads:
        return _unreadable(softmax, use.product, operand)
    problem = use.problem or problem
    if problem is None and use.sink_dropped != (sinks is not None):
        problem = "a column is dropped from the attention weights that is not one of sinks"
    return Attention(
        use.product.node,
        scores.query,
        scores.key,
        operand,
        scores.reader,
        scores.scale,
        scores.bias,
        softcap=scores.softcap,
        sinks=sinks,
        restore=_restore(order, frame),
        problem=problem,
    )


def _unreadable(softmax: Node, product: Product, value: Operand) -> Attention | None:
    """Attention, by its looks, with scores of another kind; a softmax over less (a router's) is none."""
    if softmax.meta["val"].dim() < 3:
        return None
    problem = "the scores are more than a scaled product, a softcap and an additive mask"
    return Attention(product.node, product.left.node, value, value, product.node, problem=problem)
