"""Results of a study, saved one by one: lines of JSON, each a row or where the rows behind it come from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import environment

Row = dict[str, Any]


def about(row: Row) -> tuple[tuple[str, Any], ...]:
    """What a row is about: equal for two rows of the same."""
    return tuple(sorted((name, value) for name, value in row.items() if name not in ("figures", "head_dim")))


class Results:
    """The rows of a file, and those that are added to it. A last line that was cut off is dropped.

    where: says where rows come from.
    """

    def __init__(self, path: Path, where: Callable[[], dict[str, str]] = environment) -> None:
        self.path, self._where = path, where
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
        lines = [json.loads(line) for line in whole.splitlines()]
        self.rows: list[Row] = [line for line in lines if "environment" not in line]
        self._kept: str | None = whole  # until the first row is added

    def add(self, row: Row) -> None:
        """Save a row behind the others."""
        if self._kept is not None:
            self._begin()
        self.rows.append(row)
        self._append(row)

    def _begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(f"{self._kept}\n" if self._kept else "", encoding="utf-8")
        self._kept = None
        self._append({"environment": self._where(), "command": sys.argv})

    def _append(self, line: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
