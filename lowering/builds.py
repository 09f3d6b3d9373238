"""C++ kernels from ``cpp/``, built on the machine that they run on.

A kernel is built for a dtype, head dims, codes, whether there are bitmaps, and the query heads of a KV head; kept
elements, window, mask, query tokens and all sizes are arguments, so one build serves a model at every sparsity (with a
code, one serves 0 and one all others). Builds are kept on disk by torch's own code cache, and are made in the
background from the moment that a graph is traced (``prepare_step``), beside what Inductor has to compile.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from .format import CODES, Format
from .step import DTYPE_NAMES

_SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-ftree-loop-vectorize",)
"""Beside those of Inductor, which turns off what its own explicit vectors do not need."""

_builders = ThreadPoolExecutor(2, thread_name_prefix="mustafar-build")
_failed: set[Future[ctypes.CDLL]] = set()
_building: ContextVar[bool] = ContextVar("building", default=True)


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
    from .. import _compat

    text = source(name, dtype, simd, **dict(constants))
    return _builders.submit(lambda: _compat.inductor.cpp_code_cache.load(text, device_type="cpu", extra_flags=FLAGS))


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
    from .. import _compat

    try:
        _compat.inductor.cpp_compiler()
    except Exception as error:
        _warn(f"no C++ compiler was found ({type(error).__name__})")
        return "there is no C++ compiler"
    return None


def _warn(problem: str) -> None:
    warnings.warn(f"mustafar: {problem}, so PyTorch does the work of C++ kernels, many times slower", stacklevel=2)


def built(build: Future[ctypes.CDLL]) -> ctypes.CDLL:
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
