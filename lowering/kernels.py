"""The ops on a GPU: which kernel runs, with which constants, on which grid.

Each function has the arguments and the results of its namesake in ``portable``. A decode step is three launches:
``attend`` (over the tokens pruned before, split over the GPU), ``append`` (new tokens, pruning, attention over the
window and the leaving tokens; where the GPU can, beside ``attend``), ``combine`` (one softmax; moves the counts on).
Nothing is read on the host, so they can be captured in a CUDA graph, and the work follows the length that the device
holds, not the capacity.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import render
from .backends import runs_ptx
from .codes import level_table
from .decode_step import DecodeStep, with_rows
from .format import BLOCK_TOKENS, Format
from .launches import Launch, launch
from .masks import with_four_dims
from .ptx.prune import Prune
from .step import (
    COMBINE_REGISTERS,
    DTYPE_NAMES,
    MASK_PIECE,
    STATIC_SHARED_BYTES,
    Step,
    Tuned,
    cdiv,
    padded,
)

_PACKED = ("values", "bitmap", "peaks", "floors")  # what formats have of packed rows, some of them
_COMPRESS_WARPS = 4
_PORTABLE_PROGRAMS = 4  # to a multiprocessor
_ROUNDS_OF_A_PROGRAM = 1  # that its start and its end take as long as: a split's price
_MOST_WAVES = 4  # of programs of ``attend``, where rows are shared


def compress(
    dense: Tensor, tokens: Tensor, format: Format, capacity: int, weights: Tensor | None = None
) -> list[Tensor]:
    """See ``portable.compress``."""
    batch, heads, length, _ = dense.shape
    buffers = [
        (torch.empty if buffer.grows else torch.zeros)(shape, dtype=dtype, device=dense.device)
        for buffer, (shape, dtype) in zip(
            format.buffers, format.shapes(batch, heads, capacity, dense.dtype), strict=True
        )
    ]
    if dense.numel() == 0:
        return buffers
    tokens = tokens.reshape(-1).expand(batch)
    weighted = weights is not None
    prune = Prune(format.words, format.kept, _COMPRESS_WARPS, DTYPE_NAMES[dense.dtype], format.code, weighted)
    weights = None if weights is None else weights.contiguous()
    by_lane = _prunes_by_lane(dense, prune) and (weights is None or weights.data_ptr() % 16 == 0)
    module, block_count = _compressor(prune if by_lane else None, format, dense.dtype, weighted)
    grid = (batch * heads * cdiv(length, BLOCK_TOKENS * block_count),)
    blocks = format.capacity_of(buffers) // BLOCK_TOKENS
    module.compress[grid](
        dense,
        tokens,
        *buffers,
        *(tokens.stride(0), heads, length, blocks, *dense.stride()),
        **({"levels": _levels(dense.device)} if by_lane and format.code == "int4" else {}),
        **({} if weights is None else {"weights": weights}),
        num_warps=_COMPRESS_WARPS,
    )
    return buffers


def _prunes_by_lane(dense: Tensor, prune: Prune) -> bool:
    """Whether the tuned kernel can take ``dense``: whole bitmap words, rows of 16-byte units, registers for a row."""
    strides = dense.stride()
    aligned = dense.data_ptr() % 16 == 0 and strides[3] == 1 and all(s % 8 == 0 for s in strides[:3])
    whole = dense.shape[3] % 32 == 0 and dense.shape[3] <= 128 and dense.dtype != torch.float32
    return whole and aligned and prune.shared_bytes <= STATIC_SHARED_BYTES and runs_ptx(dense.device)


@functools.cache
def _compressor(
    prune: Prune | None, format: Format, dtype: torch.dtype, by_weights: bool = False
) -> tuple[ModuleType, int]:
    """The compressing kernel, tuned or portable, and how many blocks of tokens a program takes."""
    constants = {"format": format, "dtype": DTYPE_NAMES[dtype], "by_weights": by_weights}
    if prune is None:
        return render.kernels("compress", **constants, padded=padded(format.head_dim)), 1
    return render.kernels("compress_nvidia", **constants, warps=prune.warps, block=prune.block()), prune.warps


def decompress(buffers: Sequence[Tensor], format: Format, length: int) -> Tensor:
    """See ``portable.decompress``."""
    window = format.window_of(buffers)
    batch, heads, _, head_dim = window.shape
    dense = torch.empty(batch, heads, length, head_dim, dtype=window.dtype, device=window.device)
    if dense.numel() == 0:
        return dense
    grid = (batch * heads * cdiv(length, BLOCK_TOKENS),)
    _decompressor(format).decompress[grid](*buffers, dense, heads, length, format.capacity_of(buffers) // BLOCK_TOKENS)
    return dense


@functools.cache
def _decompressor(format: Format) -> ModuleType:
    return render.kernels("decompress", format=format, padded=padded(format.head_dim))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # in Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _splits(rows: int, blocks: int, multiprocessors: int, resident: int, blocks_a_round: int) -> int:
    """Programs to share a row, so that the GPU is done soonest.

    resident: programs that a multiprocessor holds. Programs run in waves of so many to each multiprocessor. What is
    left for the last wave takes more than its share of a wave's time: fewer programs hide less of each other's waiting.
    """

    def duration(splits: int) -> float:
        whole, left = divmod(cdiv(rows * splits, multiprocessors), resident)
        waves = whole + ((1 + left / resident) / 2 if left else 0)
        return waves * (blocks / (blocks_a_round * splits) + _ROUNDS_OF_A_PROGRAM)

    most = min(cdiv(blocks, blocks_a_round), _MOST_WAVES * multiprocessors * resident // rows)
    return min(range(1, max(1, most) + 1), key=duration)


def _splits_for(attending: Tuned | Step, rows: int, blocks: int, device: torch.device) -> int:
    if isinstance(attending, Step):
        return _splits(rows * attending.row_tiles, blocks, _multiprocessors(device), _PORTABLE_PROGRAMS, 1)
    return _splits(rows * attending.chunks, blocks, _multiprocessors(device), attending.programs, attending.warps)


def decode_attention(
    asked: DecodeStep, *, variant: str = "tuned", overlap: bool = True, checked: bool = True
) -> Tensor:
    """See ``portable.decode_attention``.

    variant: "tuned", where it serves, or "portable". overlap: kernels may run side by side. checked: assert on the
    device what ``checks`` says. Without it a bad position gives a result that means nothing, but no index leaves a
    buffer.
    """
    query, key, value, keys, values, key_format, value_format, position, mask, sinks, scale, softcap, length, *_ = asked
    (batch, query_heads, queries, _), heads = query.shape, key.shape[1]
    device = query.device
    result = torch.empty(batch, query_heads, queries, value_format.head_dim, dtype=query.dtype, device=device)
    if result.numel() == 0:
        return result
    # What must be copied is so before the first launch: a kernel that starts early waits only for the one ahead of it.
    query, key, value = (with_rows(x) for x in (query, key, value))
    sinks = None if sinks is None else sinks.contiguous()
    ranked = {"key": asked.key_weights, "value": asked.value_weights}
    weights = {role: _of_each_token(w, queries) for role, w in ranked.items() if w is not None}
    step = Step.of(key_format, value_format, query_heads // heads, queries, query.dtype, mask, sinks, softcap)
    cache = _by_name("key", key_format, keys) | _by_name("value", value_format, values)
    packed = {name: x for name, x in cache.items() if name.endswith(_PACKED)}
    blocks = {
        f"{role}_blocks": format.capacity_of(buffers) // BLOCK_TOKENS
        for role, format, buffers in (("key", key_format, keys), ("value", value_format, values))
    }
    aligned = all(x is None or x.data_ptr() % 16 == 0 for x in packed.values())
    usable = aligned and len(set(blocks.values())) == 1 and runs_ptx(device)
    tuned = step.tuned(_is_hopper(device)) if variant == "tuned" and usable else None
    overlap = overlap and tuned is not None and _is_hopper(device)

    rows = batch * heads
    splits = _splits_for(tuned or step, rows, max(blocks.values()), device)
    scratch = _scratch(rows, splits + step.window_parts, step, batch, device)
    at = cache["key_counts"][:, 0] if position is None else position.reshape(-1).expand(batch)
    given: dict[str, Any] = {
        **_placed("query", query),
        **blocks,
        "kv_heads": heads,
        "scale": scale,
        "softcap": softcap,
    }
    given |= _mask_arguments(mask, query.shape) | {"sums": scratch["sums"], "states": scratch["states"]}
    placed = {"position": at, "position_batch": at.stride(0), "splits": splits}

    attending = given | packed | placed | {"counts": cache["key_counts"]}
    if tuned is None:
        attend = Launch(step.portable().attend, (rows * step.row_tiles, splits), attending)
    else:
        attending |= _placed("query", _in_words(query))
        attending["levels"] = _levels(device) if tuned.decode.has_table else None
        attending |= {"num_warps": tuned.warps, "maxnreg": tuned.registers}
        attend = Launch(tuned.kernel(overlap).attend, (rows * tuned.chunks, splits), attending)

    early: dict[str, Any] = {"launch_pdl": True} if overlap else {}
    room = blocks["key_blocks"] * BLOCK_TOKENS + key_format.window if length is None else length
    mask_pieces = 0 if length is None or mask is None else cdiv(mask.shape[-1], MASK_PIECE) * checked
    new = _placed("key", key) | _placed("value", value) | {"moved": scratch["moved"], "length": room}
    new |= {f"{role}_weights": w for role, w in weights.items()}
    asserting = {"sanitize_overflow": False} if device.type == "cuda" else {}  # of all assertions, only our own
    appending = given | cache | placed | new | {"num_warps": step.append_warps} | early | asserting
    module = step.append(overlap, checked, tuple(weights))
    append = Launch(module.append, (rows, step.window_parts + mask_pieces), appending)

    parts = splits + step.window_parts
    combining = given | packed | {name: cache[name] for name in ("key_counts", "value_counts")} | early
    combining |= {"sinks": sinks, "moved": scratch["moved"], "result": result, "parts": parts, "num_warps": 1}
    combining |= {"maxnreg": COMBINE_REGISTERS} if tuned is not None else {}
    module = step.combine(parts, tuned is not None, overlap)
    shares = cdiv(value_format.head_dim, step.channels_at_once(parts))
    launch([attend, append, Launch(module.combine, (rows * step.query_rows, shares), combining)], device)
    return result


@functools.cache
def _levels(device: torch.device) -> Tensor:
    """The levels of int4, [128, 8]: a row for each floor."""
    return torch.tensor(level_table(), dtype=torch.uint8, device=device)


def _by_name(role: str, format: Format, buffers: Sequence[Tensor]) -> dict[str, Any]:
    """The buffers of K or V as the kernels of a step call them: None in place of what the format does not have."""
    named = dict.fromkeys(_PACKED) | format.named(buffers)
    return {f"{role}_{name}": x for name, x in named.items()}


def _placed(name: str, x: Tensor) -> dict[str, Any]:
    """Rows [B, H, L, D] as the kernels take them: where they are, and the strides of all but the channels."""
    return {name: x} | {f"{name}_{dim}": x.stride(i) for i, dim in enumerate(("batch", "head", "token"))}


def _in_words(query: Tensor) -> Tensor:
    """A query of 16-bit elements as words of 32 bits, copied if its rows do not begin at whole ones."""
    whole = query.data_ptr() % 4 == 0 and not any(n % 2 for n in (query.storage_offset(), *query.stride()[:3]))
    return (query if whole else query.clone(memory_format=torch.contiguous_format)).view(torch.int32)


def _of_each_token(weights: Tensor, tokens: int) -> Tensor:
    """Weights [B, H, L or 1, D] of each of L tokens."""
    return weights.expand(-1, -1, tokens, -1).contiguous()


def _scratch(rows: int, parts: int, step: Step, batch: int, device: torch.device) -> dict[str, Tensor]:
    """What the kernels of a step leave for ``combine``, for each of the ``parts`` that share a KV head.

    sums: of values times weights, float32. states: the maximum (base 2) that the weights are relative to, and the sum
    of the weights. moved: for each row of the batch, tokens and the first one in the ring after the step, and the first
    that was exact before it.
    """
    leading = rows, parts, step.query_rows
    return {
        "sums": torch.empty(*leading, step.value.head_dim, dtype=torch.float32, device=device),
        "states": torch.empty(*leading, 2, dtype=torch.float32, device=device),
        "moved": torch.empty(batch, 3, dtype=torch.int64, device=device),
    }


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Whether a kernel can start while the one ahead of it runs (programmatic dependent launch), and store matrices."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _mask_arguments(mask: Tensor | None, queries: torch.Size) -> dict[str, Any]:
    """The mask as the kernels take it, its strides by batch, query head, query token and token, and its tokens."""
    names = ("mask", "mask_batch", "mask_head", "mask_query", "mask_token", "mask_tokens")
    if mask is None:
        return dict(zip(names, (None, 0, 0, 0, 0, 1), strict=True))
    mask = with_four_dims(mask)
    expanded = mask.expand(*queries[:3], mask.shape[-1])
    strides, tokens = expanded.stride(), mask.shape[-1]
    if mask.dtype == torch.bool:
        expanded = expanded.view(torch.uint8)
    return dict(zip(names, (expanded, *strides, tokens), strict=True))
