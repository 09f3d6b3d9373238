"""Caches in groups of KV heads: the ops over them, which take one group after the other. See ``head_groups``.

Heads are taken and put back as runs of neighbours, which are views and one copy; an index would be one more tensor on
the device. Arguments are those of ``ops``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .head_groups import Groups, HeadGroups
from .masks import with_four_dims


def taken(x: Tensor, group: Sequence[int], size: int = 1, dim: int = 1) -> Tensor:
    """The heads of a group, of which each is ``size`` places side by side along ``dim``."""
    runs = [x.narrow(dim, size * first, size * count) for first, count in _runs(group)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim)


def put_back(parts: Sequence[Tensor], groups: Groups) -> Tensor:
    """All heads in order again, along dimension 1. parts: of each group, as many places for each of its heads."""
    size = parts[0].shape[1] // len(groups[0])
    runs = {}
    for part, group in zip(parts, groups, strict=True):
        done = 0
        for first, count in _runs(group):
            runs[first] = part.narrow(1, size * done, size * count)
            done += count
    return torch.cat([runs[first] for first in sorted(runs)], 1)


def _runs(group: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of heads that are neighbours."""
    start = 0
    for end in range(1, len(group) + 1):
        if end == len(group) or group[end] != group[end - 1] + 1:
            yield group[start], end - start
            start = end


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
    states, buffers = iter(past or ()), []
    for group, part in zip(form.groups, form.parts, strict=True):
        state = None if past is None else [next(states) for _ in part.ranking.buffers(part)]
        seen = _of(queries, group, size), state or None, _of(attention, group)
        buffers += torch.ops.mustafar.compress(taken(dense, group), tokens, part.encode(), capacity, *seen)
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
    *rest: Any,
) -> Tensor:
    if key_form.groups != value_form.groups:
        raise ValueError(
            f"decode_attention was given keys in the groups of KV heads {key_form.groups} and values in "
            f"{value_form.groups}; accepted are the same"
        )
    size, results = query.shape[1] // key.shape[1], []
    mask = None if mask is None else with_four_dims(mask)
    by_head = mask is not None and mask.shape[1] != 1
    caches = zip(key_form.parts, value_form.parts, key_form.split(keys), value_form.split(values), strict=True)
    for group, (key_part, value_part, *buffers) in zip(key_form.groups, caches, strict=True):
        tokens = taken(query, group, size), taken(key, group), taken(value, group)
        others = _of(mask, group, size) if by_head else mask, _of(sinks, group, size, dim=0)
        cache = *buffers, key_part.encode(), value_part.encode()
        results.append(torch.ops.mustafar.decode_attention(*tokens, *cache, position, *others, *rest))
    return put_back(results, key_form.groups)


def _of(x: Tensor | None, group: Sequence[int], size: int = 1, dim: int = 1) -> Tensor | None:
    return None if x is None else taken(x, group, size, dim)
