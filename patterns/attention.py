"""Recognising attention, whole (SDPA) or spelled out (matmul, softmax, matmul)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
_CASTS = (aten._to_copy.default, aten.type_as.default, aten.to.dtype, aten.alias.default, aten.detach.default)
_NO_OP_DROPOUT = aten.dropout.default


@dataclass
class Attention:
    """One attention of the graph.

    node: the result, [B, Hq, L, Dv]. query: [B, Hq, L, D]. key, value: as the op takes them; ``key_transposed`` where
    the key comes as [B, H, D, S]. key_reader: the op that takes the key. layer: its number in the model. name: its
    module path, "" where unknown.
    problem: why it can never be matched, or None.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float
    is_causal: bool
    key_transposed: bool
    key_reader: Node
    layer: int = 0
    name: str = ""
    problem: str | None = None

    @property
    def query_length(self) -> Any:
        return self.query.meta["val"].shape[-2]


def _from_sdpa(node: Node) -> Attention:
    query, key, value = node.args[:3]
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False))
    options = _DEFAULTS | given | dict(node.kwargs)
    scale = options["scale"]
    if scale is None:
        scale = 1.0 / math.sqrt(query.meta["val"].shape[-1])
    problem = "dropout is active" if options["dropout_p"] else None
    return Attention(
        node,
        query,
        key,
        value,
        options["attn_mask"],
        float(scale),
        options["is_causal"],
        False,
        node,
        problem=problem,
    )


def _skip_casts(node: Any) -> Any:
    while isinstance(node, Node) and node.op == "call_function":
        inert_dropout = node.target is _NO_OP_DROPOUT and (node.args[1] == 0 or not node.args[2])
        if node.target not in _CASTS and not inert_dropout:
            break
        node = node.args[0]
    return node


def _is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _scores(node: Any) -> tuple[Node, float, Node | None] | None:
    """Take ``(query @ key) * scale + mask`` apart; each step may be absent."""
    node, mask, scale = _skip_casts(node), None, 1.0
    if _is_call(node, aten.add.Tensor) and all(isinstance(a, Node) for a in node.args[:2]) and not node.kwargs:
        node, mask = _skip_casts(node.args[0]), node.args[1]
    while _is_call(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        factor = node.args[1]
        if not isinstance(factor, int | float) or node.kwargs:
            return None
        scale = scale * factor if node.target in (aten.mul.Tensor, aten.mul.Scalar) else scale / factor
        node = _skip_casts(node.args[0])
    return (node, scale, mask) if _is_call(node, aten.matmul.default) else None


def _from_softmax(softmax: Node) -> Attention | None:
    """The attention around a softmax, None where the softmax does something else."""
    results = [softmax]
    while len(results[-1].users) == 1:
        user = next(iter(results[-1].users))
        if _skip_casts(user) is user:
            break
        results.append(user)
    product = next((u for u in results[-1].users if _is_call(u, aten.matmul.default)), None)
    if product is None or product.args[0] is not results[-1] or product.meta["val"].dim() != 4:
        return None
    weights_dim = softmax.args[1]
    scores = _scores(softmax.args[0])
    if scores is None or weights_dim not in (-1, 3):
        inputs = softmax.args[0]
        return Attention(
            product,
            inputs,
            inputs,
            product.args[1],
            None,
            1.0,
            False,
            True,
            product,
            problem="the scores are more than a scaled product and a mask",
        )
    matmul, scale, mask = scores
    return Attention(product, matmul.args[0], matmul.args[1], product.args[1], mask, scale, False, True, matmul)


def _module_path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    path = re.sub(r"\['?(\w+)'?\]", r".\1", path)
    names = [part for part in path.split(".") if part.isidentifier() or part.isdigit()]
    while names and names[0] in ("L", "self", "_modules", "_orig_mod"):
        names.pop(0)
    return ".".join(name for name in names if name != "_modules")


def _find(graph: Graph) -> Iterator[Attention]:
    for node in graph.nodes:
        if _is_call(node, aten.scaled_dot_product_attention.default):
            yield _from_sdpa(node)
        elif _is_call(node, aten.softmax.int, aten._softmax.default, aten._safe_softmax.default):
            found = _from_softmax(node)
            if found is not None:
                yield found
        elif node.op == "call_function" and "flex_attention" in str(node.target):
            query, key, value = node.args[:3]
            yield Attention(
                node, query, key, value, None, 1.0, False, False, node, problem="flex_attention is not supported"
            )


def find_attention(graph: Graph) -> list[Attention]:
    """Every attention of the graph, in order, numbered by its module path or, without one, by its place."""
    found = list(_find(graph))
    for place, attention in enumerate(found):
        attention.name = _module_path(attention.node)
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", attention.name)
        attention.layer = int(number[1]) if number else place
    return found
