"""What the backend costs beside the kernels: the host's time for a decode step, and compiling, against plain Inductor.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --layers 4 --skip-compile

A very small Llama over a static and over a growing cache, called by a loop of its own. For `dispatch_us` compiled
graphs compute nothing: they return the results of their first call again. What remains of a step is Dynamo's guards,
the binding of the caches and the wrappers around the graph. `compile_s` is the first call over a static cache with cold
caches, of which `inductor_s` is spent in Inductor: the rest is Dynamo and the rewriting.

Each row is measured in a process of its own: what is compiled second in a process is called more slowly (by a quarter
and more), whatever it is, since its guards then run over objects that lie scattered in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import decode_step
import llama
import torch
from timing import Function, parser, synchronize, write
from torch._inductor.utils import fresh_cache
from transformers import Cache

from mustafar_compile import _compat

NAME = "overhead"
CONTEXT = 128
SPARSITY = 0.5
WAYS = ("inductor", "mustafar")
CACHES = ("static", "growing")
_WARM_UPS = 5

Row = dict[str, Any]


def _recorded(module: Any, _: Any, **options: Any) -> Any:
    """In place of Inductor's code for a graph: it runs once, and its results are returned from then on."""
    results: list[Any] = []

    def call(arguments: list[Any]) -> Any:
        given = list(arguments)
        arguments.clear()
        if not results:
            results.append(module(*given))
        return results[0]

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Compiled graphs cost nothing; all that stands around them stays."""
    original = _compat.inductor.compile_fx
    _compat.inductor.compile_fx = functools.partial(original, inner_compile=_recorded)
    try:
        yield
    finally:
        _compat.inductor.compile_fx = original


def _inductor(module: Any, inputs: Any) -> Any:
    return _compat.inductor.compile_fx(module, inputs)


def cache_of(way: str, kind: str, model: Any) -> Cache:
    """A cache that holds all but the last token of ``CONTEXT``."""
    if kind == "growing":
        return llama.growing_cache(model, 1, CONTEXT - 1, SPARSITY if way == "mustafar" else None)
    if way == "mustafar":
        return llama.compressed_cache(model, 1, CONTEXT, decode_step.options_of(SPARSITY))
    return llama.dense_cache(model, 1, CONTEXT)


def step_of(way: str, layers: int, kind: str = "static") -> Function:
    """A decode step that is not compiled yet."""
    model = llama.build(layers, 2 * CONTEXT, tiny=True)
    cache = cache_of(way, kind, model)
    if way == "inductor":
        compiled = torch.compile(model, backend=_inductor)
    else:
        compiled = torch.compile(model, backend="mustafar", options=decode_step.options_of(SPARSITY))
    given = decode_step.inputs(1, CONTEXT - 1, 1)
    return lambda: compiled(**given, past_key_values=cache)


def first_call(step: Function) -> Row:
    """Seconds of the first call, and of Inductor in it."""
    original, spent = _compat.inductor.compile_fx, 0.0

    def timed(*given: Any, **options: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        compiled = original(*given, **options)
        spent += time.perf_counter() - start
        return compiled

    _compat.inductor.compile_fx = timed
    try:
        start = time.perf_counter()
        step()
        synchronize()
        return {"compile_s": time.perf_counter() - start, "inductor_s": spent}
    finally:
        _compat.inductor.compile_fx = original


def fastest_us(step: Function, calls: int) -> float:
    """Microseconds of the fastest of many calls: what the host needs if nobody disturbs it."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        synchronize()
    return 1e6 * min(times[_WARM_UPS:])


def dispatch(way: str, kind: str, given: argparse.Namespace) -> Row:
    """The host's time for a step."""
    with torch.no_grad(), without_kernels():
        return {"dispatch_us": fastest_us(step_of(way, given.layers, kind), given.calls)}


def compiling(way: str, kind: str, given: argparse.Namespace) -> Row:
    """The time to compile a step."""
    with torch.no_grad(), fresh_cache():
        return first_call(step_of(way, given.layers, kind))


def in_a_new_process(measure: Callable[..., Row], *arguments: Any) -> Row:
    """What ``measure`` gives there."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def compared(kind: str, given: argparse.Namespace) -> list[Row]:
    """The rows of one kind of cache, and what ours takes more."""
    rows: list[Row] = []
    for way in WAYS:
        row = {"way": way, "cache": kind, "layers": given.layers} | in_a_new_process(dispatch, way, kind, given)
        if kind == "static" and not given.skip_compile:
            row |= in_a_new_process(compiling, way, kind, given)
        print(row, flush=True)
        rows.append(row)
    base, ours = rows
    ours["more_us"] = ours["dispatch_us"] - base["dispatch_us"]
    if "compile_s" in ours:
        ours["compile_ratio"] = ours["compile_s"] / base["compile_s"]
    return rows


def arguments() -> argparse.Namespace:
    """What is asked for."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--calls", type=int, default=300)
    options.add_argument("--skip-compile", action="store_true")
    return options.parse_args()


def main() -> None:
    given = arguments()
    write(NAME, [row for kind in CACHES for row in compared(kind, given)])


if __name__ == "__main__":
    main()
