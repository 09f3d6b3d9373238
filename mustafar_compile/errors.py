"""What can go wrong, one class a cause; and a check of values that a user gives."""

from __future__ import annotations

from typing import Any


class MustafarError(RuntimeError):
    """Base of all errors of this package."""


class StaleCacheError(MustafarError):
    """A cache is used again after it was extended elsewhere."""


class CompressedWriteError(MustafarError):
    """A write into a compressed cache that cannot be honoured."""


class NoMemoryError(MustafarError):
    """The memory of a compressed cache is asked for as if it were dense."""


class ReleaseError(MustafarError):
    """``release_dense`` cannot be honoured for a cache, or a cache that it released is used otherwise."""


class SavedCacheError(MustafarError):
    """What is loaded is not a compressed cache, or one whose parts do not fit each other."""


class ForeignCompilerError(MustafarError):
    """A compressed cache is given to a function that another backend compiles."""


class UnknownLayerError(MustafarError):
    """A setting goes by the number of a layer, and a layer has no number or no value."""


class UnknownHeadError(MustafarError):
    """A setting goes by KV head, and a layer has other heads, or ranks have some of them each."""


class NothingMatchedError(MustafarError):
    """``strict`` is on and a graph holds no attention that could be rewritten."""


class RanksDisagreeError(MustafarError):
    """Ranks that wait for each other compile different graphs, or one of them compiles none."""


def check_value(name: str, given: Any, accepted: bool, wanted: str) -> None:
    """Raise ValueError unless a value is accepted. wanted: what it must be."""
    if not accepted:
        raise ValueError(f"mustafar: {name}={given!r} is not accepted; it must be {wanted}")
