"""Caches in groups of KV heads: the ops over them, which take one group after the other. See ``head_groups``.

Heads are taken and put back as runs of neighbours, which are views and one copy; an index would be one more tensor on
the device. Arguments are those of ``ops``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .decode_step import DecodeStep
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


def decode_attention(step: DecodeStep) -> Tensor:
    key_form, value_form, mask = step.key_format, step.value_format, step.mask
    groups = key_form.groups
    if groups is None or groups != value_form.groups:
        raise ValueError(
            f"decode_attention was given keys in the groups of KV heads {groups} and values in {value_form.groups}; "
            "accepted are both in the same"
        )
    size, results = step.group, []
    mask = None if mask is None else with_four_dims(mask)
    by_head = mask is not None and mask.shape[1] != 1
    key_parts = zip(key_form.parts, key_form.split(step.keys), strict=True)
    value_parts = zip(value_form.parts, value_form.split(step.values), strict=True)
    for group, (key_part, keys), (value_part, values) in zip(groups, key_parts, value_parts, strict=True):
        own = step._replace(
            query=taken(step.query, group, size),
            key=taken(step.key, group),
            value=taken(step.value, group),
            keys=keys,
            values=values,
            key_format=key_part.encode(),
            value_format=value_part.encode(),
            mask=_of(mask, group, size) if by_head else mask,
            sinks=_of(step.sinks, group, size, dim=0),
        )
        results.append(torch.ops.mustafar.decode_attention(*own[:-2]))  # weights are what it asks strategies for
    return put_back(results, groups)


def _of(x: Tensor | None, group: Sequence[int], size: int = 1, dim: int = 1) -> Tensor | None:
    return None if x is None else taken(x, group, size, dim)
