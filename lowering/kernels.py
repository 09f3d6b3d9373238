"""The ops on a GPU: which kernel runs, with which constants, on which grid.

Each function has the arguments and the results of its namesake in ``portable``. A decode step is three launches:
``attend`` (over the tokens pruned before, split over the GPU), ``append`` (the new token, pruning, attention over the
window and the leaving token; where the GPU can, beside ``attend``), ``combine`` (one softmax; moves the counts on).
Nothing is read on the host, so they can be captured in a CUDA graph, and the work follows the length that the device
holds, not the capacity.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import render
from .layout import BLOCK_TOKENS, Layout
from .ptx.decode import Decode, Rows
from .ptx.prune import Prune

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MAX_HEAD_DIM = 256
_STATIC_SHARED_BYTES = 48 * 1024
_COMPRESS_WARPS = 4
_SLOTS_A_WARP = 8  # of the window
# Arguments of which a new value does not compile the kernels of a step anew.
_INTEGERS = (
    *("splits", "parts", "blocks", "key_blocks", "value_blocks", "kv_heads"),
    *("mask_batch", "mask_head", "mask_token", "mask_tokens"),
)
_LOWEST = -3.4028234663852886e38  # of float32: a running maximum before any score
_PORTABLE_TILE = 32  # tokens that a program of the portable kernel works on at a time
_HEADS_A_PROGRAM = 8  # columns of an mma

_module = functools.cache(render.kernels)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _padded(head_dim: int) -> int:
    """Channels of a tile: a power of two, and whole bitmap words."""
    return max(32, _power_of_two(head_dim))


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
    shapes = Layout.interned(head_dim, kept, window).buffers(batch, heads, capacity, dense.dtype)
    values, bitmap = (torch.empty(shape, dtype=dtype, device=dense.device) for shape, dtype in shapes[:2])
    ring, counts = (torch.zeros(shape, dtype=dtype, device=dense.device) for shape, dtype in shapes[2:])
    if dense.numel() == 0:
        return values, bitmap, ring, counts
    buffers = values, bitmap, ring, counts
    prune = Prune(head_dim // 32, kept, _COMPRESS_WARPS, DTYPE_NAMES[dense.dtype])
    module, block_count = _compressor(
        prune if _prunes_by_lane(dense, prune) else None, head_dim, kept, window, dense.dtype
    )
    grid = (batch * heads * _cdiv(length, BLOCK_TOKENS * block_count),)
    module.compress[grid](dense, tokens, *buffers, heads, length, values.shape[2], *dense.stride(), num_warps=4)
    return buffers


def _prunes_by_lane(dense: Tensor, prune: Prune) -> bool:
    """Whether the tuned kernel can take ``dense``: whole bitmap words, rows of 16-byte units, registers for a row."""
    strides = dense.stride()
    aligned = dense.data_ptr() % 16 == 0 and strides[3] == 1 and all(s % 8 == 0 for s in strides[:3])
    whole = dense.shape[3] % 32 == 0 and dense.shape[3] <= 128 and dense.dtype != torch.float32
    return whole and aligned and prune.shared_bytes <= _STATIC_SHARED_BYTES and _runs_ptx(dense.device)


@functools.cache
def _runs_ptx(device: torch.device) -> bool:
    """Whether the device has what the inline PTX uses: NVIDIA's tensor cores with bfloat16, from sm_80 on."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _compressor(
    prune: Prune | None, head_dim: int, kept: int, window: int, dtype: torch.dtype
) -> tuple[ModuleType, int]:
    """The compressing kernel, tuned or portable, and how many blocks of tokens a program takes."""
    constants: dict[str, Any] = {"head_dim": head_dim, "words": _cdiv(head_dim, 32), "kept": kept, "window": window}
    constants |= {"dtype": DTYPE_NAMES[dtype]}
    if prune is None:
        return render.kernels("compress", **constants, padded=_padded(head_dim)), 1
    return render.kernels("compress_nvidia", **constants, warps=prune.warps, block=prune.block()), prune.warps


def decompress(values: Tensor, bitmap: Tensor, window: Tensor, counts: Tensor, length: int) -> Tensor:
    """See ``portable.decompress``."""
    batch, heads, slots, head_dim = window.shape
    dense = torch.empty(batch, heads, length, head_dim, dtype=window.dtype, device=window.device)
    if dense.numel() == 0:
        return dense
    constants = {"head_dim": head_dim, "padded": _padded(head_dim), "words": bitmap.shape[-1]}
    module = _module("decompress", **constants, kept=_kept(values), window=slots)
    grid = (batch * heads * _cdiv(length, BLOCK_TOKENS),)
    module.decompress[grid](values, bitmap, window, counts, dense, length, values.shape[2])
    return dense


def _kept(values: Tensor) -> int:
    return values.shape[3] * values.shape[5]


@dataclass(frozen=True)
class Step:
    """What the kernels of a decode step are specialised to."""

    key_dim: int
    value_dim: int
    key_kept: int
    value_kept: int
    window: int
    group: int
    dtype: str
    mask: str  # "none", "boolean" or "additive"
    position: bool
    softcap: bool

    @property
    def append_warps(self) -> int:
        """Warps of a program that appends: one, so that nothing waits at a barrier, unless the window is large."""
        return min(8, max(1, _power_of_two(self.window) // 64))

    @property
    def window_parts(self) -> int:
        """Partial results of the appending kernel: of the leaving token, and of each piece of the window."""
        return 1 + _cdiv(self.window, _SLOTS_A_WARP * self.append_warps)

    def constants(self) -> dict[str, Any]:
        """What the templates of a step have in common."""
        return vars(self) | {
            "key_padded": _padded(self.key_dim),
            "value_padded": _padded(self.value_dim),
            "key_words": _cdiv(self.key_dim, 32),
            "value_words": _cdiv(self.value_dim, 32),
            "group_padded": max(16, _power_of_two(self.group)),  # rows that tl.dot takes at least
            "tile": _PORTABLE_TILE,
            "window_parts": self.window_parts,
            "window_piece": _SLOTS_A_WARP * self.append_warps,
            "lowest": _LOWEST,
            "integers": _INTEGERS,
            # Sums of weights times huge values stay finite where the average does. float16 has no huge values.
            "headroom": 0 if self.dtype == "fp16" else 24,
        }

    def append(self, overlap: bool) -> ModuleType:
        """Kernel ``append``. overlap: it runs beside ``attend``."""
        return _module("append", **self.constants(), overlap=overlap)

    def portable(self) -> ModuleType:
        """Kernel ``attend`` in plain Triton."""
        return _module("attend_portable", **self.constants())

    def tuned(self) -> Tuned | None:
        """Kernel ``attend`` with inline PTX, or None where its preconditions do not hold."""
        whole_words = self.key_dim % 32 == 0 and self.value_dim % 32 == 0
        if self.dtype == "fp32" or not whole_words:
            return None
        return next((t for warps in (4, 2) if (t := Tuned(self, warps)).fits()), None)

    def combine(self, parts: int, channels: int, exact_for_extremes: bool, overlap: bool) -> ModuleType:
        """Kernel ``combine``. exact_for_extremes: it does the work again where a cache holds extreme values."""
        padded = next((n for n in (16, 32, 128) if parts <= n), _power_of_two(parts))  # few values: each compiles anew
        constants = {"channels": channels, "parts_padded": padded, "overlap": overlap}
        return _module("combine", **self.constants(), **constants, exact_for_extremes=exact_for_extremes)


@dataclass(frozen=True)
class Tuned:
    """The tuned ``attend`` for one kind of step."""

    step: Step
    warps: int

    @property
    def decode(self) -> Decode:
        """Its inline assembly."""
        step = self.step
        keys, values = Rows(step.key_dim // 32, step.key_kept), Rows(step.value_dim // 32, step.value_kept)
        return Decode(keys, values, min(step.group, _HEADS_A_PROGRAM), self.warps, _MMA_DTYPES[step.dtype])

    @property
    def chunks(self) -> int:
        """Programs that share the query heads of a KV head."""
        return _cdiv(self.step.group, _HEADS_A_PROGRAM)

    @property
    def registers(self) -> int:
        """The most registers of a thread: 128 let 16 warps run on a multiprocessor, 168 let 12."""
        if max(self.step.key_dim, self.step.value_dim) > 128:
            return 255
        prefetched = max(rows.words + rows.packed for rows in (self.decode.keys, self.decode.values))
        few = self.decode.groups == 1 or (prefetched <= 24 and self.step.mask == "none")
        return 128 if few else 168

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor holds at once."""
        return 65536 // (self.registers // 8 * 8 * 32 * self.warps)

    def fits(self) -> bool:
        """Whether a program's shared memory and registers are there."""
        decode = self.decode
        enough = decode.accumulators % self.warps == 0 and decode.accumulators // self.warps % 2 == 0
        return enough and decode.shared_bytes <= _STATIC_SHARED_BYTES

    def module(self, overlap: bool) -> ModuleType:
        """The kernel. overlap: ``append`` runs beside it."""
        decode = self.decode
        blocks = {
            "SETUP": decode.setup(),
            "FIRST_KEYS": decode.first_keys(),
            "SCORE": decode.score(),
            "SOFTMAX": decode.softmax(),
            "WEIGHTED_SUM": decode.weighted_sum(),
            "MERGE": decode.merge(),
        }
        constants = {"heads": decode.heads, "groups": decode.groups, "accumulators": decode.accumulators}
        constants |= {"chunks": self.chunks, "warps": self.warps, "query_chunks": _cdiv(self.step.key_dim, 128)}
        return render.kernels("attend_nvidia", blocks=blocks, **constants, **self.step.constants(), overlap=overlap)


_MMA_DTYPES = {"bf16": "bf16", "fp16": "f16"}
_tuned_module = functools.cache(Tuned.module)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # in Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _splits(rows: int, blocks: int, programs: int, blocks_a_round: int) -> int:
    """Programs to share a row: as many as run at once, since a second wave would run with most of the GPU idle."""
    return max(1, min(programs // rows, _cdiv(blocks, blocks_a_round)))


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
    scale: float,
    softcap: float = 0.0,
    variant: str = "tuned",
    overlap: bool = True,
) -> Tensor:
    """See ``portable.decode_attention``.

    variant: "tuned" (where it can run) or "portable". overlap: run ``append`` beside ``attend`` where the GPU can; off,
    each kernel can be timed alone.
    """
    batch, query_heads, _, key_dim = query.shape
    heads, window, value_dim = value_window.shape[1:]
    result = torch.empty(batch, query_heads, 1, value_dim, dtype=query.dtype, device=query.device)
    if result.numel() == 0:
        return result
    step = Step(
        key_dim=key_dim,
        value_dim=value_dim,
        key_kept=_kept(key_values),
        value_kept=_kept(value_values),
        window=window,
        group=query_heads // heads,
        dtype=DTYPE_NAMES[key_window.dtype],
        mask="none" if mask is None else "boolean" if mask.dtype == torch.bool else "additive",
        position=position is not None,
        softcap=softcap != 0,
    )
    rows, key_blocks, value_blocks = batch * heads, key_values.shape[2], value_values.shape[2]
    aligned = all(x.data_ptr() % 16 == 0 for x in (key_values, key_bitmap, value_values, value_bitmap))
    usable = aligned and key_blocks == value_blocks and _runs_ptx(query.device)
    tuned = step.tuned() if variant == "tuned" and usable else None
    if tuned is not None:
        programs = _multiprocessors(query.device) * tuned.programs
        splits = _splits(rows * tuned.chunks, key_blocks, programs, tuned.warps)
    else:
        splits = _splits(rows, max(key_blocks, value_blocks), _multiprocessors(query.device) * 4, 1)
    parts = splits + step.window_parts
    overlap = overlap and tuned is not None and _overlaps(query.device)

    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    sums = torch.empty(rows, parts, step.group, value_dim, dtype=torch.float32, device=query.device)
    states = torch.empty(rows, parts, step.group, 2, dtype=torch.float32, device=query.device)
    moved = torch.empty(3, dtype=torch.int64, device=query.device)
    keys, values, at = (
        (key_values, key_bitmap),
        (value_values, value_bitmap),
        key_counts if position is None else position,
    )
    given, *strides = _mask_arguments(mask, batch, query_heads)
    rest = (key_blocks, value_blocks, heads, *strides, scale, softcap)

    if tuned is not None:
        _tuned_module(tuned, overlap).attend[rows * tuned.chunks, splits](
            query.view(torch.int32), *keys, *values, key_counts, at, given, sums, states, splits, *rest,
            num_warps=tuned.warps, maxnreg=tuned.registers,
        )  # fmt: skip
    else:
        step.portable().attend[rows, splits](query, *keys, *values, key_counts, at, given, sums, states, splits, *rest)
    early = {"launch_pdl": True} if overlap else {}
    step.append(overlap).append[rows, step.window_parts](
        query, key, value, *keys, key_window, key_counts, *values, value_window, value_counts, at, given, sums, states,
        moved, splits, *rest, num_warps=step.append_warps, **early,
    )  # fmt: skip
    channels = _channels_to_combine(batch * query_heads, value_dim, _multiprocessors(query.device))
    combine = step.combine(parts, channels, tuned is not None, overlap)
    combine.combine[batch * query_heads, _cdiv(value_dim, channels)](
        query, *keys, *values, given, sums, states, moved, result, key_counts, value_counts, parts, *rest,
        **early,
    )  # fmt: skip
    return result


def _channels_to_combine(heads: int, head_dim: int, multiprocessors: int) -> int:
    """Channels to a program of the combining kernel: all of them, or fewer where there are few heads."""
    channels = _padded(head_dim)
    while channels > 16 and heads * _cdiv(head_dim, channels) < 2 * multiprocessors:
        channels //= 2
    return channels


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel can start while the one ahead of it runs (programmatic dependent launch)."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _mask_arguments(mask: Tensor | None, batch: int, query_heads: int) -> tuple[Any, ...]:
    """The mask as the kernels take it, its strides by batch, query head and token, and its tokens."""
    if mask is None:
        return None, 0, 0, 0, 1
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    expanded = mask.expand(batch, query_heads, 1, mask.shape[-1])
    strides = expanded.stride()
    if mask.dtype == torch.bool:
        expanded = expanded.view(torch.uint8)
    return expanded, strides[0], strides[1], strides[3], mask.shape[-1]
