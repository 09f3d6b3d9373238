"""Batched matrix products in every spelling, described by labels as einsum has them."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graph.calls import argument
from ..graph.nodes import is_call
from .operand import Operand

aten = torch.ops.aten


@dataclass(frozen=True)
class Factor:
    """One factor of a product, with a label for each dimension."""

    node: Node
    labels: str


@dataclass(frozen=True)
class Product:
    """``scale * left @ right + bias``; labels are of the dimensions of the result."""

    node: Node
    left: Factor
    right: Factor
    labels: str
    scale: float = 1.0
    bias: Node | None = None

    def size(self, label: str) -> Any:
        return self.node.meta["val"].shape[self.labels.index(label)]

    def swapped(self) -> Product:
        return Product(self.node, self.right, self.left, self.labels, self.scale, self.bias)

    def operand(self, factor: Factor, leading: str, tokens: str, channels: str) -> Operand:
        place = {label: dim for dim, label in enumerate(factor.labels)}
        dims = tuple(place.get(label) for label in leading)
        return Operand(factor.node, dims, tuple(map(self.size, leading)), place[tokens], place[channels])


def _matmul(node: Node, left: Node, right: Node, **how: Any) -> Product | None:
    ranks = [x.meta["val"].dim() for x in (left, right)]
    if min(ranks) < 2:
        return None
    leading = string.ascii_letters[: max(ranks) - 2]
    a, b = (leading[len(leading) - (rank - 2) :] for rank in ranks)
    return Product(node, Factor(left, a + "XZ"), Factor(right, b + "ZY"), leading + "XY", **how)


def _baddbmm(node: Node) -> Product | None:
    bias, left, right = node.args[:3]
    beta, alpha = argument(node, 3, "beta", 1), argument(node, 4, "alpha", 1)
    if beta not in (0, 1):
        return None
    return _matmul(node, left, right, scale=float(alpha), bias=bias if beta else None)


def _einsum(node: Node) -> Product | None:
    equation, factors = node.args[0].replace(" ", ""), node.args[1]
    inputs, arrow, result = equation.partition("->")
    labels = inputs.split(",")
    repeated = any(len(set(part)) != len(part) for part in (*labels, result))
    if not arrow or "." in equation or len(factors) != 2 or repeated:
        return None
    return Product(node, Factor(factors[0], labels[0]), Factor(factors[1], labels[1]), result)


_READERS: dict[Any, Callable[[Node], Product | None]] = {
    aten.matmul.default: lambda node: _matmul(node, *node.args),
    aten.bmm.default: lambda node: _matmul(node, *node.args),
    aten.baddbmm.default: _baddbmm,
    aten.einsum.default: _einsum,
}


def read_product(node: Any) -> Product | None:
    """The product that ``node`` is, None for any other op."""
    return _READERS[node.target](node) if is_call(node, *_READERS) else None
