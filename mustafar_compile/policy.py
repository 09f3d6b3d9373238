"""The one place where settings become formats."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .lowering.format import Format
from .settings import Settings

FormatOf = Callable[[int, str, int, torch.dtype], Format | None]
"""layer, role ("key" or "value"), head_dim, dtype -> the format of a cache tensor; None: it stays dense."""


def policy(settings: Settings) -> FormatOf:
    """What ``settings`` ask for."""

    def format_of(layer: int, role: str, head_dim: int, dtype: torch.dtype) -> Format | None:
        if layer in settings.skip_layers:
            return None
        return Format.of(head_dim, settings.sparsity(role), settings.window)

    return format_of
