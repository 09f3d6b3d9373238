"""Spreading a budget, against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mustafar_compile.calibration.allocation import Choice, allocated
from mustafar_compile.calibration.candidates import candidates, format_of
from mustafar_compile.calibration.grouping import grouped, price_of_bytes

CHOICES = st.lists(st.builds(Choice, st.integers(1, 12), st.integers(0, 20).map(float)), min_size=1, max_size=4)


@given(st.lists(CHOICES, min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 5))
def test_nothing_loses_less_within_the_budget(items, budget, unit):
    items = [[Choice(choice.cost * unit, choice.loss) for choice in choices] for choices in items]
    all_ways = [way for way in itertools.product(*items) if sum(choice.cost for choice in way) <= budget]
    if not all_ways:
        with pytest.raises(ValueError, match=f"the budget is {budget}, and the least that can be spent is"):
            allocated(items, budget)
        return
    chosen = [choices[i] for choices, i in zip(items, allocated(items, budget), strict=True)]
    assert sum(choice.cost for choice in chosen) <= budget
    assert sum(x.loss for x in chosen) == min(sum(x.loss for x in way) for way in all_ways)


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_candidates_are_all_counts_that_there_are(head_dim):
    """40 of 96 too: that is a sparsity of 0.58333.., which keeps 48 where it is cut off below."""
    codes = ["none", "int4"]
    formats = [format_of(stored, head_dim, 32) for stored in candidates(head_dim, codes)]
    kept = range(head_dim, 0, -8)
    assert [(format.code, format.kept) for format in formats] == [*itertools.product(codes, kept)]


def cost_of(priced, groups):
    return sum(x[list(group)].sum(0).min() for x in priced for group in groups)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_two_groups_are_no_worse_than_one(heads, count, seed):
    """And where that is so in two clear groups, they are found."""
    random = np.random.default_rng(seed)
    priced = [random.random((heads, count)), random.random((heads, count))]
    groups = grouped(priced)
    assert sorted(head for group in groups for head in group) == [*range(heads)]
    assert 1 <= len(groups) <= 2
    whole = tuple(range(heads))
    assert cost_of(priced, groups) <= cost_of(priced, [whole]) + 1e-9
    small, large = 0.01 * random.random((heads, 4)), 10 + random.random((heads, 4))
    sensitive = random.random(heads) < 0.5
    clear = np.where(sensitive[:, None] == (np.arange(4) < 2), small, large)
    expected = {tuple(np.flatnonzero(part).tolist()) for part in (sensitive, ~sensitive)} - {()}
    assert set(grouped([clear, small])) == expected or not sensitive.any() or sensitive.all()


def test_a_single_head_is_one_group():
    assert grouped([np.zeros((1, 3)), np.zeros((1, 3))]) == [(0,)]
    assert grouped([np.zeros((3, 3)), np.zeros((3, 3))]) == [(0, 1, 2)], "nothing is gained by two"


@given(st.integers(0, 10**6), st.floats(0.3, 1))
def test_what_is_bought_at_the_price_fits(seed, share):
    random = np.random.default_rng(seed)
    losses = [np.sort(random.random((3, 4)))[:, ::-1] for _ in range(4)]
    costs = [np.array([1, 2, 4, 8])] * 4
    limit = int(share * 8 * 12)
    price = price_of_bytes(losses, costs, limit)

    def spent(price):
        return sum(cost[(loss + price * cost).argmin(1)].sum() for loss, cost in zip(losses, costs, strict=True))

    assert spent(price) <= limit
    assert spent(price / 1.01) > limit or spent(1e-17) <= limit
