"""Hugging Face ``generate`` in each way that a user may write it: a model of the shape of Llama 3 8B, random weights.

    python benchmarks/generate.py
    python benchmarks/generate.py --batch 1 --context 8192 --layers 8 --only hf prepared

eager     no compiler, dynamic cache
hf        cache_implementation="static": compiled by transformers itself, mode="reduce-overhead"
inductor  model.compile(), dynamic cache
quantized cache_implementation="quantized": transformers' own, 4 bits of quanto, eager
compile   model.compile(backend="mustafar"), dynamic cache
output-aware  the same with key_strategy="output-aware"
static    as compile, cache_implementation="static"
config    CompileConfig(backend="mustafar", mode=None, options=...), static cache: an eager prompt, compiled steps
prepared  mustafar_compile.prepare(model)

``generate`` is called several times in a row, each time with another prompt of the same shape. A step is the time from
one call of a logits processor, which waits for the device, to the next.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import llama
import torch
from comparing import Row, add_ratios, in_order, key_of, rows_of
from timing import DEVICE, ON_GPU, free, parser, synchronize, write
from transformers import CompileConfig

import mustafar_compile
from mustafar_compile.lowering.format import CODES

NAME = "generate"
SIZES = ("batch", "context", "layers", "sparsity", "code")
FIELDS = (*SIZES, "way")


class Clock:
    """A logits processor that notes when it is called, with the device idle."""

    def __init__(self) -> None:
        self.times = [self._now()]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(self._now())
        return scores

    @staticmethod
    def _now() -> float:
        synchronize()
        return 1e3 * time.perf_counter()

    @property
    def first(self) -> float:
        """Milliseconds to the first token."""
        return self.times[1] - self.times[0]

    @property
    def step(self) -> float:
        """Milliseconds, the median of all later tokens."""
        return statistics.median(b - a for a, b in zip(self.times[1:], self.times[2:], strict=False))

    def mean_step(self, tokens: int) -> float:
        """Milliseconds, the mean of the later ones of the first ``tokens`` tokens."""
        return (self.times[tokens] - self.times[1]) / (tokens - 1)


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """Of the backend."""
    sparsities = {"key_sparsity": given.sparsity, "value_sparsity": given.sparsity}
    return sparsities | {"key_code": given.code, "value_code": given.code, "window": llama.WINDOW}


def eager(model: Any, options: Row) -> Row:
    return {}


def hf(model: Any, options: Row) -> Row:
    return {"cache_implementation": "static"}


def inductor(model: Any, options: Row) -> Row:
    model.compile()
    return {}


def quantized(model: Any, options: Row) -> Row:
    return {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}


def compiled(model: Any, options: Row) -> Row:
    model.compile(backend="mustafar", options=options)
    return {}


def output_aware(model: Any, options: Row) -> Row:
    model.compile(backend="mustafar", options=options | {"key_strategy": "output-aware"})
    return {}


def static(model: Any, options: Row) -> Row:
    return compiled(model, options) | {"cache_implementation": "static"}


def config(model: Any, options: Row) -> Row:
    how = CompileConfig(backend="mustafar", mode=None, options=options | {"release_dense": ON_GPU})
    return {"cache_implementation": "static", "compile_config": how}


def prepared(model: Any, options: Row) -> Row:
    mustafar_compile.prepare(model, options=options)
    return {}


WAYS: dict[str, Callable[[Any, Row], Row]] = {
    "eager": eager,
    "hf": hf,
    "inductor": inductor,
    "quantized": quantized,
    "compile": compiled,
    "output-aware": output_aware,
    "static": static,
    "config": config,
    "prepared": prepared,
}


def measured(model: Any, how: Row, given: argparse.Namespace) -> Row:
    """Of ``given.calls`` calls: the first whole, the later ones by their steps, and what memory is held after each."""
    clocks, held, first_call = [], [], 0.0
    for call in range(given.calls):
        torch.manual_seed(call)
        ids = torch.randint(1, 100, (given.batch, given.context), device=DEVICE)
        clock, start = Clock(), time.perf_counter()
        length = {"max_new_tokens": given.new_tokens, "min_new_tokens": given.new_tokens}
        model.generate(ids, logits_processor=[clock], do_sample=False, pad_token_id=0, **length, **how)
        synchronize()
        first_call = first_call or time.perf_counter() - start
        clocks.append(clock)
        held.append(_held())
        print(f"call {call}: first token {clock.first:.1f} ms, step {clock.step:.3f} ms, {held[-1]:.2f} GB", flush=True)
    later = clocks[1:] or clocks
    return {
        "step_ms": statistics.median(clock.step for clock in later),
        "first_token_ms": statistics.median(clock.first for clock in later),
        "first_call_s": first_call,
        "last_over_second": clocks[-1].step / later[0].step,
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else 0.0,
        "held_GB_more": held[-1] - held[min(1, len(held) - 1)],
    }


def _held() -> float:
    """GB that tensors take once ``generate`` has returned."""
    free()
    return torch.cuda.memory_allocated() / 1e9 if ON_GPU else 0.0


def run(way: str, given: argparse.Namespace) -> Row | None:
    """One row, from a model of its own. None where it fails: the others may still run."""
    print(way, flush=True)
    torch._dynamo.reset()
    free()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    model = llama.build(given.layers, given.context + given.new_tokens, given.tiny)
    try:
        with mustafar_compile.explain() as report:
            row = measured(model, WAYS[way](model, settings(given)), given)
    except Exception:
        traceback.print_exc()
        return None
    if report.graphs:
        print(report)
    sizes = {name: getattr(given, name) for name in SIZES}
    row = {"way": way} | sizes | row | {"matched": f"{len(report.matched)} of {given.layers}"}
    print(row, flush=True)
    return row


def arguments() -> argparse.Namespace:
    """What is asked for."""
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--context", type=int, default=4096, help="tokens of the prompt")
    options.add_argument("--new-tokens", type=int, default=64)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--code", choices=CODES, default="none", help="of kept elements")
    options.add_argument("--sparsity", type=float, default=0.7)
    options.add_argument("--calls", type=int, default=5, help="of generate, one after the other")
    options.add_argument("--only", choices=WAYS, nargs="+", help="default: all")
    options.add_argument("--keep", action="store_true", help="keep other rows of earlier runs in the results")
    options.add_argument("--tiny", action="store_true", help="a very small model, to try this script out")
    return options.parse_args()


def main() -> None:
    given = arguments()
    rows = rows_of(NAME, FIELDS, given.keep)
    for way in given.only or WAYS:
        row = run(way, given)
        if row is not None:
            rows[key_of(row, FIELDS)] = row
    ordered = in_order(rows.values(), SIZES, list(WAYS))
    add_ratios(ordered, SIZES[:-1], "step_ms", over_hf={"way": "hf"})
    write(NAME, ordered)


if __name__ == "__main__":
    main()
