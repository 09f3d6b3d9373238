"""KV heads of a layer in two groups, each of which is stored in one way: heads that are best stored alike go together.

A group costs a decode step kernels of its own, so there are no more than two. Bytes are bought at one price in all of
the model, so what heads lose and what they take adds up to one number, and groups are found as k-means finds clusters
(Lloyd): each group takes what is best for it, each head goes to the group that is best for it, until nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

Heads = tuple[int, ...]


def price_of_bytes(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], limit: int) -> float:
    """The least price of a byte at which all that is bought takes no more than ``limit`` bytes.

    losses: of each place [H, C], of H heads and C candidates. costs: bytes that a head takes, [C]. The cheapest
    candidates must fit.
    """
    low, high = 1e-18, 1e6  # in nats; it is their ratio that is halved
    while high / low > 1.001:
        price = (low * high) ** 0.5
        chosen = [(loss + price * cost).argmin(1) for loss, cost in zip(losses, costs, strict=True)]
        spent = sum(cost[choice].sum() for choice, cost in zip(chosen, costs, strict=True))
        low, high = (price, high) if spent > limit else (low, price)
    return high


def grouped(priced: Sequence[np.ndarray]) -> list[Heads]:
    """The heads of a layer in one group or two.

    priced: of its keys and of its values [H, C], what each candidate loses for a head and what its bytes cost.
    """
    everyone = np.ones(len(priced[0]), dtype=bool)
    best, total = [everyone], _of_each(priced, everyone).sum()
    for pair in combinations(range(len(everyone)), 2):
        groups, cost = _grown(priced, pair)
        if cost < total:
            best, total = groups, cost
    return [tuple(np.flatnonzero(group).tolist()) for group in best]


def _grown(priced: Sequence[np.ndarray], pair: tuple[int, int]) -> tuple[list[np.ndarray], float]:
    """Two groups that grew from a head each, and what they cost."""
    first, second = (np.arange(len(priced[0])) == head for head in pair)
    before = np.inf
    while True:
        costs = [_of_each(priced, group) for group in (first, second)]
        total = np.minimum(*costs).sum()
        in_first = costs[0] <= costs[1]
        if not total < before or in_first.all() or not in_first.any():
            return [first, second], before
        first, second, before = in_first, ~in_first, total


def _of_each(priced: Sequence[np.ndarray], group: np.ndarray) -> np.ndarray:
    """What each head would cost, stored as is best for ``group``: [H]."""
    return np.sum([x[:, x[group].sum(0).argmin()] for x in priced], axis=0)
