"""Rows of results beside each other: which say the same, in what order they stand, how much faster one is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from timing import read

Row = dict[str, Any]


def key_of(row: Row, fields: Iterable[str]) -> tuple[Any, ...]:
    """What a row has in these fields."""
    return tuple(row[name] for name in fields)


def rows_of(name: str, fields: Iterable[str], keep: bool) -> dict[tuple[Any, ...], Row]:
    """The rows that are in the results ``name``, each by what it is about. keep: False starts with none."""
    return {key_of(row, fields): row for row in (read(name) if keep else [])}


def in_order(rows: Iterable[Row], fields: Sequence[str], ways: Sequence[str]) -> list[Row]:
    """Rows by these fields, of equals by their way and sparsity."""
    return sorted(rows, key=lambda row: (*key_of(row, fields), ways.index(row["way"]), row["sparsity"] or 0))


def add_ratios(rows: Sequence[Row], alike: Sequence[str], time: str = "ms", **others: Row) -> None:
    """Say of each row how many times faster it is than others, where they are there.

    alike: fields that the other has in common. others: name of the ratio -> what else the other is. time: of both.
    """
    for name, other in others.items():
        fields = (*alike, *other)
        times = {key_of(row, fields): row[time] for row in rows}
        for row in rows:
            found = times.get(key_of(row | other, fields))
            if found is not None:
                row[name] = found / row[time]
