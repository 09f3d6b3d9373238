"""The efficiency study as a YAML file.

    limit_s: 150                    # of a row
    runs:
      - name: equal batch
        measure: step
        shape: llama-3-8b
        batch: 32
        context: 8192
        rows:
          - {way: [hf, dense]}
          - {way: [ours, op], setting: [0.5, 0.7, small]}

A row is the fields of ``case.Case``; those that a run has beside its name are those of all its rows. A list makes a row
for each of its members, several lists one for each choice of theirs. Rows are measured in the order of the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from study_files import StudyError, known

from .case import Case

LIMIT_S = 150
_FIELDS = {field.name for field in fields(Case)}


@dataclass(frozen=True)
class Run:
    """Rows that stand in one table. limit_s: seconds that one of them may take."""

    name: str
    cases: tuple[Case, ...]
    limit_s: float


@dataclass(frozen=True)
class Study:
    """All runs of a file."""

    name: str
    runs: tuple[Run, ...]

    @property
    def cases(self) -> dict[Case, float]:
        """All cases, each once, with their limits."""
        return {case: run.limit_s for run in self.runs for case in run.cases}


def read_study(path: Path, names: list[str] | None = None) -> Study:
    """The study of a file. names: of the runs that are wanted. Raises StudyError, naming what is accepted."""
    try:
        given = known(yaml.safe_load(path.read_text(encoding="utf-8")), {"limit_s", "runs"}, "study", ["runs"])
        runs = [_run(run, given.get("limit_s", LIMIT_S)) for run in given["runs"]]
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise StudyError(f"{path}: {error}") from error
    known(dict.fromkeys(names or ()), {run.name for run in runs}, "run")
    return Study(path.stem, tuple(run for run in runs if not names or run.name in names))


def _run(given: dict[str, Any], limit_s: float) -> Run:
    known(given, {"name", "rows", "limit_s", *_FIELDS}, "run", ["name", "rows"])
    shared = {name: value for name, value in given.items() if name in _FIELDS}
    cases = dict.fromkeys(case for row in given["rows"] for case in _expanded(shared | known(row, _FIELDS, "row")))
    return Run(given["name"], tuple(cases), given.get("limit_s", limit_s))


def _expanded(row: dict[str, Any]) -> Iterator[Case]:
    choices = [value if isinstance(value, list) else [value] for value in row.values()]
    for chosen in itertools.product(*choices):
        yield Case(**dict(zip(row, chosen, strict=True)))
