"""What the YAML files of the studies have in common."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


class StudyError(ValueError):
    """A study that says something which is not accepted."""


def known(given: dict[str, Any], accepted: Collection[str], what: str, needed: Collection[str] = ()) -> dict[str, Any]:
    """``given``. Raises StudyError for a name in it that is not accepted, and for one that is needed and missing."""
    unknown, missing = sorted(set(given) - set(accepted)), sorted(set(needed) - set(given))
    if unknown:
        raise StudyError(f"{what} {', '.join(unknown)} is unknown; accepted are {', '.join(sorted(accepted))}")
    if missing:
        raise StudyError(f"a {what} has no {', '.join(missing)}; it is {given}")
    return given
