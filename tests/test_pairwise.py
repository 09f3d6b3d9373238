"""All pairs are there, in few combinations."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from pairwise import pairwise


@pytest.mark.parametrize(
    ("sizes", "most"),
    [((3, 2, 2), 6), ((3, 2, 2, 2, 2), 8), ((7, 2, 2), 14), ((4, 3, 3), 13), ((1, 1), 1), ((2, 5), 10)],
)
def test_any_two_choices_meet(sizes, most):
    choices = [[f"{i}{j}" for j in range(size)] for i, size in enumerate(sizes)]
    chosen = pairwise(*choices)
    for one, other in combinations(range(len(sizes)), 2):
        met = {(pick[one], pick[other]) for pick in chosen}
        assert met == set(product(choices[one], choices[other]))
    assert len(chosen) == len(set(chosen)) <= most
    assert pairwise(*choices) == chosen, "the same tests each time"
