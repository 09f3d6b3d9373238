"""The largest batch that fits: planned from the config alone, then confirmed by a few tries."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from shapes import DTYPE, config_of

from mustafar_compile.planning.footprint import Footprint, measure
from mustafar_compile.planning.memory import OUTSIDE, Plan, compressed_plan, dense_plan

from .case import Case, options
from .child import OUT_OF_MEMORY

TRIES = 4
_LESS = 0.9, 0.7, 0.5  # of the first batch, where there was no room: such tries end soon
_WORTH_IT = 1.02
_FILLED = 0.985  # of the memory: blocks of the allocator are never all of a piece

_planning = threading.Lock()

Row = dict[str, Any]


def search(case: Case, measured: Callable[[Case], Row], memory: int) -> Row:
    """The figures of the largest batch that was measured. memory: bytes of the card.

    measured: the figures of a case with a number in place of ``LARGEST``. ``tries``: batches that were tried, and
    whether they fit; the first is the plan's.
    """
    best: Row = {}
    tries: list[tuple[int, bool]] = []
    batch = planned(case, memory)
    while batch and len(tries) < TRIES:
        found = measured(replace(case, batch=batch))
        if "failed" in found and found["failed"] != OUT_OF_MEMORY:
            return found | {"tries": tries, "batch": batch}
        fits = "failed" not in found
        tries.append((batch, fits))
        best = found | {"batch": batch} if fits else best
        batch = _next(found, tries, case, memory)
        batch = batch if batch > best.get("batch", 0) else 0
    return (best or {"failed": OUT_OF_MEMORY}) | {"tries": tries}


def plan_ahead(cases: Iterable[Case]) -> None:
    """Find what plans need, so that no device waits for it: some ten seconds for a model."""
    for case in cases:
        _footprint(case.shape, case.layers)


def planned(case: Case, memory: int) -> int:
    """The batch that ``mustafar plan`` foretells. For a single step a prompt needs no room."""
    plan, _ = _plan(case)
    return plan.largest_batch(case.context, memory)


def _plan(case: Case) -> tuple[Plan, int]:
    """The plan of a case, and the bytes of the weights."""
    footprint = _footprint(case.shape, case.layers)
    ours = case.is_ours or case.way == "snapkv"
    new = case.new_tokens or 1
    plan = compressed_plan(footprint, options(case.setting), new) if ours else dense_plan(footprint, new)
    phases = {"steps": plan.phases["steps"]} if case.measure == "step" else plan.phases
    return Plan(phases), footprint.weights


def _next(found: Row, tries: list[tuple[int, bool]], case: Case, memory: int) -> int:
    """What to try next; 0 where that is enough. A row takes what those took that were measured."""
    refused = [batch for batch, fits in tries if not fits]
    batch, fits = tries[-1]
    if not fits:
        return int(_LESS[len(refused) - 1] * tries[0][0])
    if not found["peak_GB"]:
        return 0
    weights = _plan(case)[1]
    of_row = (1e9 * found["peak_GB"] - weights) / batch
    more = min([int((_FILLED * (memory - OUTSIDE) - weights) / of_row), *(batch - 1 for batch in refused)])
    return more if more > _WORTH_IT * batch else 0


def _footprint(shape: str, layers: int) -> Footprint:
    with _planning, warnings.catch_warnings():  # modes of torch and filters of warnings are for one thread at a time
        warnings.simplefilter("ignore")
        return _measured(shape, layers)


@functools.lru_cache
def _measured(shape: str, layers: int) -> Footprint:
    changes = {"num_hidden_layers": layers} if layers else {}
    return measure(config_of(shape, 1024, **changes), DTYPE)
