"""Steps that attention takes on its way, and adding calls of our own."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mustafar_compile import _compat

from .nodes import is_call

aten = torch.ops.aten
_CASTS = (aten._to_copy.default, aten.type_as.default, aten.to.dtype, aten.detach.default)

_PRODUCTS, _QUOTIENTS = (aten.mul.Tensor, aten.mul.Scalar), (aten.div.Tensor, aten.div.Scalar)


def is_cast(node: Any) -> bool:
    """True for an op that changes the dtype of its input at most."""
    return is_call(node, *_CASTS)


def is_inert_dropout(node: Any) -> bool:
    return is_call(node, aten.dropout.default) and (node.args[1] == 0 or not node.args[2])


def skip_casts(node: Any) -> Any:
    while is_cast(node):
        node = node.args[0]
    return node


def argument(node: Node, index: int, name: str, default: Any) -> Any:
    """An argument of ``node``, given by place or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def factor_of(node: Any) -> float | None:
    """f, where ``node`` is its input times a number f other than 0."""
    if not is_call(node, *_PRODUCTS, *_QUOTIENTS) or node.kwargs:
        return None
    factor = node.args[1]
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor:
        return None
    return float(factor) if node.target in _PRODUCTS else 1 / factor


def call_before(place: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new call before ``place`` with its fake value. It is dead code until something uses it."""
    with place.graph.inserting_before(place):
        node = place.graph.call_function(target, args, kwargs)
    values, named = (torch.fx.map_arg(x, lambda n: n.meta["val"]) for x in (args, kwargs))
    with _compat.tracing.fake_results(n.meta.get("val") for n in place.graph.nodes):
        node.meta["val"] = target(*values, **named)
    return node
