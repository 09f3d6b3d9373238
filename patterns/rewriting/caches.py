"""A compressed cache that a graph works on, and what still reads it as a dense tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ...lowering.layout import Layout
from ..cache.update import CacheUpdate
from .emit import Emitter
from .inputs import Inputs

aten = torch.ops.aten


@dataclass
class Cache:
    """The compressed cache that a placeholder holds, or that is attached to the dense one that it holds.

    replaces_dense: whether the graph has no dense tensor beside it. written: its mutation happens inside an op.
    rewinding: the write of a dense step into a static cache.
    """

    format: Layout
    tokens_dim: int
    buffers: list[Node]
    replaces_dense: bool = True
    written: bool = False
    rewinding: CacheUpdate | None = None


def decompress_remaining_uses(placeholder: Node, cache: Cache, emit: Emitter, inputs: Inputs) -> None:
    """Give what still reads ``placeholder`` a dense tensor, and its sizes without one."""
    for user in [u for u in placeholder.users if u.target is aten.sym_size.int]:
        user.replace_all_uses_with(inputs.size_of(placeholder, user.args[1]))
        emit.graph.erase_node(user)
    if placeholder.users:
        length = inputs.size_of(placeholder, cache.tokens_dim)
        first_use = _first_use(placeholder, cache)
        with emit.graph.inserting_before(first_use):
            dense = emit.decompress(_rewound(cache, first_use, emit), cache.format, length, cache.tokens_dim)
        placeholder.replace_all_uses_with(dense)


def _rewound(cache: Cache, first_use: Node, emit: Emitter) -> list[Node]:
    """The buffers as they are once the cache is rewound to where the graph writes, if that is before its end.

    What comes back to the window is read exact then. Not where the graph reads the cache before it knows the place.
    """
    update = cache.rewinding
    if update is None or (isinstance(update.position, Node) and not update.position < first_use):
        return cache.buffers
    start = emit.call(aten.reshape.default, emit.first_position(update), [-1, 1])
    start = emit.call(aten._to_copy.default, start, dtype=torch.int64)

    def rewound(counts: Node) -> Node:
        tokens = emit.call(aten.minimum.default, emit.call(aten.slice.Tensor, counts, 1, 0, 1), start)
        return emit.call(aten.cat.default, [tokens, emit.call(aten.slice.Tensor, counts, 1, 1)], 1)

    return cache.format.with_counts(cache.buffers, rewound)


def _first_use(placeholder: Node, cache: Cache) -> Node:
    """The first op on the cache: late, so that one layer is dense at a time, and before anything is written."""
    users = {user for node in (placeholder, *cache.buffers) for user in node.users}
    return next(node for node in placeholder.graph.nodes if node in users)
