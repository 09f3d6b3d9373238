"""Saving and loading caches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SavedCacheError
from ..lowering.format import CHUNK, MAX_QUERY_TOKENS, Format
from ..lowering.layout import FormatError
from .tensor import CompressedKV, restored


def restored_cache(
    values: Tensor, bitmap: Tensor, window: Tensor, counts: Tensor, tokens: int, grows: bool, tokens_dim: int = 2
) -> CompressedKV:
    """What caches that version 0.1 saved call: it had one kind of format, and one row of counts for the whole batch."""
    try:
        format = Format.interned(window.shape[3], CHUNK * values.shape[3], window.shape[2] - MAX_QUERY_TOKENS)
        counts = counts.expand(window.shape[0], 3).clone()
    except (FormatError, AttributeError, IndexError, RuntimeError) as error:
        raise SavedCacheError(f"this is no KV cache that version 0.1 saved: {error}") from error
    return restored(format.encode(), [values, bitmap, window, counts], tokens, grows, tokens_dim)


def safe_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What ``torch.load`` must be allowed to call for a cache that ``torch.save`` wrote, whole or a single tensor::

        with torch.serialization.safe_globals(mustafar_compile.safe_globals()):
            cache = torch.load(path)

    These are the functions that put a compressed tensor together, and the cache classes of transformers. What is loaded
    is checked: SavedCacheError is raised for buffers that do not make a cache.
    """
    from transformers import cache_utils

    bases = (cache_utils.Cache, cache_utils.CacheLayerMixin)
    caches = [c for _, c in inspect.getmembers(cache_utils, inspect.isclass) if issubclass(c, bases)]
    return [restored, (restored_cache, "mustafar_compile.cache.restored_cache"), *caches]


def save_sharded(cache: Any, folder: str | Path, group: Any = None) -> Path:
    """Save the part of a KV cache that this rank of ``group`` (default: all ranks) holds, beside those of the others.

    cache: anything that ``torch.save`` takes. Each rank must call it. Returns this rank's file.
    """
    path = _part(folder, group)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(cache, path)
    return path


def load_sharded(folder: str | Path, group: Any = None) -> Any:
    """The part that ``save_sharded`` saved for this rank of ``group`` (default: all ranks), on the device it was on.

    Raises SavedCacheError where ``folder`` has no such part, as when another number of ranks saved it, and where what
    is loaded is no cache.
    """
    path = _part(folder, group)
    if not path.exists():
        found = ", ".join(sorted(x.stem for x in path.parent.glob("rank-*-of-*.pt"))) or "none"
        raise SavedCacheError(
            f"{folder} has no part {path.stem} of a KV cache; it has {found}. Accepted are as many ranks as saved it, "
            "each of which takes the part that it saved"
        )
    with torch.serialization.safe_globals(safe_globals()):
        return torch.load(path)


def _part(folder: str | Path, group: Any) -> Path:
    """The file of this rank."""
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    return Path(folder) / f"rank-{rank}-of-{size}.pt"
