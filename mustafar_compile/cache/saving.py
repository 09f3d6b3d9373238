"""Loading saved caches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import SavedCacheError
from ..lowering.format import CHUNK, MAX_QUERY_TOKENS, Format, FormatError
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
