"""The ops on a GPU: which kernel runs, with which constants, on which grid.

Each function has the arguments and the results of its namesake in ``portable``. A decode step is three launches:
``attend`` (over the tokens pruned before, split over the GPU), ``append`` (new tokens, pruning, attention over the
window and the leaving tokens; where the GPU can, beside ``attend``), ``combine`` (one softmax; moves the counts on).
Nothing is read on the host, so they can be captured in a CUDA graph, and the work follows the length that the device
holds, not the capacity.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import render
from .format import BLOCK_TOKENS, Layout
from .masks import decides_later, with_four_dims
from .ptx.prune import Prune
from .step import COMBINE_REGISTERS, STATIC_SHARED_BYTES, Step, Tuned, cdiv, padded

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MAX_HEAD_DIM = 256
_COMPRESS_WARPS = 4
_PORTABLE_PROGRAMS = 4  # to a multiprocessor


def supports(*caches: Tensor) -> bool:
    """Whether the kernels take caches like these [B, H, S, D]: one (K or V), or a layer's windows of both."""
    first = caches[0]
    if any(x.dtype not in DTYPE_NAMES or x.shape[3] % 8 or x.shape[3] > MAX_HEAD_DIM for x in caches):
        return False
    return all((x.dtype, x.shape[:3]) == (first.dtype, first.shape[:3]) for x in caches)


def compress(
    dense: Tensor, tokens: Tensor, kept: int, window: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``portable.compress``."""
    batch, heads, length, head_dim = dense.shape
    layout = Layout.interned(head_dim, kept, window)
    shapes = layout.buffers(batch, heads, capacity, dense.dtype)
    values, bitmap = (torch.empty(shape, dtype=dtype, device=dense.device) for shape, dtype in shapes[:2])
    ring, counts = (torch.zeros(shape, dtype=dtype, device=dense.device) for shape, dtype in shapes[2:])
    if dense.numel() == 0:
        return values, bitmap, ring, counts
    buffers = values, bitmap, ring, counts
    prune = Prune(layout.words, kept, _COMPRESS_WARPS, DTYPE_NAMES[dense.dtype])
    module, block_count = _compressor(prune if _prunes_by_lane(dense, prune) else None, layout, dense.dtype)
    grid = (batch * heads * cdiv(length, BLOCK_TOKENS * block_count),)
    module.compress[grid](
        dense, tokens, *buffers, heads, length, values.shape[2], *dense.stride(), num_warps=_COMPRESS_WARPS
    )
    return buffers


def _prunes_by_lane(dense: Tensor, prune: Prune) -> bool:
    """Whether the tuned kernel can take ``dense``: whole bitmap words, rows of 16-byte units, registers for a row."""
    strides = dense.stride()
    aligned = dense.data_ptr() % 16 == 0 and strides[3] == 1 and all(s % 8 == 0 for s in strides[:3])
    whole = dense.shape[3] % 32 == 0 and dense.shape[3] <= 128 and dense.dtype != torch.float32
    return whole and aligned and prune.shared_bytes <= STATIC_SHARED_BYTES and _runs_ptx(dense.device)


@functools.cache
def _runs_ptx(device: torch.device) -> bool:
    """Whether the device has what the inline PTX uses: NVIDIA's tensor cores with bfloat16, from sm_80 on."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _compressor(prune: Prune | None, layout: Layout, dtype: torch.dtype) -> tuple[ModuleType, int]:
    """The compressing kernel, tuned or portable, and how many blocks of tokens a program takes."""
    constants = _constants(layout) | {"dtype": DTYPE_NAMES[dtype]}
    if prune is None:
        return render.kernels("compress", **constants, padded=padded(layout.head_dim)), 1
    return render.kernels("compress_nvidia", **constants, warps=prune.warps, block=prune.block()), prune.warps


def decompress(values: Tensor, bitmap: Tensor, window: Tensor, counts: Tensor, length: int) -> Tensor:
    """See ``portable.decompress``."""
    batch, heads, _, head_dim = window.shape
    dense = torch.empty(batch, heads, length, head_dim, dtype=window.dtype, device=window.device)
    if dense.numel() == 0:
        return dense
    module = _decompressor(Layout.of_buffers(values, bitmap, window, counts))
    grid = (batch * heads * cdiv(length, BLOCK_TOKENS),)
    module.decompress[grid](values, bitmap, window, counts, dense, length, values.shape[2])
    return dense


@functools.cache
def _decompressor(layout: Layout) -> ModuleType:
    return render.kernels("decompress", **_constants(layout), padded=padded(layout.head_dim))


def _constants(layout: Layout) -> dict[str, Any]:
    return asdict(layout) | {"words": layout.words, "ring": layout.ring}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # in Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _splits(rows: int, blocks: int, programs: int, blocks_a_round: int) -> int:
    """Programs to share a row: as many as run at once, since a second wave would run with most of the GPU idle."""
    return max(1, min(programs // rows, cdiv(blocks, blocks_a_round)))


def _splits_for(attending: Tuned | Step, rows: int, blocks: int, device: torch.device) -> int:
    if isinstance(attending, Step):
        return _splits(rows * attending.row_tiles, blocks, _multiprocessors(device) * _PORTABLE_PROGRAMS, 1)
    programs = _multiprocessors(device) * attending.programs
    return _splits(rows * attending.chunks, blocks, programs, attending.warps)


def _step(
    keys: Layout,
    values: Layout,
    group: int,
    queries: int,
    dtype: torch.dtype,
    mask: Tensor | None,
    sinks: Tensor | None,
    softcap: float,
) -> Step:
    return Step(
        key_dim=keys.head_dim,
        value_dim=values.head_dim,
        key_kept=keys.kept,
        value_kept=values.kept,
        window=keys.window,
        group=group,
        queries=queries,
        dtype=DTYPE_NAMES[dtype],
        mask="none" if mask is None else "boolean" if mask.dtype == torch.bool else "additive",
        sees_later=decides_later(mask),
        sinks=sinks is not None,
        softcap=softcap != 0,
    )


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_values: Tensor,
    key_bitmap: Tensor,
    key_window: Tensor,
    key_counts: Tensor,
    value_values: Tensor,
    value_bitmap: Tensor,
    value_window: Tensor,
    value_counts: Tensor,
    position: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    variant: str = "tuned",
    overlap: bool = True,
) -> Tensor:
    """See ``portable.decode_attention``.

    variant: "tuned" (where it can run) or "portable". overlap: run ``append`` beside ``attend`` where the GPU can; off,
    each kernel can be timed alone.
    """
    batch, query_heads, queries, _ = query.shape
    heads, value_dim = value_window.shape[1], value_window.shape[3]
    result = torch.empty(batch, query_heads, queries, value_dim, dtype=query.dtype, device=query.device)
    if result.numel() == 0:
        return result
    key_layout = Layout.of_buffers(key_values, key_bitmap, key_window, key_counts)
    value_layout = Layout.of_buffers(value_values, value_bitmap, value_window, value_counts)
    step = _step(key_layout, value_layout, query_heads // heads, queries, key_window.dtype, mask, sinks, softcap)
    rows, key_blocks, value_blocks = batch * heads, key_values.shape[2], value_values.shape[2]
    aligned = all(x.data_ptr() % 16 == 0 for x in (key_values, key_bitmap, value_values, value_bitmap))
    usable = aligned and key_blocks == value_blocks and _runs_ptx(query.device)
    tuned = step.tuned() if variant == "tuned" and usable else None
    splits = _splits_for(tuned or step, rows, max(key_blocks, value_blocks), query.device)
    parts = splits + step.window_parts
    overlap = overlap and tuned is not None and _overlaps(query.device)

    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    sums = torch.empty(rows, parts, step.query_rows, value_dim, dtype=torch.float32, device=query.device)
    states = torch.empty(rows, parts, step.query_rows, 2, dtype=torch.float32, device=query.device)
    moved = torch.empty(3, dtype=torch.int64, device=query.device)
    keys, values = (key_values, key_bitmap), (value_values, value_bitmap)
    at = key_counts if position is None else position
    sinks = sinks if sinks is None else sinks.contiguous()
    given, *strides = _mask_arguments(mask, query.shape)
    rest = (key_blocks, value_blocks, heads, *strides, scale, softcap)

    if tuned is not None:
        tuned.kernel(overlap).attend[rows * tuned.chunks, splits](
            query.view(torch.int32), *keys, *values, key_counts, at, given, sums, states, splits, *rest,
            num_warps=tuned.warps, maxnreg=tuned.registers,
        )  # fmt: skip
    else:
        step.portable().attend[rows * step.row_tiles, splits](
            query, *keys, *values, key_counts, at, given, sums, states, splits, *rest
        )
    early = {"launch_pdl": True} if overlap else {}
    step.append(overlap).append[rows, step.window_parts](
        query, key, value, *keys, key_window, key_counts, *values, value_window, value_counts, at, given, sums, states,
        moved, splits, *rest, num_warps=step.append_warps, **early,
    )  # fmt: skip
    combined, channels = _to_combine(rows, step.query_rows, value_dim, _multiprocessors(query.device))
    combine = step.combine(parts, combined, channels, tuned is not None, overlap)
    few = {"maxnreg": COMBINE_REGISTERS} if tuned is not None else {}
    combine.combine[rows * step.query_rows // combined, cdiv(value_dim, channels)](
        query, *keys, *values, given, sinks, sums, states, moved, result, key_counts, value_counts, parts, *rest,
        **early, **few,
    )  # fmt: skip
    return result


def _to_combine(rows: int, query_rows: int, head_dim: int, multiprocessors: int) -> tuple[int, int]:
    """Query rows of a KV head and channels to a program of the combining kernel: enough programs for the GPU, no more.

    A program costs about as much for four query rows as for one.
    """
    combined, channels = 1, padded(head_dim)
    programs = rows * query_rows
    while query_rows % (2 * combined) == 0 and combined < 4 and programs // (2 * combined) >= multiprocessors:
        combined *= 2
    while channels > 16 and programs // combined * cdiv(head_dim, channels) < 2 * multiprocessors and combined == 1:
        channels //= 2
    return combined, channels


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel can start while the one ahead of it runs (programmatic dependent launch)."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _mask_arguments(mask: Tensor | None, queries: torch.Size) -> tuple[Any, ...]:
    """The mask as the kernels take it, its strides by batch, query head, query token and token, and its tokens."""
    if mask is None:
        return None, 0, 0, 0, 0, 1
    mask = with_four_dims(mask)
    expanded = mask.expand(*queries[:3], mask.shape[-1])
    strides, tokens = expanded.stride(), mask.shape[-1]
    if mask.dtype == torch.bool:
        expanded = expanded.view(torch.uint8)
    return expanded, *strides, tokens
