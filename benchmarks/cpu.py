"""One decode step's attention on a CPU, and compressing a prompt, against dense ways on the same data.

    python benchmarks/cpu.py --quick
    python benchmarks/cpu.py
    python benchmarks/cpu.py --shape 1,8,4,16384,128,bfloat16 --threads 1
    python benchmarks/cpu.py --quick --sparsity 0 --sparsity 0.5 --code none --code int8 --code int4

torch   the fastest of torch's ways for one query token: scaled_dot_product_attention with the heads of a group packed
        as query tokens and with grouped heads, and matrix products compiled by Inductor
loop    a dense loop of our own, as tuned as our kernels: dense_loop.cpp
copy    a copy of K and V

In each round each way has a time, in an order of chance; a ratio is the median over rounds of the ratios of a round.
Several caches take turns, so that none is found in a processor cache unless the machine has a very large one. Our op is
timed whole: it takes in a token, prunes the one that leaves the window, and attends.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timing import parser, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from mustafar_compile import _compat
from mustafar_compile.lowering import builds, native
from mustafar_compile.lowering.decode_step import DecodeStep
from mustafar_compile.lowering.format import CODES, Format

WINDOW = 32
ROTATED_BYTES = 200e6
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """batch, KV heads, query heads per KV head, cached tokens, channels, dtype."""

    batch: int
    kv_heads: int
    gqa: int
    tokens: int
    head_dim: int
    dtype: str

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "1,8,4,16384,128,bfloat16"."""
        *numbers, dtype = text.split(",")
        if dtype not in DTYPES or len(numbers) != 5:
            raise argparse.ArgumentTypeError("batch,heads,gqa,tokens,head_dim,dtype are needed")
        return cls(*map(int, numbers), dtype)


MAIN = [
    Shape(1, 8, 4, 16384, 128, "bfloat16"),
    Shape(1, 8, 4, 16384, 128, "float32"),
    Shape(1, 2, 2, 3840, 64, "float32"),
]
MORE = [
    *(Shape(1, 8, 4, tokens, 128, dtype) for tokens in (4096, 65536) for dtype in ("bfloat16", "float32")),
    Shape(1, 8, 4, 16384, 128, "float16"),
    Shape(4, 3, 3, 2048, 64, "float32"),
    Shape(1, 8, 1, 16384, 128, "bfloat16"),
    Shape(1, 8, 8, 16384, 128, "bfloat16"),
]


class _Dense(ctypes.Structure):
    """``Dense`` of dense_loop.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("query", "keys", "values", "out")]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows", "tokens", "threads")] + [("scale", ctypes.c_double)]


def dense_loop(shape: Shape, simd: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loop of our own for a shape."""
    loop = (Path(__file__).parent / "dense_loop.cpp").read_text()
    form = Format.of(shape.head_dim, 0.0, WINDOW, "rows")
    attend = builds.source("attend.h", DTYPES[shape.dtype], simd, **builds.step_constants(form, form, shape.gqa))
    text = attend + loop.replace('#include "attend.h"', "")
    library = _compat.inductor.cpp_code_cache.load(text, device_type="cpu", extra_flags=builds.FLAGS)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        pointers = (x.data_ptr() for x in (query, key, value, out))
        rows, threads = key.shape[0] * key.shape[1], torch.get_num_threads()
        library.dense_attention(ctypes.byref(_Dense(*pointers, rows, key.shape[2], threads, query.shape[-1] ** -0.5)))
        return out

    return attention


def _packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rows = query.view(key.shape[0], key.shape[1], -1, key.shape[3])
    return sdpa(rows, key, value).view(query.shape)


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sdpa(query, key, value, enable_gqa=True)


def _products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rows = query.view(key.shape[0], key.shape[1], -1, key.shape[3])
    scores = rows @ key.transpose(-1, -2) * key.shape[3] ** -0.5
    return (scores.float().softmax(-1).to(rows.dtype) @ value).view(query.shape)


class Data:
    """Dense caches and their compressed twins, which take turns."""

    def __init__(self, shape: Shape, formats: list[Format], simd: str) -> None:
        torch.manual_seed(0)
        self.shape, self.simd = shape, simd
        dtype, size = DTYPES[shape.dtype], (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
        copies = max(2, round(ROTATED_BYTES / (2 * math.prod(size) * dtype.itemsize)))
        self.query = torch.randn(shape.batch, shape.kv_heads * shape.gqa, 1, shape.head_dim).to(dtype)
        self.dense = [[torch.randn(size).to(dtype) for _ in range(2)] for _ in range(copies)]
        self.formats = formats
        self.position = torch.tensor([shape.tokens - 1])
        self.caches = [
            [[native.compress(x, self.position, f, shape.tokens, simd=simd) for x in pair] for pair in self.dense]
            for f in self.formats
        ]

    def ours(self, which: int, turn: int) -> Tensor:
        """The last token enters and is attended to with all others."""
        form, (keys, values) = self.formats[which], self.caches[which][turn]
        new = [x[:, :, -1:] for x in self.dense[turn]]
        scale = self.shape.head_dim**-0.5
        step = DecodeStep(self.query, *new, keys, values, form, form, self.position, None, None, scale)
        return native.decode_attention(step, simd=self.simd)

    def error(self, which: int) -> float:
        """Relative, in norm, against float64 attention over what the cache stands for."""
        result, form = self.ours(which, 0), self.formats[which]
        cache = (native.decompress(x, form, self.shape.tokens).double() for x in self.caches[which][0])
        expected = _products(self.query.double(), *cache)
        return float((result.double() - expected).norm() / expected.norm())


def rounds(ways: dict[str, Callable[[int], Any]], copies: int, count: int) -> dict[str, list[float]]:
    """Milliseconds of each way in each round. A way is called with the number of the cache that it takes."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(0)
    turn, order = 0, random.Random(0)
    for _ in range(count):
        for name in order.sample(list(ways), len(ways)):
            turn = (turn + 1) % copies
            start = time.perf_counter()
            ways[name](turn)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(times: dict[str, list[float]], peer: str, name: str) -> float:
    """How many times faster than ``peer``."""
    return statistics.median(a / b for a, b in zip(times[peer], times[name], strict=True))


Setting = tuple[float, str]
"""A sparsity and a code, of K and V alike."""


def measure(shape: Shape, settings: list[Setting], threads: int, simd: str, count: int) -> list[Row]:
    """One row for each setting whose result is right."""
    torch.set_num_threads(threads)
    formats = [Format.of(shape.head_dim, sparsity, WINDOW, "rows", code) for sparsity, code in settings]
    data, loop, compiled = Data(shape, formats, simd), dense_loop(shape, simd), torch.compile(_products)
    dense = {"packed": _packed, "grouped": _grouped, "compiled": compiled, "loop": loop}
    ways: dict[str, Callable[[int], Any]] = {
        name: (lambda turn, way=way: way(data.query, *data.dense[turn])) for name, way in dense.items()
    }
    ways["copy"] = lambda turn: [x.clone() for x in data.dense[turn]]
    for i, setting in enumerate(settings):
        ways[f"ours {setting}"] = lambda turn, i=i: data.ours(i, turn)
        ways[f"compress {setting}"] = lambda turn, form=formats[i]: [
            native.compress(x, data.position, form, shape.tokens, simd=simd) for x in data.dense[turn]
        ]
    times = rounds(ways, len(data.dense), count)
    fastest = min(("packed", "grouped", "compiled"), key=lambda name: statistics.median(times[name]))
    rows = []
    for i, (sparsity, code) in enumerate(settings):
        error, ours, compress = data.error(i), f"ours {sparsity, code}", f"compress {sparsity, code}"
        if error > TOLERANCES[DTYPES[shape.dtype]]:
            print(f"{shape} at {settings[i]} is WRONG by {error:.2g}, so its time is not reported", flush=True)
            continue
        plain = f"ours {sparsity, 'none'}"
        rows.append(
            asdict(shape)
            | {"threads": threads, "sparsity": sparsity, "code": code, "torch": fastest}
            | {"torch_ms": statistics.median(times[fastest]), "loop_ms": statistics.median(times["loop"])}
            | {"ours_ms": statistics.median(times[ours])}
            | {"over_torch": ratio(times, fastest, ours), "over_loop": ratio(times, "loop", ours)}
            | ({"over_no_code": ratio(times, plain, ours)} if plain in times else {})
            | {"compress_over_copy": 1 / ratio(times, "copy", compress), "error": error}
        )
    return rows


def processor() -> str:
    """Its name, as the system has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="the three main shapes only")
    options.add_argument("--shape", type=Shape.parse, action="append", help="batch,heads,gqa,tokens,head_dim,dtype")
    options.add_argument("--sparsity", type=float, action="append", help="default: 0.5 and 0.7")
    options.add_argument("--code", action="append", choices=CODES, help="default: none")
    options.add_argument("--threads", type=int, action="append", help="default: 1 and all")
    options.add_argument("--simd", default="", choices=["", "AVX2", "NONE"], help="default: the best there is")
    options.add_argument("--rounds", type=int, default=15)
    given = options.parse_args()
    rows: list[Row] = []
    settings = list(itertools.product(given.sparsity or [0.5, 0.7], given.code or ["none"]))
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for shape in given.shape or (MAIN if given.quick else MAIN + MORE):
        for threads in given.threads or sorted({1, every}):
            rows += measure(shape, settings, threads, given.simd, given.rounds)
    print(f"{processor()}, {every} processors, load {os.getloadavg()[0]:.1f}, {builds.simd_name(given.simd)}")
    write("cpu", rows)


if __name__ == "__main__":
    main()
