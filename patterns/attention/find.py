"""Every attention of a graph, numbered and named."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from ..graph.nodes import is_call
from .attention import Attention
from .flex import is_flex, read_flex
from .fused import read_sdpa
from .spelled_out import SOFTMAX, read_softmax

aten = torch.ops.aten


def _find(graph: Graph) -> Iterator[Attention]:
    for node in list(graph.nodes):  # reading may add dead calls
        if is_call(node, aten.scaled_dot_product_attention.default):
            yield read_sdpa(node)
        elif is_call(node, *SOFTMAX):
            found = read_softmax(node)
            if found is not None:
                yield found
        elif is_flex(node):
            yield read_flex(node)


def _module_path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    path = re.sub(r"\['?(\w+)'?\]", r".\1", path)
    names = [part for part in path.split(".") if part.isidentifier() or part.isdigit()]
    while names and names[0] in ("L", "self", "_modules", "_orig_mod"):
        names.pop(0)
    return ".".join(name for name in names if name != "_modules")


def number_and_name(node: Node, place: int) -> tuple[int, str]:
    """The layer that a node of attention belongs to and its module path; ``place``, where the path has no number."""
    name = _module_path(node)
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return (int(number[1]) if number else place), name


def find_attention(graph: Graph) -> list[Attention]:
    """Every attention of the graph, in order, numbered by its module path or, without one, by its place."""
    found = list(_find(graph))
    for place, attention in enumerate(found):
        attention.layer, attention.name = number_and_name(attention.node, place)
    return found
