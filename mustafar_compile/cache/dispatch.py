"""What torch's ops do with a ``CompressedKV``: act on the compressed form where they can, and else decompress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from ..lowering import ops
from ..lowering.format import order_for
from ..reporting.notices import notify_decompressed
from .tensor import CompressedKV
from .without_memory import is_view, read_only, refuse_lost_writes

aten = torch.ops.aten

BATCH = (0, -4)


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Carry out ``func``, one of whose arguments is a CompressedKV."""
    cache = _subject(args)
    if cache is not None:
        if func in (aten.detach.default, aten.alias.default):
            return _compat.tensors.return_and_correct_aliasing(func, args, kwargs, cache.alias())
        if cache.has_only_a_shape:
            if func._schema.is_mutable:
                return cache
        elif func in _ON_COMPRESSED:
            result = _ON_COMPRESSED[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
    refuse_lost_writes(func, args, kwargs)
    return _on_dense(func, args, kwargs)


def _subject(args: Any) -> CompressedKV | None:
    """The cache that an op is about: its first argument, or the first of a list."""
    first = args[0] if args else None
    if isinstance(first, list | tuple) and first:
        first = first[0]
    return first if isinstance(first, CompressedKV) else None


def _on_dense(func: Any, args: Any, kwargs: Any) -> Any:
    """Run any other op on decompressed values."""
    fake = [False]

    def expand(x: Any) -> Any:
        if not isinstance(x, CompressedKV):
            return x
        if x.has_only_a_shape:
            fake[0] = True
            return x.extent.new_empty(x.shape, dtype=x.dtype, device=x.device)
        notify_decompressed(func)
        return x.dense()

    args, kwargs = _compat.tensors.tree_map(expand, args), _compat.tensors.tree_map(expand, kwargs)
    result = func(*args, **kwargs)
    return read_only(result) if is_view(func) and not fake[0] else result


# What follows acts on the compressed form. NotImplemented: not with these arguments.


def _clone(cache: CompressedKV, memory_format: Any = None) -> CompressedKV:
    return cache.mapped(torch.clone)


def _to_copy(cache: CompressedKV, **how: Any) -> CompressedKV:
    if how.get("dtype", cache.dtype) not in (None, cache.dtype):
        return NotImplemented
    device, non_blocking = how.get("device") or cache.device, bool(how.get("non_blocking"))
    moved = cache.mapped(lambda buffer: buffer.to(device, copy=True, non_blocking=non_blocking))
    if not non_blocking:  # else it may be on its way, and caches that are only put aside come back as they were
        moved = moved.ordered(order_for(moved.device))
    return _pin(moved) if how.get("pin_memory") else moved


def _pin(cache: CompressedKV, device: Any = None) -> CompressedKV:
    return cache.mapped(torch.Tensor.pin_memory)


def _is_pinned(cache: CompressedKV, device: Any = None) -> bool:
    return all(buffer.is_pinned() for buffer in cache.buffers)


def _index_select(cache: CompressedKV, dim: int, index: Tensor) -> CompressedKV:
    return cache.mapped(lambda buffer: buffer.index_select(0, index)) if dim in BATCH else NotImplemented


def _index(cache: CompressedKV, indices: Sequence[Tensor | None]) -> CompressedKV:
    batch, *others = indices
    if batch is None or batch.dim() != 1 or any(index is not None for index in others):
        return NotImplemented
    return cache.mapped(lambda buffer: buffer[batch])


def _slice(
    cache: CompressedKV, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> CompressedKV:
    if not cache.grows:
        return NotImplemented
    if dim in BATCH:
        return _batch_view(cache, slice(start, end, step))
    first, stop, step = slice(start, end, step).indices(cache.tokens)
    return cache.crop(max(stop, 0)) if _is_tokens(cache, dim) and (first, step) == (0, 1) else NotImplemented


def _is_tokens(cache: CompressedKV, dim: int) -> bool:
    return dim % 4 == cache.tokens_dim


def _split(cache: CompressedKV, sizes: int | Sequence[int], dim: int = 0) -> list[CompressedKV]:
    if not cache.grows or dim not in BATCH:
        return NotImplemented
    batch = cache.shape[0]
    sizes = [min(sizes, batch - first) for first in range(0, batch, sizes)] if isinstance(sizes, int) else sizes
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_batch_view(cache, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def _batch_view(cache: CompressedKV, rows: slice) -> CompressedKV:
    """A part of the batch of a growing cache. It is a copy, so a write into it would not reach the whole."""
    view = cache.mapped(lambda buffer: buffer[rows].clone())
    view.writable = False
    return view


def _cat(caches: Sequence[Any], dim: int = 0) -> CompressedKV:
    first = caches[0]
    if dim not in BATCH or not all(_joinable(first, cache) for cache in caches):
        return NotImplemented
    capacity = max(cache.capacity for cache in caches)
    for cache in caches:
        cache.reserve(capacity)
    return first.like(map(torch.cat, zip(*(cache.own_buffers() for cache in caches), strict=True)))


def _joinable(a: Any, b: Any) -> bool:
    form = ("format", "grows", "tokens_dim", "dtype", "device")
    return (
        isinstance(b, CompressedKV)
        and all(getattr(a, name) == getattr(b, name) for name in form)
        and a.shape[1:] == b.shape[1:]
    )


def _zero(cache: CompressedKV) -> CompressedKV:
    """All zeros: of as many tokens where the cache grows, of none where it is static (HF resets its cache so)."""
    if cache.grows and not (cache.writable and cache.is_latest()):
        return NotImplemented
    for buffer, x in zip(cache.format.buffers, cache.buffers, strict=True):
        (x[:, 2:] if cache.grows and buffer.name == "counts" else x).zero_()
    return cache


def _index_copy(cache: CompressedKV, dim: int, position: Tensor, rows: Tensor) -> CompressedKV:
    """New tokens in a static cache; what lay behind them is not written any more."""
    if cache.grows or not _is_tokens(cache, dim):
        return NotImplemented
    notify_decompressed(aten.index_copy_.default)
    dense = cache.dense().index_copy_(dim, position, rows)
    dense = dense if cache.tokens_dim == 2 else dense.transpose(1, 2)
    tokens = position.max().reshape(1) + 1
    state = cache.format.state_of(cache.buffers)
    packed = ops.compress(dense, tokens, cache.format.encode(), cache.capacity, None, state)
    for mine, new in zip(cache.buffers, packed, strict=True):
        mine.copy_(new)
    return cache


_ON_COMPRESSED: dict[Any, Callable[..., Any]] = {
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten._pin_memory.default: _pin,
    aten.is_pinned.default: _is_pinned,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.cat.default: _cat,
    aten.zero_.default: _zero,
    aten.index_copy_.default: _index_copy,
}

CompressedKV.dispatch = staticmethod(dispatch)
