"""Which kernels carry out a decode step: what they are specialised to, and which of them the tuned one can replace."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import render
from .checks import OUT_OF_PLACE, UNWRITTEN
from .format import Format
from .masks import MASKED, decides_later
from .ptx.decode import Decode
from .ptx.rows import Rows

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
STATIC_SHARED_BYTES = 48 * 1024
# Of a thread of ``combine``: enough for what it does for extreme values, few enough for 16 programs at once.
COMBINE_REGISTERS = 128
_SLOTS_A_WARP = 8  # of the window
# Arguments of which a new value does not compile the kernels of a step anew.
_INTEGERS = (
    *("splits", "parts", "blocks", "key_blocks", "value_blocks", "kv_heads", "position_batch", "length"),
    *("mask_batch", "mask_head", "mask_query", "mask_token", "mask_tokens"),
)
MASK_PIECE = 4096  # tokens of a mask that a program looks through for such as were never written
_LOWEST = -3.4028234663852886e38  # of float32: a running maximum before any score
_MOST_ROWS = 32  # of the query, in a program of the portable kernel
_PORTABLE_TILE = 32  # tokens that a program of the portable kernel works on at a time
_SUMS_AT_ONCE = 1024  # that a program of ``combine`` loads: 32 to a thread
_TOKENS_AGAIN = 4  # that ``combine`` works on at a time where a cache holds extreme values: little code, few registers
_ROWS_A_PROGRAM = 8  # of the query: columns of an mma
_MMA_DTYPES = {"bf16": "bf16", "fp16": "f16"}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded(head_dim: int) -> int:
    """Channels of a tile: a power of two, and whole bitmap words."""
    return max(32, power_of_two(head_dim))


@dataclass(frozen=True)
class Step:
    """What the kernels of a decode step are specialised to."""

    key: Format
    value: Format
    group: int
    queries: int  # tokens
    dtype: str
    mask: str  # "none", "boolean" or "additive"
    sinks: bool
    softcap: bool
    sees_later: bool = False  # a token may see later ones of the step, where the mask allows it

    @classmethod
    def of(
        cls,
        key: Format,
        value: Format,
        group: int,
        queries: int,
        dtype: torch.dtype,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
        softcap: float = 0.0,
    ) -> Step:
        """The kernels for a step over caches of these formats, with such a mask and such sinks."""
        return cls(
            key=key,
            value=value,
            group=group,
            queries=queries,
            dtype=DTYPE_NAMES[dtype],
            mask="none" if mask is None else "boolean" if mask.dtype == torch.bool else "additive",
            sees_later=decides_later(mask),
            sinks=sinks is not None,
            softcap=softcap != 0,
        )

    @property
    def window(self) -> int:
        """Of K and V alike."""
        return self.key.window

    @property
    def append_warps(self) -> int:
        """Warps of a program that appends: one, so that nothing waits at a barrier, unless the window is large."""
        return min(8, max(1, power_of_two(self.window) // 64))

    @property
    def query_rows(self) -> int:
        """Rows of the query for each KV head: the query heads of the group, each with all its tokens."""
        return self.group * self.queries

    @property
    def row_tile(self) -> int:
        """Query rows that a program of the portable kernel works on: at least what tl.dot takes."""
        return min(_MOST_ROWS, max(16, power_of_two(self.query_rows)))

    @property
    def row_tiles(self) -> int:
        """Programs of the portable kernel that share the query rows of a KV head."""
        return cdiv(self.query_rows, self.row_tile)

    @property
    def exact_tokens(self) -> int:
        """Tokens that are in the window of some query token."""
        return self.window + self.queries - 1

    @property
    def window_parts(self) -> int:
        """Partial results of the appending kernel: of each leaving token, and of each piece of the window."""
        return self.queries + cdiv(self.exact_tokens, _SLOTS_A_WARP * self.append_warps)

    def constants(self) -> dict[str, Any]:
        """What the templates of a step have in common."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "key_padded": padded(self.key.head_dim),
            "value_padded": padded(self.value.head_dim),
            "window": self.window,
            "ring": self.key.ring,
            "query_rows": self.query_rows,
            "row_tile": self.row_tile,
            "row_tiles": self.row_tiles,
            "exact_tokens": self.exact_tokens,
            "tile": _PORTABLE_TILE,
            "window_parts": self.window_parts,
            "window_piece": _SLOTS_A_WARP * self.append_warps,
            "lowest": _LOWEST,
            "log2e": math.log2(math.e),
            "integers": _INTEGERS,
            # Sums of weights times huge values stay finite where the average does. float16 has no huge values.
            "headroom": 0 if self.dtype == "fp16" else 24,
        }

    def append(self, overlap: bool, checked: bool = True, weighted: tuple[str, ...] = ()) -> ModuleType:
        """Kernel ``append``. overlap: it runs beside ``attend``. checked: it asserts what ``checks`` says.

        weighted: those of "key" and "value" whose rows rank by weights, too, which it is given.
        """
        constants: dict[str, Any] = {"checked": checked, "out_of_place": OUT_OF_PLACE, "unwritten": UNWRITTEN}
        constants |= {"mask_piece": MASK_PIECE, "masked": MASKED}
        return _kernels(self, "append", overlap=overlap, weighted=weighted, **constants)

    def portable(self) -> ModuleType:
        """Kernel ``attend`` in plain Triton."""
        return _kernels(self, "attend_portable")

    def tuned(self, hopper: bool = True) -> Tuned | None:
        """Kernel ``attend`` with inline PTX, or None where its preconditions do not hold.

        hopper: for a GPU of compute capability 9.0 or newer.
        """
        return _tuned(self, hopper)

    def combine(self, parts: int, exact_for_extremes: bool, overlap: bool) -> ModuleType:
        """Kernel ``combine``, of a query row and ``channels_at_once`` to a program, which is one warp.

        exact_for_extremes: it does the work again where a cache holds extreme values.
        """
        constants = {"parts_padded": _part_slots(parts), "channels": self.channels_at_once(parts)}
        constants |= {"overlap": overlap, "tokens_again": _TOKENS_AGAIN}
        return _kernels(self, "combine", **constants, exact_for_extremes=exact_for_extremes)

    def channels_at_once(self, parts: int) -> int:
        """Channels of V that a program of ``combine`` takes."""
        return min(padded(self.value.head_dim), max(8, _SUMS_AT_ONCE // _part_slots(parts)))


def _part_slots(parts: int) -> int:
    """Few values, for each compiles ``combine`` anew."""
    return next((n for n in (8, 16, 32, 128) if parts <= n), power_of_two(parts))


@functools.cache
def _kernels(step: Step, template: str, **constants: Any) -> ModuleType:
    return render.kernels(template, **step.constants(), **constants)


@functools.cache
def _tuned(step: Step, hopper: bool) -> Tuned | None:
    formats = step.key, step.value
    if step.dtype == "fp32" or any(f.head_dim % 32 for f in formats):
        return None
    return next((t for warps in (4, 2) if (t := Tuned(step, warps, hopper)).fits()), None)


@dataclass(frozen=True)
class Tuned:
    """The tuned ``attend`` for one kind of step."""

    step: Step
    warps: int
    hopper: bool = True

    @functools.cached_property
    def decode(self) -> Decode:
        """Its inline assembly."""
        step = self.step
        keys, values = (Rows(f.words, f.kept, f.code) for f in (step.key, step.value))
        heads = min(step.query_rows, _ROWS_A_PROGRAM)
        return Decode(keys, values, heads, self.warps, _MMA_DTYPES[step.dtype], by_matrices=self.hopper)

    @property
    def chunks(self) -> int:
        """Programs that share the query rows of a KV head. Each reads its cache."""
        return cdiv(self.step.query_rows, _ROWS_A_PROGRAM)

    @functools.cached_property
    def registers(self) -> int:
        """The most registers of a thread: 128 let 16 warps run on a multiprocessor, 168 let 12."""
        if max(self.step.key.head_dim, self.step.value.head_dim) > 128:
            return 255
        both = self.decode.keys, self.decode.values
        if not all(rows.gathered for rows in both):  # not staged: both rows are in registers at once
            return 168 if sum(len(rows.registers()) for rows in both) <= 72 else 255
        if self.decode.sums > 32:
            return 168  # they stay in registers throughout
        prefetched = max(len(rows.registers()) for rows in both)
        return 128 if prefetched <= (24 if self.step.softcap else 44) else 168

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor holds at once."""
        return 65536 // (self.registers // 8 * 8 * 32 * self.warps)

    def fits(self) -> bool:
        """Whether a program's shared memory and registers are there."""
        decode = self.decode
        enough = decode.accumulators % self.warps == 0 and decode.accumulators // self.warps % 2 == 0
        return enough and decode.shared_bytes <= STATIC_SHARED_BYTES

    def kernel(self, overlap: bool) -> ModuleType:
        """The kernel. overlap: ``append`` runs beside it."""
        return _tuned_kernel(self, overlap)

    def _render(self, overlap: bool) -> ModuleType:
        decode = self.decode
        blocks = {
            "SETUP": decode.setup(),
            "FIRST_KEYS": decode.first_keys(),
            "SCORE": decode.score(),
            "SOFTMAX": decode.softmax(),
            "WEIGHTED_SUM": decode.weighted_sum(),
            "MERGE": decode.merge(),
        }
        constants: dict[str, Any] = {"heads": decode.heads, "groups": decode.groups}
        constants |= {"accumulators": decode.accumulators, "sums": decode.sums}
        constants |= {"key_rows": decode.keys, "value_rows": decode.values}
        constants |= {"has_table": decode.has_table}
        constants |= {"chunks": self.chunks, "warps": self.warps, "query_chunks": cdiv(self.step.key.head_dim, 128)}
        return render.kernels("attend_nvidia", blocks=blocks, **constants, **self.step.constants(), overlap=overlap)


_tuned_kernel = functools.cache(Tuned._render)
