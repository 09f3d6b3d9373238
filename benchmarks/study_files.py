"""What the YAML files of the studies, and the cases in them, have in common."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, Self


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


@dataclass(frozen=True)
class StudyCase:
    """A case of a study: its fields, which results hold where they are not at their defaults."""

    def _check(self, name: str, accepted: bool, wanted: str) -> None:
        if not accepted:
            raise ValueError(f"{name}={getattr(self, name)!r} is not accepted; it must be {wanted}")

    def described(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        """The case of a row of results."""
        return cls(**{f.name: row[f.name] for f in fields(cls) if f.name in row})
