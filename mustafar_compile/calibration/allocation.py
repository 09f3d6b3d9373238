"""Spreading a budget: one choice for each item, so that costs stay within the budget and losses are least.

The multiple-choice knapsack problem. Costs are integers with a large common divisor, so it is solved exactly, by
dynamic programming over what is spent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    """A choice: what it costs, a positive integer, and what it loses."""

    cost: int
    loss: float


def allocated(items: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Which choice each item gets, by index; of equally good ones the first. At least one of them must fit.

    Raises ValueError where even the cheapest choices cost more than the budget.
    """
    least = sum(min(choice.cost for choice in choices) for choices in items)
    if least > budget:
        raise ValueError(f"the budget is {budget}, and the least that can be spent is {least}")
    unit = math.gcd(*(choice.cost for choices in items for choice in choices))
    limit = budget // unit
    loss, chosen = np.zeros(limit + 1), []  # least loss of the items so far that costs at most so many units
    for choices in items:
        loss, chosen_here = _with_one_more(loss, choices, unit)
        chosen.append(chosen_here)
    picked = []
    for choices, chosen_here in zip(reversed(items), reversed(chosen), strict=True):
        picked.append(int(chosen_here[limit]))
        limit -= choices[picked[-1]].cost // unit
    return picked[::-1]


def _with_one_more(loss: np.ndarray, choices: Sequence[Choice], unit: int) -> tuple[np.ndarray, np.ndarray]:
    """The least loss at each cost with one more item, infinite where nothing fits, and the choice that gives it."""
    best, chosen = np.full_like(loss, np.inf), np.zeros(len(loss), dtype=np.int16)
    for i, choice in enumerate(choices):
        units = choice.cost // unit
        rest = loss[: len(loss) - units] if units < len(loss) else loss[:0]
        better = rest + choice.loss < best[units:]
        best[units:][better] = (rest + choice.loss)[better]
        chosen[units:][better] = i
    return best, chosen
