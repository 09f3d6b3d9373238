"""All pairs in place of all combinations: what goes wrong between settings goes wrong between two of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def pairwise(*choices: Iterable[Any]) -> list[tuple]:
    """Few combinations of one of each of ``choices``, in which any two of different ones meet.

    Greedy: always the combination, first in order, that has most pairs which have not met yet.
    """
    candidates = {pick: set(_pairs(pick)) for pick in product(*(range(len(list(c))) for c in choices))}
    missing, chosen = set().union(*candidates.values()), []
    while missing:
        best = max(candidates, key=lambda pick: len(candidates[pick] & missing))
        missing -= candidates[best]
        chosen.append(tuple(choice[i] for choice, i in zip(choices, best, strict=True)))
    return chosen


def _pairs(pick: tuple[int, ...]) -> Iterable[tuple]:
    return combinations(enumerate(pick), 2)
