"""What is known of one attention of the graph, however it was spelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .operand import Operand


@dataclass
class Attention:
    """One attention of the graph, as ``softmax(cap(scale * query @ key) + mask) @ value``.

    node: the result as the graph has it; ``restore`` are the ops, with their arguments behind the first, that make it
    from [B, Hq, L, Dv], but for its dtype. query: [B, Hq, L, D]. key_reader: the op that takes the key. mask: boolean
    or additive, broadcastable to [B, Hq, L, S]. softcap: cap(x) is ``softcap * tanh(x / softcap)``, 0 for none. sinks:
    [Hq], one more score for each head that takes weight and gives no value. layer: its number in the model, of so many
    ``layers``, None where unknown. name: its module path, "" where unknown. window: the sliding window that its layer
    is said to have, None without one. evictable: whether a hook on its module is given its cache, and may change it.
    problem: why it can never be matched, or None.
    """

    node: Node
    query: Node
    key: Operand
    value: Operand
    key_reader: Node
    scale: float = 1.0
    mask: Node | None = None
    is_causal: bool = False
    softcap: float = 0.0
    sinks: Node | None = None
    restore: tuple[tuple[Any, ...], ...] = ()
    layer: int | None = None
    layers: int | None = None
    name: str = ""
    window: int | None = None
    evictable: bool = False
    problem: str | None = None

    @property
    def query_length(self) -> Any:
        return self.query.meta["val"].shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """Of the result. Not that of the query where autocast is on, or where the graph sums in another."""
        return self.node.meta["val"].dtype
