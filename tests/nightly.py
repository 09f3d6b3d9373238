"""Cases that `make nightly` runs and `make test` does not: other values of what a case of every day shows already."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def at_night(cases: Iterable[Any]) -> list:
    """These cases of ``pytest.mark.parametrize``, marked."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly) for case in cases]


def mostly_at_night(cases: Iterable[Any], every_day: int) -> list:
    """The first ``every_day`` as they are, the rest marked."""
    cases = list(cases)
    return [*cases[:every_day], *at_night(cases[every_day:])]
