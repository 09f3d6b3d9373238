"""Warnings, each given once: what the backend cannot do, or does at a cost, is said and not left to be found out."""

from __future__ import annotations

import warnings
from typing import Any

_given: set[str] = set()


def warn_once(message: str, stacklevel: int = 2) -> None:
    """Warn with ``message`` unless that was done before."""
    if message not in _given:
        _given.add(message)
        warnings.warn(f"mustafar: {message}", stacklevel=stacklevel + 1)


def warn_decompressed(func: Any) -> None:
    """Say that an op outside the compiled graphs decompresses a cache."""
    warn_once(f"{func} runs on a compressed KV cache outside the compiled graphs, which decompresses it", stacklevel=5)
