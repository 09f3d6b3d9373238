"""The ops on a CPU: C++ kernels from ``cpp/``, built on the machine that they run on.

Each function has the arguments and the results of its namesake in ``portable``. A kernel is built for a dtype, head
dims, codes, whether there are bitmaps, and the query heads of a KV head; kept elements, window, mask, query tokens and
all sizes are arguments, so one build serves a model at every sparsity (with a code, one serves 0 and one all others).
Builds are kept on disk by torch's own code cache, and are made in the background from the moment that a graph is traced
(``prepare_step``), beside what Inductor has to compile. Where one cannot be built, each function raises NotBuiltError.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from .checks import OUT_OF_PLACE, UNWRITTEN
from .format import CODES, Format
from .masks import with_four_dims
from .step import DTYPE_NAMES

_SOURCES = Path(__file__).parent / "cpp"
_MASK_KINDS = {None: 0, torch.bool: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}
_PROBLEMS = {1: OUT_OF_PLACE, 2: UNWRITTEN}
FLAGS = ("-ftree-loop-vectorize",)
"""Beside those of Inductor, which turns off what its own explicit vectors do not need."""

_builders = ThreadPoolExecutor(2, thread_name_prefix="mustafar-build")
_failed: set[Future[ctypes.CDLL]] = set()
_building: ContextVar[bool] = ContextVar("building", default=True)


class _Cache(ctypes.Structure):
    """``Cache`` of cpp/cache.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "bitmap", "peaks", "floors", "window", "counts")]
    _fields_ += [(name, ctypes.c_int64) for name in ("blocks", "kept")]


class _Step(ctypes.Structure):
    """``Step`` of cpp/step.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("query", "key", "value")]
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


def source(name: str, dtype: torch.dtype, simd: str = "", **constants: int) -> str:
    """The text of a kernel's C++, one file. simd: "", the best that the processor has, "AVX2" or "NONE"."""
    capability = torch.backends.cpu.get_cpu_capability()
    lines = [
        f"// Built for {capability}: a cache on disk may be shared with other machines.",
        "#include <cstdint>",
        f"#define SIMD_{simd}" if simd else "",
        "enum Dtype { FP32, FP16, BF16 };",
        f"constexpr Dtype DTYPE = {DTYPE_NAMES[dtype].upper()};",
        *(f"constexpr int {constant} = {value};" for constant, value in constants.items()),
        _inlined(name, set()),
    ]
    return "\n".join(lines)


def _inlined(name: str, included: set[str]) -> str:
    """A source file with those of ours that it includes in their places: torch's code cache compiles one text."""
    if name in included:
        return ""
    included.add(name)
    lines, own = (_SOURCES / name).read_text().splitlines(), '#include "'
    return "\n".join(
        _inlined(x[len(own) : -1], included) if x.startswith(own) else x for x in lines if x != "#pragma once"
    )


@functools.cache
def _build(name: str, dtype: torch.dtype, simd: str, constants: tuple[tuple[str, int], ...]) -> Future[ctypes.CDLL]:
    from .._compat import cpp_code_cache

    text = source(name, dtype, simd, **dict(constants))
    return _builders.submit(lambda: cpp_code_cache.load(text, device_type="cpu", extra_flags=FLAGS))


def _begin(name: str, dtype: torch.dtype, simd: str, constants: dict[str, int]) -> Future[ctypes.CDLL]:
    if _building.get():
        return _build(name, dtype, simd, tuple(constants.items()))
    never: Future[ctypes.CDLL] = Future()
    never.set_exception(NotBuiltError("graphs are traced only"))
    return never


@contextmanager
def building_nothing() -> Iterator[None]:
    """For graphs that are traced and will not run: within it nothing is built ahead."""
    token = _building.set(False)
    try:
        yield
    finally:
        _building.reset(token)


def _constants(role: str, format: Format) -> dict[str, int]:
    """What a build knows of a format."""
    code, bitmap = CODES.index(format.code), int(format.has_bitmap)
    return {f"{role}_DIM": format.head_dim, f"{role}_CODE": code, f"{role}_BITMAP": bitmap}


def step_constants(key: Format, value: Format, group: int) -> dict[str, int]:
    """What a build of a step knows. group: query heads of a KV head."""
    return _constants("KEY", key) | _constants("VALUE", value) | {"GROUP": group}


def prepare_step(key: Format, value: Format, dtype: torch.dtype, group: int, simd: str = "") -> Future[ctypes.CDLL]:
    """Begin to build what a step needs, unless that was begun before."""
    return _begin("step.cpp", dtype, simd, step_constants(key, value, group))


def prepare_prompt(format: Format, dtype: torch.dtype, simd: str = "") -> Future[ctypes.CDLL]:
    """Begin to build what compresses and decompresses, unless that was begun before."""
    return _begin("prompt.cpp", dtype, simd, _constants("ROW", format))


class NotBuiltError(RuntimeError):
    """A kernel could not be built."""


@functools.cache
def why_not() -> str | None:
    """Why there are no C++ kernels here; None where there are. Says so once."""
    from .._compat import cpp_compiler

    try:
        cpp_compiler()
    except Exception as error:
        _warn(f"no C++ compiler was found ({type(error).__name__})")
        return "there is no C++ compiler"
    return None


def _warn(problem: str) -> None:
    warnings.warn(f"mustafar: {problem}, so PyTorch does the work of C++ kernels, many times slower", stacklevel=2)


def _built(build: Future[ctypes.CDLL]) -> ctypes.CDLL:
    """The library, when it is there. Raises NotBuiltError, at the first time with a warning."""
    try:
        return build.result()
    except Exception as error:
        if build not in _failed:
            _failed.add(build)
            _warn(f"a C++ kernel could not be built ({error})")
        raise NotBuiltError(str(error)) from error


def simd_name(simd: str = "") -> str:
    """What the kernels are written in here, such as "AVX-512"."""
    name = prepare_prompt(Format.of(64, 0.5, 32, "rows"), torch.float32, simd).result().simd
    name.restype = ctypes.c_char_p
    return name().decode()


def _cache(format: Format, buffers: Sequence[Tensor]) -> _Cache:
    assert format.order == "rows", f"C++ kernels do not read {format}"
    pointers = {name: x.data_ptr() for name, x in format.named(buffers).items()}
    return _Cache(blocks=buffers[0].shape[2], kept=format.kept, **pointers)


def compress(
    dense: Tensor, tokens: Tensor, format: Format, capacity: int, weights: Tensor | None = None, *, simd: str = ""
) -> list[Tensor]:
    """See ``portable.compress``. What is not pruned yet is not packed either: nothing reads it."""
    batch, heads, length, _ = dense.shape
    dense = dense if dense.stride(-1) == 1 else dense.contiguous()
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
    library = _built(prepare_prompt(format, dense.dtype, simd))
    given = _Prompt(
        dense.data_ptr(),
        _cache(format, buffers),
        *dense.stride()[:3],
        *(batch, heads, tokens, format.window, torch.get_num_threads()),
        _address(weights),
    )
    getattr(library, what)(ctypes.byref(given))


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_format: Format,
    value_format: Format,
    position: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    length: int | None = None,
    key_weights: Tensor | None = None,
    value_weights: Tensor | None = None,
    *,
    simd: str = "",
) -> Tensor:
    """See ``ops.py``."""
    (batch, query_heads, queries, _), heads = query.shape, key.shape[1]
    out = query.new_empty(batch, query_heads, queries, value_format.head_dim)
    if not out.numel():
        return out
    library = _built(prepare_step(key_format, value_format, query.dtype, query_heads // heads, simd))
    # Held until the call is over.
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    position = None if position is None else position.reshape(-1).to(torch.int64)
    mask = None if mask is None else _as_read(mask)
    weights = [_as_weights(w, queries) for w in (key_weights, value_weights)]
    step = _Step(
        *(x.data_ptr() for x in (query, key, value)),
        _cache(key_format, keys),
        _cache(value_format, values),
        *map(_address, (position, mask, sinks, out)),
        0 if position is None or position.numel() == 1 else position.stride(0),
        *_described(mask),
        *(batch, heads, queries, key_format.window, -1 if length is None else length, torch.get_num_threads()),
        *(scale, softcap),
        *map(_address, weights),
    )
    if problem := library.decode_attention(ctypes.byref(step)):
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
