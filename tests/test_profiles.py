"""What the benchmarks make of profiles of ranks."""

from __future__ import annotations

import pytest
from profile_of_a_step import _RUNS, waits_of


def test_a_rank_waits_for_the_one_that_comes_last():
    one_step = [(10.0, 30.0), (50.0, 12.0), (11.0, 11.5), (10.0, 14.0)]  # of the first rank and of the second, us
    profiles = [{"ms": 1.0, "busy_ms": 0.5, "collectives_us": [us[rank] for us in one_step] * _RUNS} for rank in (0, 1)]
    first, second = waits_of(profiles)
    assert first["collectives_ms"] == second["collectives_ms"] == pytest.approx(43e-3)
    assert first["waiting_ms"] == pytest.approx(38e-3)
    assert second["waiting_ms"] == pytest.approx(24.5e-3)
    assert (first["last"], second["last"]) == (0.75, 0.25)


def test_collectives_are_paired_from_the_last_on():
    profiles = [{"ms": 1.0, "busy_ms": 0.5, "collectives_us": us} for us in ([99.0, 1.0, 2.0], [1.0, 3.0])]
    assert [rank["waiting_ms"] * _RUNS for rank in waits_of(profiles)] == pytest.approx([0, 1e-3])
