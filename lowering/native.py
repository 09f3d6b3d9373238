"""The ops on a CPU, by C++ kernels (``builds``).

Each function has the arguments and the results of its namesake in ``portable``, and simd, which kind of vectors a build
has. Where it cannot be built, NotBuiltError is raised.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import builds
from .checks import OUT_OF_PLACE, UNWRITTEN
from .decode_step import DecodeStep, with_rows
from .format import Format
from .masks import with_four_dims

_MASK_KINDS = {None: 0, torch.bool: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}
_PROBLEMS = {1: OUT_OF_PLACE, 2: UNWRITTEN}


class _Cache(ctypes.Structure):
    """``Cache`` of cpp/cache.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "bitmap", "peaks", "floors", "window", "counts")]
    _fields_ += [(name, ctypes.c_int64) for name in ("blocks", "kept")]


class _Rows(ctypes.Structure):
    """``Rows`` of cpp/step.cpp."""

    _fields_ = [("first", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int64) for name in ("batch_stride", "head_stride", "token_stride")]


class _Step(ctypes.Structure):
    """``Step`` of cpp/step.cpp."""

    _fields_ = [(name, _Rows) for name in ("query", "key", "value")]
    _fields_ += [("keys", _Cache), ("values", _Cache)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("position", "mask", "sinks", "out")]
    _fields_ += [
        (name, ctypes.c_int64)
        for name in (
            *("position_stride", "mask_kind", "mask_batch", "mask_head", "mask_query", "mask_token"),
            *("mask_tokens", "mask_queries", "batch", "heads", "queries", "window", "length", "threads"),
        )
    ]
    _fields_ += [(name, ctypes.c_double) for name in ("scale", "softcap")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("key_weights", "value_weights")]


class _Prompt(ctypes.Structure):
    """``Prompt`` of cpp/prompt.cpp."""

    _fields_ = [("dense", ctypes.c_void_p), ("cache", _Cache)]
    _fields_ += [
        (name, ctypes.c_int64)
        for name in (
            *("batch_stride", "head_stride", "token_stride"),
            *("batch", "heads", "tokens", "window", "threads"),
        )
    ]
    _fields_ += [("weights", ctypes.c_void_p)]


def _cache(format: Format, buffers: Sequence[Tensor]) -> _Cache:
    assert format.order == "rows", f"C++ kernels do not read {format}"
    pointers = {name: x.data_ptr() for name, x in format.named(buffers).items()}
    return _Cache(blocks=buffers[0].shape[2], kept=format.kept, **pointers)


def compress(
    dense: Tensor, tokens: Tensor, format: Format, capacity: int, weights: Tensor | None = None, *, simd: str = ""
) -> list[Tensor]:
    """See ``portable.compress``. What is not pruned yet is not packed either: nothing reads it."""
    batch, heads, length, _ = dense.shape
    dense = with_rows(dense)
    shapes = format.shapes(batch, heads, capacity, dense.dtype)
    buffers = [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes]  # so that files hold nothing of others
    counts, tokens = buffers[format.place("counts")], tokens.reshape(-1).clamp(max=length)
    counts[:, 0], counts[:, 1], counts[:, 2] = tokens, (tokens - format.ring).clamp(min=0), 0
    _run("compress", dense, format, buffers, length, simd, _as_weights(weights, 1))
    return buffers


def decompress(buffers: Sequence[Tensor], format: Format, length: int, *, simd: str = "") -> Tensor:
    """See ``portable.decompress``."""
    window = format.window_of(buffers)
    dense = window.new_empty(*window.shape[:2], length, format.head_dim)
    _run("decompress", dense, format, buffers, length, simd)
    return dense


def _run(
    what: str,
    dense: Tensor,
    format: Format,
    buffers: Sequence[Tensor],
    tokens: int,
    simd: str,
    weights: Tensor | None = None,
) -> None:
    batch, heads = dense.shape[:2]
    if not batch * heads:
        return
    library = builds.built(builds.prepare_prompt(format, dense.dtype, simd))
    given = _Prompt(
        dense.data_ptr(),
        _cache(format, buffers),
        *dense.stride()[:3],
        *(batch, heads, tokens, format.window, torch.get_num_threads()),
        _address(weights),
    )
    getattr(library, what)(ctypes.byref(given))


def decode_attention(step: DecodeStep, *, simd: str = "") -> Tensor:
    """See ``portable.decode_attention``."""
    key_format, value_format = step.key_format, step.value_format
    (batch, query_heads, count, _), heads = step.query.shape, step.key.shape[1]
    out = step.query.new_empty(batch, query_heads, count, value_format.head_dim)
    if not out.numel():
        return out
    library = builds.built(builds.prepare_step(key_format, value_format, out.dtype, query_heads // heads, simd))
    # Held until the call is over.
    tokens = [with_rows(x) for x in (step.query, step.key, step.value)]
    sinks = None if step.sinks is None else step.sinks.float().contiguous()
    position = None if step.position is None else step.position.reshape(-1).to(torch.int64)
    mask = None if step.mask is None else _as_read(step.mask)
    weights = [_as_weights(w, count) for w in (step.key_weights, step.value_weights)]
    length = -1 if step.length is None else step.length
    given = _Step(
        *(_Rows(x.data_ptr(), *x.stride()[:3]) for x in tokens),
        _cache(key_format, step.keys),
        _cache(value_format, step.values),
        *map(_address, (position, mask, sinks, out)),
        0 if position is None or position.numel() == 1 else position.stride(0),
        *_described(mask),
        *(batch, heads, count, key_format.window, length, torch.get_num_threads()),
        *(step.scale, step.softcap),
        *map(_address, weights),
    )
    if problem := library.decode_attention(ctypes.byref(given)):
        raise RuntimeError(_PROBLEMS[problem])
    return out


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _as_weights(weights: Tensor | None, tokens: int) -> Tensor | None:
    """Weights [B, H, L or 1, D] as the kernels read them, one row for each of L tokens."""
    return None if weights is None else weights.expand(-1, -1, tokens, -1).float().contiguous()


def _as_read(mask: Tensor) -> Tensor:
    """``mask`` with all its dimensions and a dtype that the kernel reads."""
    mask = with_four_dims(mask)
    return mask if mask.dtype in _MASK_KINDS else mask.float()


def _described(mask: Tensor | None) -> tuple[int, ...]:
    """Its kind, its strides (0 where it has the same for all), how many tokens and query tokens it tells apart."""
    if mask is None:
        return (0,) * 7
    strides = (stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return (_MASK_KINDS[mask.dtype], *strides, mask.shape[-1], mask.shape[-2])
