"""Of what buffers a cache tensor consists, whether all of its KV heads have one ``Format`` or groups of them several.

What holds caches, binds them and counts bytes needs to know no more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .buffers import BLOCK_TOKENS, CACHE_DTYPES, Buffer, blocks_for

if TYPE_CHECKING:
    from .format import Format


class FormatError(ValueError):
    """Buffers that are not those of a cache of a format, or a text that names no format."""


class Layout(ABC):
    """The buffers of one cache tensor, K or V of one layer, in the order in which the ops take them; counts are last.

    head_dim, window: as in ``Format``. parts: the formats of its groups of KV heads, one where all heads have the same.
    groups: the KV heads of each part, None where all heads have the same.
    """

    head_dim: int
    window: int
    parts: tuple[Format, ...]
    groups: tuple[tuple[int, ...], ...] | None

    @property
    @abstractmethod
    def buffers(self) -> tuple[Buffer, ...]:
        """What a cache consists of."""

    @property
    @abstractmethod
    def described(self) -> str:
        """What it keeps of a row, for people."""

    @abstractmethod
    def encode(self) -> str:
        """It as a text, as ops and saved caches hold it."""

    @abstractmethod
    def ordered(self, order: str) -> Layout:
        """The same with kept elements in another order."""

    def __deepcopy__(self, memo: Any) -> Layout:
        """Itself, so that Dynamo's guards, which keep a copy, compare one object with itself."""
        return self

    def check(self, buffers: Sequence[Tensor]) -> None:
        """Raise FormatError unless these tensors are the buffers of one cache: shapes, dtypes, one device."""
        if len(buffers) != len(self.buffers) or not all(isinstance(b, Tensor) and b.dim() for b in buffers):
            names = ", ".join(buffer.name for buffer in self.buffers)
            raise FormatError(f"a cache of {self.described} has the tensors {names}; given are {len(buffers)} things")
        values, window = buffers[0], self.window_of(buffers)
        if values.dim() != len(self.buffers[0].dims) or not values.shape[2] or window.dtype not in CACHE_DTYPES:
            raise FormatError(f"{_described(values)} and {_described(window)} are no values and window of {self}")
        sizes = sizes_of(*values.shape[:3])
        for buffer, given in zip(self.buffers, buffers, strict=True):
            wanted = buffer.shape(sizes), buffer.dtype or window.dtype, values.device
            if (tuple(given.shape), given.dtype, given.device) != wanted:
                raise FormatError(
                    f"the buffer {buffer.name} of a compressed cache is {_described(given)}; accepted is "
                    f"{list(wanted[0])} {wanted[1]} on {wanted[2]}, as {self} and its values ask for"
                )

    def split(self, buffers: Sequence[Any]) -> list[list[Any]]:
        """The buffers of each part."""
        rest = iter(buffers)
        return [[next(rest) for _ in part.buffers] for part in self.parts]

    def state_of(self, buffers: Sequence[Any]) -> list[Any]:
        """Those of the buffers that belong to strategies."""
        parts = zip(self.parts, self.split(buffers), strict=True)
        return [x for part, own in parts for x in own[part.place("window") + 1 : -1]]

    def with_counts(self, buffers: Sequence[Any], change: Callable[[Any], Any]) -> list[Any]:
        """The buffers with ``change`` applied to the counts."""
        named = zip(self.buffers, buffers, strict=True)
        return [change(x) if buffer.name == "counts" else x for buffer, x in named]

    def wants(self, what: str) -> bool:
        """Whether a strategy ranks by "queries" or by "attention" (its weights), too."""
        return any(getattr(part.ranking, f"wants_{what}") for part in self.parts)

    def window_of(self, buffers: Sequence[Tensor]) -> Tensor:
        """A ring of exact tokens, which has the dtype of the cache."""
        return buffers[self.parts[0].place("window")]

    def heads_of(self, buffers: Sequence[Tensor]) -> int:
        """KV heads of a cache."""
        return self.window_of(buffers).shape[1] if self.groups is None else sum(map(len, self.groups))

    def capacity_of(self, buffers: Sequence[Tensor]) -> int:
        """Tokens that the packed part of a cache has room for."""
        return BLOCK_TOKENS * buffers[0].shape[2]

    def shapes(self, batch: Any, heads: Any, capacity: Any, dtype: torch.dtype) -> list[tuple[tuple, torch.dtype]]:
        """(shape, dtype) of each buffer of a cache of ``dtype`` with room for ``capacity`` tokens."""
        sizes = sizes_of(batch, heads, blocks_for(capacity))
        return [(buffer.shape(sizes), buffer.dtype or dtype) for buffer in self.buffers]

    def stored_bytes(self, batch: Any, heads: Any, capacity: Any, itemsize: Any) -> Any:
        """Bytes of all buffers of one cache tensor. The arguments may be numbers or sympy symbols."""
        sizes = sizes_of(batch, heads, blocks_for(capacity))
        return sum(buffer.stored_bytes(sizes, itemsize) for buffer in self.buffers)


def sizes_of(batch: Any, heads: Any, blocks: Any) -> dict[str, Any]:
    """What the dims of buffers stand for."""
    return {"batch": batch, "heads": heads, "blocks": blocks, "tokens": BLOCK_TOKENS}


def _described(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}"
