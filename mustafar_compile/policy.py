"""The one place where settings become formats."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .errors import UnknownLayerError
from .lowering.format import Format, order_for
from .settings import Settings

FormatOf = Callable[[int | None, str, int, torch.dtype, torch.device], Format | None]
"""layer (None: unknown), role ("key" or "value"), head_dim, dtype, device -> format of a cache; None: dense."""


def policy(settings: Settings) -> FormatOf:
    """What ``settings`` ask for."""
    by_layer = settings.by_layer()

    def format_of(
        layer: int | None, role: str, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Format | None:
        if layer is None and by_layer:
            raise UnknownLayerError(
                f"{' and '.join(by_layer)} is given, but a graph holds a single layer of unknown number: neither its "
                "module path nor a layer_idx that it reads tells it. Compile the whole model, or leave dense what is "
                "to be dense by not compiling it"
            )
        if layer in settings.skip_layers:
            return None
        sparsity, code = settings.sparsity(role, layer), settings.code(role, layer)
        strategy = settings.strategy(role, layer)
        return Format.of(head_dim, sparsity, settings.window, order_for(device), code, strategy)

    return format_of
