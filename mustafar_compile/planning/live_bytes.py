"""How much memory the tensors of a run need at a time, found without any: by the sizes of its fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch

from .. import _compat


class LiveBytes(_compat.tensors.TorchDispatchMode):
    """Counts what is made while it is entered. peak: the most bytes that stood at one time; live: those that do now."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = set(_storages((args, kwargs)))
        results = func(*args, **kwargs)
        for storage in _storages(results):
            if storage not in given and storage not in self._known:
                self._count(storage)
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size).atexit = False

    def _forget(self, size: int) -> None:
        self.live -= size


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Of the plain tensors in nested tuples, lists and dicts."""
    for x in _compat.tensors.tree_leaves(tree):
        if isinstance(x, torch.Tensor) and not _compat.tensors.holds_tensors(x):
            yield x.untyped_storage()
