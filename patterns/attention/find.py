"""Every attention of a graph, numbered and named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.fx import Graph, Node

from ..graph.layers import layer_numbers, module_path, own_number
from ..graph.nodes import is_call, located
from .attention import Attention
from .flex import is_flex, read_flex
from .fused import read_sdpa
from .spelled_out import SOFTMAX, read_softmax

aten = torch.ops.aten


def _find(graph: Graph) -> Iterator[Attention]:
    for node in list(graph.nodes):  # reading may add dead calls
        with located(node):
            found = _read(node)
        if found is not None:
            yield found


def _read(node: Node) -> Attention | None:
    if is_call(node, aten.scaled_dot_product_attention.default):
        return read_sdpa(node)
    if is_call(node, *SOFTMAX):
        return read_softmax(node)
    return read_flex(node) if is_flex(node) else None


def places(nodes: Sequence[Node]) -> list[tuple[int | None, str]]:
    """The layer that each node of attention of a graph belongs to, and its module path.

    Where paths have no numbers, several layers are numbered by their places. The number of a single one is None, as it
    may be any layer of a model, unless it says itself which it is.
    """
    paths = [module_path(node) for node in nodes]
    numbers = layer_numbers(paths)
    if len(nodes) == 1 and numbers == [None]:
        numbers = [own_number(nodes[0])]
    elif None in numbers:
        numbers = [place if number is None else number for place, number in enumerate(numbers)]
    return list(zip(numbers, paths, strict=True))


def find_attention(graph: Graph) -> list[Attention]:
    """Every attention of the graph, in order, with its layer."""
    found = list(_find(graph))
    for attention, (layer, name) in zip(found, places([a.node for a in found]), strict=True):
        attention.layer, attention.name = layer, name
    return found
