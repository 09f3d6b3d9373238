"""The one place where settings become formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import UnknownLayerError
from .lowering.format import Format, order_for
from .lowering.head_groups import HeadGroups
from .lowering.layout import Layout
from .patterns.match import Match, NoMatch
from .settings import ROLES, Settings, Way

FormatOf = Callable[[int | None, str, int, int, torch.dtype, torch.device], Layout | None]
"""layer (None: unknown), role ("key" or "value"), KV heads, head_dim, dtype, device -> the format of a cache, or those
of groups of its KV heads; None: dense."""


def policy(settings: Settings) -> FormatOf:
    """What ``settings`` ask for. Keys and values of a layer come in the same groups of KV heads."""
    by_layer = settings.by_layer()

    def format_of(
        layer: int | None, role: str, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Layout | None:
        if layer is None and by_layer:
            raise UnknownLayerError(
                f"{' and '.join(by_layer)} is given, but a graph holds a single layer of unknown number: neither its "
                "module path nor a layer_idx that it reads tells it. Compile the whole model, or leave dense what is "
                "to be dense by not compiling it"
            )
        ways = settings.ways(layer, heads)
        if ways is None:
            return None
        groups: dict[tuple[Way, Way], list[int]] = {}
        for head, way in enumerate(ways):
            groups.setdefault(way, []).append(head)
        own, order = [way[ROLES.index(role)] for way in groups], order_for(device)
        parts = [Format.of(head_dim, x.sparsity, settings.window, order, x.code, x.strategy) for x in own]
        return parts[0] if len(parts) == 1 else HeadGroups.of(list(groups.values()), parts)

    return format_of


def check_found_layers(settings: Settings, found: Sequence[Match | NoMatch]) -> None:
    """``check_layers``, as far as a graph tells how many layers there are.

    found: the attention layers of a graph, which may be some of the model.
    """
    known = [m.attention.layers for m in found if m.attention.layers is not None]
    seen = [m.attention.layer + 1 for m in found if m.attention.layer is not None]
    if known:
        check_layers(settings, max(known + seen))


def layers_of(config: Any) -> int:
    """How many layers there are in a causal language model of transformers with such a config."""
    return config.get_text_config().num_hidden_layers


def check_layers(settings: Settings, count: int) -> None:
    """Raise UnknownLayerError where settings name a layer that a model of ``count`` layers does not have."""
    for name, layers in settings.named_layers().items():
        if max(layers) >= count:
            others = ", ".join(str(layer) for layer in sorted(layers) if layer >= count)
            raise UnknownLayerError(
                f"{name} names layer {others}, which the model does not have; accepted are layers from 0 to {count - 1}"
            )
