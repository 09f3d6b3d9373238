"""The largest batch that fits: planned from the config alone, then confirmed by a few tries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mustafar_compile.planning.memory import OUTSIDE

from .case import Case
from .child import OUT_OF_MEMORY
from .plans import planned, weights_of

TRIES = 4
_LESS = 0.9, 0.7, 0.5  # of the first batch, where there was no room: such tries end soon
_WORTH_IT = 1.02
_FILLED = 0.985  # of the memory: blocks of the allocator are never all of a piece

Row = dict[str, Any]


def search(case: Case, measured: Callable[[Case], Row], memory: int, known: int = 0) -> Row:
    """The figures of the largest batch that was measured. memory: bytes of the card.

    measured: the figures of a case with a number in place of ``LARGEST``. known: the batch that an earlier search
    found; where it fits again, nothing else is tried. ``planned``: the batch that was planned. ``tries``: batches that
    were tried, and whether they fit.
    """
    best: Row = {}
    tries: list[tuple[int, bool]] = []
    about = {"planned": planned(case, memory), "tries": tries}
    batch = known or about["planned"]
    while batch and len(tries) < TRIES:
        found = measured(replace(case, batch=batch))
        if "failed" in found and found["failed"] != OUT_OF_MEMORY:
            return found | about | {"batch": batch}
        fits = "failed" not in found
        tries.append((batch, fits))
        best = found | {"batch": batch} if fits else best
        batch = 0 if fits and batch == known else _next(found, tries, case, memory)
        batch = batch if batch > best.get("batch", 0) else 0
    return (best or {"failed": OUT_OF_MEMORY}) | about


def _next(found: Row, tries: list[tuple[int, bool]], case: Case, memory: int) -> int:
    """What to try next; 0 where that is enough. A row takes what those took that were measured."""
    refused = [batch for batch, fits in tries if not fits]
    batch, fits = tries[-1]
    if not fits:
        return int(_LESS[len(refused) - 1] * tries[0][0])
    if not found["peak_GB"]:
        return 0
    weights = weights_of(case)
    of_row = (1e9 * found["peak_GB"] - weights) / batch
    more = min([int((_FILLED * (memory - OUTSIDE) - weights) / of_row), *(batch - 1 for batch in refused)])
    return more if more > _WORTH_IT * batch else 0
