"""KV-cache compression as a torch.compile backend: ``torch.compile(model, backend="mustafar")``.

The backend is found by name through its entry point. This package adds what to use beside it: ``prepare`` (a Hugging
Face model in one line), ``compile_loop`` (for one's own generate loops), ``calibrate`` (how far to prune which layer: a
``Budget``), ``register_strategy`` (a rule of your own for what is kept), ``explain`` (what was compressed and why not),
``cache_stats`` (what a cache takes), ``safe_globals`` (for loading a saved cache), ``save_sharded`` and
``load_sharded`` (of a cache of which ranks hold parts), ``release_recordings`` (before ranks take their process group
down) and ``Settings``.
Importing it changes nothing global and loads no compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache.saving import load_sharded, safe_globals, save_sharded
    from .cache.stats import CacheStats, cache_stats
    from .cache.tensor import CompressedKV
    from .calibration.budget import Budget
    from .calibration.calibrate import calibrate
    from .calling.cuda_graphs import release_recordings
    from .errors import (
        CompressedWriteError,
        ForeignCompilerError,
        MustafarError,
        NoMemoryError,
        NothingMatchedError,
        RanksDisagreeError,
        ReleaseError,
        SavedCacheError,
        StaleCacheError,
        UnknownHeadError,
        UnknownLayerError,
    )
    from .hugging_face import prepare
    from .loop import compile_loop
    from .reporting.explain import explain
    from .reporting.report import Report
    from .settings import Settings
    from .strategies import register_strategy

_HOMES = {
    "Budget": "calibration.budget",
    "CacheStats": "cache.stats",
    "CompressedKV": "cache.tensor",
    "CompressedWriteError": "errors",
    "ForeignCompilerError": "errors",
    "MustafarError": "errors",
    "NoMemoryError": "errors",
    "NothingMatchedError": "errors",
    "RanksDisagreeError": "errors",
    "ReleaseError": "errors",
    "Report": "reporting.report",
    "SavedCacheError": "errors",
    "Settings": "settings",
    "StaleCacheError": "errors",
    "UnknownHeadError": "errors",
    "UnknownLayerError": "errors",
    "cache_stats": "cache.stats",
    "calibrate": "calibration.calibrate",
    "compile_loop": "loop",
    "explain": "reporting.explain",
    "load_sharded": "cache.saving",
    "prepare": "hugging_face",
    "register_strategy": "strategies",
    "release_recordings": "calling.cuda_graphs",
    "safe_globals": "cache.saving",
    "save_sharded": "cache.saving",
}

__all__ = [
    "Budget",
    "CacheStats",
    "CompressedKV",
    "CompressedWriteError",
    "ForeignCompilerError",
    "MustafarError",
    "NoMemoryError",
    "NothingMatchedError",
    "RanksDisagreeError",
    "ReleaseError",
    "Report",
    "SavedCacheError",
    "Settings",
    "StaleCacheError",
    "UnknownHeadError",
    "UnknownLayerError",
    "cache_stats",
    "calibrate",
    "compile_loop",
    "explain",
    "load_sharded",
    "prepare",
    "register_strategy",
    "release_recordings",
    "safe_globals",
    "save_sharded",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
