"""The inputs of a rewritten graph, and where each comes from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch.fx import Graph, Node

from ...lowering.layout import Layout
from ..graph.symbols import same_size
from .plan import Argument, AttachedBuffer, Buffer, Input, Size


class Inputs:
    """Placeholders, each with its source. index: which argument of the original graph a placeholder was."""

    def __init__(self, graph: Graph, placeholders: Sequence[Node]) -> None:
        self.graph = graph
        self.index = {node: i for i, node in enumerate(placeholders)}
        self.sources: dict[Node, Input] = {node: Argument(i) for node, i in self.index.items()}

    def _add(self, name: str, source: Input) -> Node:
        with self.graph.inserting_after(next(reversed(self.sources))):
            node = self.graph.placeholder(name)
        self.sources[node] = source
        return node

    def add_buffers(self, cache: Node, format: Layout, kind: type[Buffer] | type[AttachedBuffer]) -> list[Node]:
        """The compressed buffers of the cache that the placeholder ``cache`` holds."""
        index = self.index[cache]
        return [
            self._add(f"{cache.name}_{place}_{x.name}", kind(index, place)) for place, x in enumerate(format.buffers)
        ]

    def size_of(self, cache: Node, dim: int) -> Any:
        """The size of a compressed cache as a model sees it: an int, or an input."""
        size = cache.meta["val"].shape[dim]
        if isinstance(size, int):
            return size
        source = Size(self.index[cache], dim)
        added = (node for node, s in self.sources.items() if s == source)
        known = next(chain(self._arguments_of(size), added), None)
        if known is not None:
            return known
        node = self._add(f"{cache.name}_size_{dim}", source)
        node.meta["val"] = size
        return node

    def holding(self, size: Any) -> int | Argument:
        """``size``, or the argument that holds it."""
        return size if isinstance(size, int) else Argument(self.index[next(self._arguments_of(size))])

    def _arguments_of(self, size: torch.SymInt) -> Iterator[Node]:
        """The placeholders of the original graph that hold a symbolic size."""
        return (node for node in self.index if same_size(node, size))

    def drop(self, caches: Collection[Node]) -> None:
        """Take away the placeholders of ``caches``, which their buffers replaced, and symbols that nothing uses.

        Sizes of dense caches stay: numbers of blocks follow from them, and Inductor must know what from.
        """
        attached = {source.index for source in self.sources.values() if isinstance(source, AttachedBuffer)}
        dense = [cache.meta["val"] for cache in caches if self.index[cache] in attached]
        sizes = [size for x in dense for size in x.shape if not isinstance(size, int)]
        for node in list(self.sources):
            symbol = isinstance(node.meta.get("val"), torch.SymInt)
            if node in caches or (symbol and not node.users and not any(same_size(node, size) for size in sizes)):
                self.graph.erase_node(node)
                del self.sources[node]
