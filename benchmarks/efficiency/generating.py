"""``generate`` of a row: time to first token, and tokens a second over the first so many new ones."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

import generate
import torch
from timing import DEVICE, ON_GPU, free

from turns import alone

from .case import Case

MARKS = (512, 1024, 2048)
"""New tokens over which the speed is taken, as the paper does."""

_WARM_UP = 8  # tokens of a first call, which compiles and records
_FIRSTS = 5  # calls that are measured to their first token
_QUANTIZED = {"quantized hqq": {"backend": "hqq", "nbits": 4}, "quantized fp8": {"backend": "fp8"}}

Row = dict[str, Any]


def measured(model: Any, case: Case, options: Row, byte_share: float) -> Row:
    """Figures of the second call; the time to the first token is the median of five. byte_share: of the cache that a
    press leaves."""
    with _way(model, case.way, options, byte_share) as how:
        _call(model, case, how, _WARM_UP)
        free()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        with alone():
            clock = _call(model, case, how, case.new_tokens)
            firsts = [clock.first, *(_call(model, case, how, 1).first for _ in range(_FIRSTS - 1))]
    reached = [mark for mark in MARKS if mark < case.new_tokens] + [case.new_tokens]
    return {
        "first_token_ms": statistics.median(firsts),
        "ms": clock.step,
        "tokens_per_s": 1e3 * case.batch / clock.step,
        "tokens_per_s_over": {str(mark): 1e3 * case.batch / clock.mean_step(mark) for mark in reached},
    }


@contextlib.contextmanager
def _way(model: Any, way: str, options: Row, byte_share: float) -> Iterator[Row]:
    """Arguments of ``generate``."""
    if way == "snapkv":
        from kvpress import SnapKVPress

        from mustafar_compile.integrations.kvpress import pressing

        with pressing(model, SnapKVPress(compression_ratio=1 - byte_share)):
            yield {}
    elif way in _QUANTIZED:
        yield {"cache_implementation": "quantized", "cache_config": _QUANTIZED[way]}
    else:
        yield generate.WAYS[way](model, options)


def _call(model: Any, case: Case, how: Row, tokens: int) -> generate.Clock:
    """One call that ends after ``tokens`` new ones; its cache has room for all of the case, so that it is compiled for
    no other length."""
    ids = torch.randint(1, model.config.vocab_size, (case.batch, case.context), device=DEVICE)
    clock = generate.Clock()

    def ended(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= case.context + tokens, device=ids.device)

    length = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens, "stopping_criteria": [ended]}
    model.generate(ids, logits_processor=[clock], do_sample=False, pad_token_id=0, **length, **how)
    return clock
