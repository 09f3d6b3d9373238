"""Spreading a budget, against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mustafar_compile.calibration.allocation import Choice, allocated
from mustafar_compile.calibration.candidates import candidates, format_of

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
