"""Every attention of a graph, numbered and named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from mustafar_compile import _compat

from ..graph.layers import layer_numbers, layers_of_model, module_path, numbered_modules, own_number, stated_window
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

    A layer's number is what it says itself, or what its path says. Several layers without one are numbered by their
    places; that of a single one is None, as it may be any layer of a model.
    """
    return _places(nodes, numbered_modules(nodes))


def _places(nodes: Sequence[Node], modules: Sequence[Any]) -> list[tuple[int | None, str]]:
    """modules: ``numbered_modules`` of the nodes."""
    paths = [module_path(node) for node in nodes]
    own = map(own_number, modules)
    numbers = [by_path if said is None else said for by_path, said in zip(layer_numbers(paths), own, strict=True)]
    if len(nodes) > 1:
        numbers = [place if number is None else number for place, number in enumerate(numbers)]
    return list(zip(numbers, paths, strict=True))


def find_attention(graph: Graph) -> list[Attention]:
    """Every attention of the graph, in order, with its layer and what is said of it."""
    found = list(_find(graph))
    nodes = [attention.node for attention in found]
    modules = numbered_modules(nodes)
    for attention, (layer, name), module in zip(found, _places(nodes, modules), modules, strict=True):
        attention.layer, attention.name, attention.window = layer, name, stated_window(module)
        attention.layers = layers_of_model(module, attention.node)
        attention.evictable = _compat.models.has_hook_on_arguments(module)
    return found
