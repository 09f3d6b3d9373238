"""What the backend costs beside the kernels: the host's time for a decode step, and compiling, against plain Inductor.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --layers 4 --skip-compile

A very small Llama over a static cache, called by a loop of its own. For `dispatch_us` the compiled graphs compute
nothing: they return the results of their first call again. What remains of a step is Dynamo's guards, the
binding of the caches and the wrappers around the graph. `compile_s` is the first call, with cold caches, of which
`inductor_s` is spent in Inductor: the rest is Dynamo and the rewriting.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import decode_step
import llama
import torch
from timing import Function, parser, synchronize, write
from torch._inductor.utils import fresh_cache

from mustafar_compile import _compat

NAME = "overhead"
CONTEXT = 128
SPARSITY = 0.5
WAYS = ("inductor", "mustafar")
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
    original = _compat.compile_fx
    _compat.compile_fx = functools.partial(original, inner_compile=_recorded)
    try:
        yield
    finally:
        _compat.compile_fx = original


def _inductor(module: Any, inputs: Any) -> Any:
    return _compat.compile_fx(module, inputs)


def step_of(way: str, layers: int, **inductor: Any) -> Function:
    """A decode step that is not compiled yet."""
    torch._dynamo.reset()
    model = llama.build(layers, CONTEXT, tiny=True)
    if way == "inductor":
        cache, compiled = llama.dense_cache(model, 1, CONTEXT), torch.compile(model, backend=_inductor)
    else:
        cache = llama.compressed_cache(model, 1, CONTEXT, SPARSITY)
        options = decode_step.options_of(SPARSITY, **inductor)
        compiled = torch.compile(model, backend="mustafar", options=options)
    given = decode_step.inputs(1, CONTEXT - 1, 1)
    return lambda: compiled(**given, past_key_values=cache)


def first_call(step: Function) -> Row:
    """Seconds of the first call, and of Inductor in it."""
    original, spent = _compat.compile_fx, 0.0

    def timed(*given: Any, **options: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        compiled = original(*given, **options)
        spent += time.perf_counter() - start
        return compiled

    _compat.compile_fx = timed
    try:
        start = time.perf_counter()
        step()
        synchronize()
        return {"compile_s": time.perf_counter() - start, "inductor_s": spent}
    finally:
        _compat.compile_fx = original


def fastest_us(step: Function, calls: int) -> float:
    """Microseconds of the fastest of many calls: what the host needs if nobody disturbs it."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        synchronize()
    return 1e6 * min(times[_WARM_UPS:])


def run(way: str, given: argparse.Namespace) -> Row:
    """One row."""
    row: Row = {"way": way, "layers": given.layers}
    with without_kernels():
        row["dispatch_us"] = fastest_us(step_of(way, given.layers), given.calls)
    if not given.skip_compile:
        with fresh_cache():
            row |= first_call(step_of(way, given.layers))
    print(row, flush=True)
    return row


def arguments() -> argparse.Namespace:
    """What is asked for."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--calls", type=int, default=300)
    options.add_argument("--skip-compile", action="store_true")
    return options.parse_args()


def main() -> None:
    given = arguments()
    rows = [run(way, given) for way in WAYS]
    base, ours = rows
    ours["more_us"] = ours["dispatch_us"] - base["dispatch_us"]
    if "compile_s" in ours:
        ours["compile_ratio"] = ours["compile_s"] / base["compile_s"]
    write(NAME, rows)


if __name__ == "__main__":
    with torch.no_grad():
        main()
