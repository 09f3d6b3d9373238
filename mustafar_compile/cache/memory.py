"""Where tensors lie in their storages."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from .. import _compat
from .without_memory import WithoutMemory

Place = tuple[int, tuple[int, ...], tuple[int, ...], int]
"""Of a tensor in its storage: offset, shape and strides, in elements, and bytes of an element."""

_MOST_WORK: Any = 10_000  # of a search that could take exponentially long; numpy's stubs admit two values only


def place_of(tensor: Tensor) -> Place:
    """The place of ``tensor``. Two tensors of one storage and place are views of the same elements."""
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.element_size()


class _Elements:
    """A place as an array of numpy, which looks at addresses and not at what is there."""

    def __init__(self, place: Place) -> None:
        offset, shape, strides, size = place
        self.__array_interface__ = {
            "version": 3,
            "data": (size * (offset + 1), True),  # of no address 0
            "shape": shape,
            "strides": tuple(size * stride for stride in strides),
            "typestr": f"|V{size}",
        }


def overlap(a: Place, b: Place) -> bool:
    """Whether two places of one storage, of elements of one size, share any. True where that is too hard to tell."""
    if a[3] != b[3]:
        return True
    try:
        return np.shares_memory(np.asarray(_Elements(a)), np.asarray(_Elements(b)), max_work=_MOST_WORK)
    except np.exceptions.TooHardError:
        return True


def written_twice(inputs: Sequence[Any], written: Collection[int]) -> bool:
    """Whether an input of a graph that it writes shares elements with another one. inputs: tensors among others."""
    places: dict[int, list[tuple[int, Place]]] = {}
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor) and not isinstance(x, WithoutMemory):
            places.setdefault(_compat.memory.storage_number(x), []).append((i, place_of(x)))
    pairs = (pair for shared in places.values() for pair in combinations(shared, 2))
    return any((i in written or j in written) and overlap(a, b) for (i, a), (j, b) in pairs)
