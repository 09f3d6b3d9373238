"""Loading saved caches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .tensor import restored_cache


def safe_globals() -> list[Callable[..., Any]]:
    """What ``torch.load`` must be allowed to call for a cache that ``torch.save`` wrote, whole or a single tensor::

        with torch.serialization.safe_globals(mustafar_compile.safe_globals()):
            cache = torch.load(path)

    These are the function that puts a compressed tensor together, and the cache classes of transformers.
    """
    from transformers import cache_utils

    bases = (cache_utils.Cache, cache_utils.CacheLayerMixin)
    caches = [c for _, c in inspect.getmembers(cache_utils, inspect.isclass) if issubclass(c, bases)]
    return [restored_cache, *caches]
