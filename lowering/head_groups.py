"""Cache tensors whose KV heads have different formats: groups of heads, each of which is a cache by itself.

Kernels, codes and strategies know one format each. So what differs by head is a few caches side by side, whose heads
are those of a group; ``by_group`` has the ops over them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from .buffers import Buffer
from .format import Format
from .layout import FormatError, Layout

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class HeadGroups(Layout):
    """Formats by group of KV heads. Make one with ``of`` or ``decode``, which give one object each.

    groups: the heads of each, ascending; all from 0 on are in one of them. parts: their formats, of one head_dim and
    window. The buffers are those of the groups in turn; each has counts of its own. Raises FormatError for anything
    else.
    """

    groups: Groups
    parts: tuple[Format, ...]

    def __post_init__(self) -> None:
        heads = [head for group in self.groups for head in group]
        ascending = all(group and all(a < b for a, b in pairwise(group)) for group in self.groups)
        alike = len({(part.head_dim, part.window) for part in self.parts}) == 1
        if len(self.parts) != len(self.groups) or not ascending or sorted(heads) != [*range(len(heads))] or not alike:
            raise FormatError(
                f"groups {self.groups} of formats {self.parts} cannot be; accepted are as many formats, of one "
                "head_dim and one window, and groups in which each KV head from 0 on is once"
            )

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]], parts: Sequence[Format]) -> HeadGroups:
        """The one object for these groups and formats: guards compare them on every call."""
        return _interned(cls(tuple(map(tuple, groups)), tuple(parts)))

    @property
    def head_dim(self) -> int:  # type: ignore[override]
        return self.parts[0].head_dim

    @property
    def window(self) -> int:  # type: ignore[override]
        return self.parts[0].window

    @functools.cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        return tuple(
            replace(buffer, dims=tuple(len(group) if dim == "heads" else dim for dim in buffer.dims))
            for group, part in zip(self.groups, self.parts, strict=True)
            for buffer in part.buffers
        )

    @property
    def described(self) -> str:
        """Such as "64/128 int8 (2 heads) + 40/128 (6 heads)"; what all heads have alike as a format has it."""
        heads = Counter[str]()
        for group, part in zip(self.groups, self.parts, strict=True):
            heads[part.described] += len(group)
        if len(heads) == 1:
            return self.parts[0].described
        return " + ".join(f"{kept} ({count} head{'s' * (count > 1)})" for kept, count in heads.items())

    def encode(self) -> str:
        """Such as "0.2:head_dim=16,kept=8,window=4;1:head_dim=16,kept=16,window=4"."""
        pairs = zip(self.groups, self.parts, strict=True)
        return ";".join(f"{'.'.join(map(str, group))}:{part.encode()}" for group, part in pairs)

    def ordered(self, order: str) -> HeadGroups:
        return HeadGroups.of(self.groups, [part.ordered(order) for part in self.parts])


@functools.cache
def _interned(groups: HeadGroups) -> HeadGroups:
    return groups


@functools.cache
def decode(text: str) -> Format | HeadGroups:
    """The inverse of ``encode`` of either. Raises FormatError for any other text."""
    if ":" not in text:
        return Format.decode(text)
    try:
        groups, parts = zip(*(part.split(":") for part in text.split(";")), strict=True)
        return HeadGroups.of([list(map(int, group.split("."))) for group in groups], list(map(Format.decode, parts)))
    except ValueError as error:
        raise FormatError(
            f"{text!r} names no groups of KV heads with a format each; accepted is such as "
            "'0.2:head_dim=128,kept=64,window=32;1:head_dim=128,kept=40,window=32'"
        ) from error
