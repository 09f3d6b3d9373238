"""A whole decode step of a model of the shape of Llama 3 8B with random weights, and its time to first token.

    python benchmarks/decode_step.py
    python benchmarks/decode_step.py --batch 4 --context 4096 --only ours --sparsity 0.7
    python benchmarks/decode_step.py --ttft

hf     the model as Hugging Face compiles it: a static cache, torch.compile with mode="reduce-overhead"
dense  the best dense step that could be built: fused, no mask, heads not repeated, one CUDA graph
ours   the model of hf with backend="mustafar", over a compressed static cache
op     the step of dense with our op over compressed caches in place of its attention
eager  with --ttft: the model as it is. Prompts have a padding mask of ones, as ``generate`` gives them
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import dense
import llama
import torch
from comparing import Row, add_ratios, in_order, key_of, rows_of
from decoder import CompressedDecoder, DenseDecoder
from profile_of_a_step import print_profile, profile_of
from timing import DEVICE, ON_GPU, Function, cold, free, in_a_row, median_ms, parser, synchronize, write
from transformers import DynamicCache

import mustafar_compile
from turns import alone, shared

NAME = "decode_step"
WAYS = ("eager", "hf", "dense", "ours", "op")
SIZES = ("phase", "batch", "context", "layers")
FIELDS = (*SIZES, "way", "sparsity")
_WARM_UPS = 4  # behind the step that compiles: recording CUDA graphs, then replaying
_STEPS = 20
_ROUNDS, _MOST_ROUNDS = 5, 20
_ALIKE = 0.01  # share by which they may differ
_AGAIN = 3  # what else is measured where others prepare: the quietest counts


class Sizes(Protocol):
    """Of a decode step over ``context`` tokens, or of the prefill of ``prompt`` tokens.

    reserved, allocated: bytes of the device that were taken before. profile: whether kernels are listed.
    """

    batch: int
    context: int
    prompt: int
    layers: int
    reserved: int
    allocated: int
    profile: bool


def reserved_bytes() -> int:
    """What the process holds of the device's memory, CUDA graphs included."""
    free()
    return torch.cuda.memory_reserved() if ON_GPU else 0


def measured(step: Function, given: Sizes) -> Row:
    """Time of one step among many, as in generation: the host may run ahead of the device.

    host_ms is what the host needs to launch a step. Where it comes near the time of the step, the host is what limits.
    spread: the slowest round less the fastest, over ms. Where ``given`` asks for it, profile is what ``profile_of``
    finds.
    """
    step()  # compiles
    synchronize()
    with alone():
        for _ in range(_WARM_UPS):
            step()
        synchronize()
        rounds = _quiet_rounds(step)
        whole, host = zip(*rounds, strict=True)
        row: Row = {"ms": statistics.median(whole), "host_ms": statistics.median(host), "spread": _spread(rounds)}
        if given.profile:
            profiles = [profile_of(step) for _ in range(_AGAIN if shared() else 1)]
            row["profile"] = min(profiles, key=lambda found: found["busy_ms"])
    if given.profile:
        print_profile("kernels of a step", row["profile"])
    return row


def _quiet_rounds(step: Function) -> list[tuple[float, float]]:
    """``_ROUNDS``. Where other processes that prepare may use the device for moments, the fastest ones of as many as it
    takes until they are alike.
    """
    rounds: list[tuple[float, float]] = []
    while len(rounds) < (_MOST_ROUNDS if shared() else _ROUNDS):
        rounds = sorted([*rounds, in_a_row(step, _STEPS)])
        if len(rounds) >= _ROUNDS and _spread(rounds[:_ROUNDS]) < _ALIKE:
            break
    return rounds[:_ROUNDS]


def _spread(rounds: list[tuple[float, float]]) -> float:
    whole = [ms for ms, _ in rounds]
    return (max(whole) - min(whole)) / statistics.median(whole)


def inputs(batch: int, first: int, tokens: int) -> dict[str, Any]:
    """Random ids at positions from ``first`` on."""
    ids = torch.randint(1, 100, (batch, tokens), device=DEVICE)
    positions = torch.arange(first, first + tokens, device=DEVICE).expand(batch, -1)
    return {"input_ids": ids, "position_ids": positions, "use_cache": True, "logits_to_keep": 1}


def hf_step(compiled: Any, cache: Any, batch: int, context: int) -> Function:
    """One step of an HF model into the last slot of ``cache``, again and again."""
    given, rewind = inputs(batch, context - 1, 1), llama.rewinder(cache)

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits = compiled(**given, past_key_values=cache).logits
        rewind()
        return logits

    return step


def options_of(sparsity: float) -> Row:
    """Options of the backend."""
    return {"key_sparsity": sparsity, "value_sparsity": sparsity, "window": llama.WINDOW}


class Step(NamedTuple):
    """call: one decode step. about: what can be said of it before it ran."""

    call: Function
    about: Row


def hf(model: Any, given: Sizes, options: Row) -> Step:
    """(i) As HF compiles it."""
    cache = llama.dense_cache(model, given.batch, given.context)
    return Step(hf_step(torch.compile(model, mode="reduce-overhead"), cache, given.batch, given.context), {})


def best_dense(model: Any, given: Sizes, options: Row) -> Step:
    """(ii) The best dense step, with whichever of PyTorch's attentions is the fastest."""
    name = fastest_attention(model, given.batch, given.context)
    decoder = DenseDecoder(model, given.batch, given.context, dense.sdpa_attentions()[name])
    return Step(decoder.graphed(), {"note": f"attention: {name}"})


def fastest_attention(model: Any, batch: int, context: int) -> str:
    """The name of the fastest for a layer of this model."""
    (heads, kv_heads), head_dim = llama.heads_here(model), model.config.head_dim
    how: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE}
    query = torch.randn(batch, heads, 1, head_dim, **how)
    key, value = (torch.randn(batch, kv_heads, context, head_dim, **how) for _ in range(2))
    with alone():
        found = [dense.measured(dense.sdpa_attentions(), query, key, value) for _ in range(_AGAIN if shared() else 1)]
    return min(found[0], key=lambda name: min(times.get(name, math.inf) for times in found))


def ours(model: Any, given: Sizes, options: Row) -> Step:
    """(iii) The model of (i) over a compressed cache."""
    cache = llama.compressed_cache(model, given.batch, given.context, options)
    compiled = torch.compile(model, backend="mustafar", options=options | {"triton.cudagraphs": ON_GPU})
    stored = mustafar_compile.cache_stats(cache).stored_bytes
    return Step(hf_step(compiled, cache, given.batch, given.context), {"cache_GB": stored / 1e9})


def op(model: Any, given: Sizes, options: Row) -> Step:
    """(iv) The step of (ii) with our attention in place of the dense one."""
    decoder = CompressedDecoder(model, given.batch, given.context, options)
    return Step(decoder.graphed(), {"cache_GB": decoder.stored_bytes / 1e9})


DECODE: dict[str, Callable[[Any, Sizes, Row], Step]] = {"hf": hf, "dense": best_dense, "ours": ours, "op": op}


def decode(way: str, model: Any, given: Sizes, options: Row) -> Row:
    """Time and memory of a step."""
    with mustafar_compile.explain() as report:
        step = DECODE[way](model, given, options)
        row = measured(step.call, given) | held(given) | step.about
    if report.graphs:
        print(report)
        row["note"] = matched(report, given)
    return row


def matched(report: Any, given: Sizes) -> str:
    """How many layers ran compressed. The numbers are ours only where that is all of them."""
    return f"matched: {len(report.matched)} of {given.layers}"


def held(given: Sizes) -> Row:
    """Memory in use while decoding: weights, cache, and what CUDA graphs need. What compiling took is given back."""
    return {"memory_GB": (reserved_bytes() - given.reserved) / 1e9}


def prefill(compiled: Any, model: Any, given: Sizes) -> Row:
    """Time from the prompt to the first new token, and the most memory that it took."""
    prompt = inputs(given.batch, 0, given.prompt)
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])

    def first_token() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        return compiled(**prompt, past_key_values=cache).logits[:, -1].argmax(-1)

    first_token()  # compiles
    with alone():
        taken = median_ms(first_token, runs=10)
    free()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    first_token()
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    return {"ms": taken, "memory_GB": (peak - given.allocated) / 1e9}


def prefill_eager(model: Any, given: Sizes, options: Row) -> Row:
    """Prefill as ``generate`` does it with a model that is not compiled."""
    return prefill(model, model, given)


def prefill_hf(model: Any, given: Sizes, options: Row) -> Row:
    """Prefill with plain Inductor."""
    return prefill(torch.compile(model), model, given)


def prefill_ours(model: Any, given: Sizes, options: Row) -> Row:
    """Prefill that leaves a compressed cache behind."""
    compiled = torch.compile(model, backend="mustafar", options=options)
    with mustafar_compile.explain() as report:
        row = prefill(compiled, model, given)
    return row | {"note": matched(report, given)}


PREFILL = {"eager": prefill_eager, "hf": prefill_hf, "ours": prefill_ours}


def run(way: str, sparsity: float | None, given: argparse.Namespace) -> Row | None:
    """One row, from a model of its own. None where it fails: the others may still run."""
    runner: Callable[..., Row] = PREFILL[way] if given.ttft else functools.partial(decode, way)
    options = {} if sparsity is None else options_of(sparsity)
    tokens = given.prompt if given.ttft else given.context
    print(f"{way}, sparsity {sparsity}", flush=True)
    torch._dynamo.reset()
    cold()  # its buffer is there from now on, and no row's memory
    given.reserved, given.allocated = reserved_bytes(), torch.cuda.memory_allocated() if ON_GPU else 0
    try:
        row = runner(llama.build(given.layers, tokens, given.tiny), given, options)
    except Exception:
        traceback.print_exc()
        return None
    what = {"phase": "first token" if given.ttft else "decode step", "way": way, "sparsity": sparsity}
    sizes = {"batch": given.batch, "context": tokens, "layers": given.layers}
    speed = {} if given.ttft else {"tokens/s": 1e3 * given.batch / row["ms"]}
    row = what | sizes | row | speed
    print(row, flush=True)
    return row


def arguments() -> argparse.Namespace:
    """What is asked for."""
    options = parser(__doc__)
    options.add_argument("--batch", type=int, help="default: 32; with --ttft 4")
    options.add_argument("--context", type=int, default=8192, help="tokens in the cache, the new one included")
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--sparsity", type=float, action="append", help="default: 0.5 and 0.7")
    options.add_argument("--only", choices=WAYS, nargs="+", help="default: all")
    options.add_argument("--ttft", action="store_true", help="time to first token in place of a decode step")
    options.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt, with --ttft")
    options.add_argument("--keep", action="store_true", help="keep other rows of earlier runs in the results")
    options.add_argument("--profile", action="store_true", help="also which kernels a decode step runs, and how long")
    options.add_argument("--tiny", action="store_true", help="a very small model, to try this script out")
    given = options.parse_args()
    given.batch = given.batch or (4 if given.ttft else 32)
    return given


def main() -> None:
    given = arguments()
    ways = [way for way in (PREFILL if given.ttft else DECODE) if way in (given.only or WAYS)]
    cases = [(way, s) for way in ways for s in (given.sparsity or [0.5, 0.7] if way in ("ours", "op") else [None])]
    rows = rows_of(NAME, FIELDS, given.keep)
    for case in cases:
        row = run(*case, given)
        if row is not None:
            rows[key_of(row, FIELDS)] = row
    ordered = in_order(rows.values(), SIZES, WAYS)
    dense = {f"over_{way}": {"way": way, "sparsity": None} for way in ("eager", "hf", "dense")}
    add_ratios(ordered, SIZES, **dense)
    write(NAME, ordered)


if __name__ == "__main__":
    with torch.no_grad():
        main()
