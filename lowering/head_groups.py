"""Cache tensors whose KV heads have different formats: groups of heads, each of which is a cache by itself.

Kernels, codes and strategies know one format each. So what differs by head is a few caches side by side, whose heads
are those of the group, and an op takes one after the other. Heads are taken and put back as runs of neighbours, which
are views and one copy; an index would be a tensor more on the device.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from .buffers import Buffer
from .format import Format, FormatError
from .layout import Layout
from .masks import with_four_dims

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

    def check(self, buffers: Sequence[Tensor]) -> None:
        if len(buffers) != len(self.buffers):
            raise FormatError(
                f"a compressed cache of {self.described} has {len(self.buffers)} tensors, not {len(buffers)}"
            )
        own = self.split(buffers)
        for part, given in zip(self.parts, own, strict=True):
            part.check(given)
        alike = {
            (x[0].shape[0], x[0].shape[2], x[-1].device, part.window_of(x).dtype)
            for part, x in zip(self.parts, own, strict=True)
        }
        heads = [part.heads_of(given) for part, given in zip(self.parts, own, strict=True)]
        if len(alike) != 1 or heads != [len(group) for group in self.groups]:
            raise FormatError(
                f"the groups of a compressed cache have {heads} KV heads and batch, blocks, device and dtype {alike}; "
                f"accepted are {[len(group) for group in self.groups]} heads, and all else alike"
            )


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


def taken(x: Tensor, group: Sequence[int], dim: int = 1, size: int = 1) -> Tensor:
    """The heads of a group, of which each is ``size`` places side by side along ``dim``."""
    runs = [x.narrow(dim, size * first, size * count) for first, count in _runs(group)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim)


def put_back(parts: Sequence[Tensor], groups: Groups, dim: int = 1) -> Tensor:
    """All heads in order again. parts: what ``taken`` gave of each group, or as many places for each head."""
    size = parts[0].shape[dim] // len(groups[0])
    runs = {}
    for part, group in zip(parts, groups, strict=True):
        done = 0
        for first, count in _runs(group):
            runs[first] = part.narrow(dim, size * done, size * count)
            done += count
    return torch.cat([runs[first] for first in sorted(runs)], dim)


def _runs(group: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of heads that are neighbours."""
    start = 0
    for end in range(1, len(group) + 1):
        if end == len(group) or group[end] != group[end - 1] + 1:
            yield group[start], end - start
            start = end


# The ops, group by group. Arguments as in ``ops``.


def compress(
    dense: Tensor,
    tokens: Tensor,
    form: HeadGroups,
    capacity: int,
    queries: Tensor | None,
    past: Sequence[Tensor] | None,
    attention: Tensor | None,
) -> list[Tensor]:
    size = 1 if queries is None else queries.shape[1] // dense.shape[1]
    rest, buffers = iter(past or ()), []
    for group, part in zip(form.groups, form.parts, strict=True):
        state = None if past is None else [next(rest) for _ in part.ranking.buffers(part)]
        buffers += torch.ops.mustafar.compress(
            taken(dense, group),
            tokens,
            part.encode(),
            capacity,
            None if queries is None else taken(queries, group, size=size),
            state or None,
            None if attention is None else taken(attention, group),
        )
    return buffers


def decompress(buffers: Sequence[Tensor], form: HeadGroups, length: int) -> Tensor:
    parts = zip(form.parts, form.split(buffers), strict=True)
    return put_back([torch.ops.mustafar.decompress(own, part.encode(), length) for part, own in parts], form.groups)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_form: HeadGroups,
    value_form: HeadGroups,
    position: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    *rest: object,
) -> Tensor:
    if key_form.groups != value_form.groups:
        raise ValueError(
            f"decode_attention was given keys in the groups of KV heads {key_form.groups} and values in "
            f"{value_form.groups}; accepted are the same"
        )
    size, results = query.shape[1] // key.shape[1], []
    if mask is not None:
        mask = with_four_dims(mask)
    of_groups = zip(
        key_form.groups, key_form.parts, value_form.parts, key_form.split(keys), value_form.split(values), strict=True
    )
    for group, key_part, value_part, own_keys, own_values in of_groups:
        by_head = mask is not None and mask.shape[1] != 1
        results.append(
            torch.ops.mustafar.decode_attention(
                taken(query, group, size=size),
                taken(key, group),
                taken(value, group),
                own_keys,
                own_values,
                key_part.encode(),
                value_part.encode(),
                position,
                taken(mask, group, size=size) if by_head else mask,
                None if sinks is None else taken(sinks, group, 0, size),
                *rest,
            )
        )
    return put_back(results, key_form.groups)
