"""The memory that ``mustafar plan`` foretells, beside what torch allocates at most: five shapes, three ways.

    python benchmarks/plan_check.py
    python benchmarks/plan_check.py --layers 8 --jobs 8

Each row is a model with random weights in a process of its own, which generates once. ``error`` is what was planned
over what was measured, less 1. Only memory is measured, of the process alone, so rows may run side by side.

Fewer layers are no easier to foretell. Weights and caches are known to the byte and grow with the layers; what may be
foretold wrongly is what one layer and the logits need for a while, which does not, so its share is the larger.
"""

from __future__ import annotations

import argparse
import multiprocessing
from typing import Any

import torch
from shapes import DTYPE, build, config_of
from timing import DEVICE, ON_GPU, parser, write

from mustafar_compile.planning.footprint import Footprint, measure
from mustafar_compile.planning.memory import compressed_plan, dense_plan

NAME = "plan_check"
NEW_TOKENS = 40  # the last of them is not in the cache

CASES = {  # name: shape, batch, context
    "llama-2-7b": ("llama-2-7b", 4, 4096),
    "llama-3-8b": ("llama-3-8b", 4, 8192),
    "llama-3-8b long": ("llama-3-8b", 1, 32768),
    "qwen-3-4b": ("qwen-3-4b", 8, 4096),
    "mistral-7b": ("mistral-7b", 16, 2048),
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "vocab_size": 100}  # fmt: skip
WAYS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "0.7": {"key_sparsity": 0.7, "value_sparsity": 0.7},
    "small": {"preset": "small"},
}


def configured(shape: str, context: int, given: argparse.Namespace) -> Any:
    """The config of a shape, with the changes that the command line asks for."""
    changes: dict[str, Any] = dict(TINY if given.tiny else {})
    changes |= {"num_hidden_layers": given.layers} if given.layers else {}
    return config_of(shape, context + NEW_TOKENS, **changes)


def planned(footprint: Footprint, way: str, batch: int, context: int) -> dict[str, Any]:
    """Bytes that are foretold, and their parts in the phase that takes most."""
    options = WAYS[way]
    new = NEW_TOKENS - 1
    plan = dense_plan(footprint, new) if options is None else compressed_plan(footprint, options, new)
    phases = plan.parts(batch, context)
    worst = max(phases, key=lambda phase: sum(phases[phase].values()))
    return {"planned_GB": plan.peak(batch, context) / 1e9, "phase": worst, "parts": phases[worst]}


def generated(config: Any, way: str, batch: int, context: int) -> dict[str, float]:
    """What torch allocated, and reserved, at most in one call of ``generate``."""
    model = build(config)
    ids = torch.randint(1, config.vocab_size, (batch, context), device=DEVICE)
    how: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    if WAYS[way] is None:
        how |= {"cache_implementation": "static"}
    else:
        model.compile(backend="mustafar", options=WAYS[way])
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model.generate(ids, pad_token_id=0, **how)
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if ON_GPU else (0, 0)
    return {"measured_GB": peaks[0] / 1e9, "reserved_GB": peaks[1] / 1e9}


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its error, which is printed."""
    row["error"] = row["planned_GB"] / row["measured_GB"] - 1 if row["measured_GB"] else 0.0
    print(row, flush=True)
    return row


def arguments() -> argparse.Namespace:
    """What is asked for."""
    options = parser(__doc__)
    options.add_argument("--only", choices=CASES, nargs="+", help="default: all")
    options.add_argument("--layers", type=int, help="in place of those of the shapes")
    options.add_argument("--jobs", type=int, default=1, help="rows that run side by side on the GPU")
    options.add_argument("--tiny", action="store_true", help="very small models, to try this script out")
    return options.parse_args()


def main() -> None:
    given = arguments()
    rows: list[tuple[dict[str, Any], Any]] = []
    fresh = multiprocessing.get_context("spawn")
    with fresh.Pool(given.jobs, maxtasksperchild=1) as pool:
        for name in given.only or CASES:
            shape, batch, context = CASES[name]
            batch, context = (2, 100) if given.tiny else (batch, context)
            config = configured(shape, context, given)
            footprint = measure(config, DTYPE)
            for way in WAYS:
                row = {"shape": name, "layers": config.num_hidden_layers, "batch": batch, "context": context}
                row |= {"way": way}
                row |= planned(footprint, way, batch, context)
                rows.append((row, pool.apply_async(generated, (config, way, batch, context))))
        done = [compared(row | measured.get()) for row, measured in rows]
    write(NAME, done)


if __name__ == "__main__":
    main()
