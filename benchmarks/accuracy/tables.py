"""Rows of results as the tables that are read: a line for each case, means over what was read, how sure they are."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace

from .case import Case
from .intervals import half_width
from .readings import Row
from .results import about
from .runs import Run

Group = dict[tuple[Case, str], list[Row]]


def tables(run: Run, rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """A title and the lines of each table of a run: one for each of its models."""
    for model in run.models:
        found = grouped(run, model, rows)
        if found:
            yield f"{run.name}: {model}", [_compared(case, way, found) for case, way in found]


def _compared(case: Case, way: str, found: Group) -> Row:
    """A line, and beside a strategy how much more is lost than by magnitude, block by block."""
    mine = line(case, found[case, way])
    theirs = found.get((replace(case, key_strategy="magnitude", value_strategy="magnitude"), way))
    if theirs and theirs is not found[case, way]:
        pairs = zip(_blocks(found[case, way]), _blocks(theirs), strict=True)
        more = [mine - theirs for mine, theirs in pairs]
        mine["over_magnitude"] = f"{statistics.fmean(more):+.4f} +- {half_width(more):.4f}" if more else ""
    ways = {other for _, other in found}
    return {"case": mine.pop("case"), **({"way": way} if len(ways) > 1 else {}), **mine}


def _blocks(rows: list[Row]) -> list[float]:
    """Losses of all blocks of texts, in the order of the texts."""
    texts = sorted((row for row in rows if "text" in row), key=lambda row: row["part"])
    return [block for row in texts for block in row["figures"]["blocks"]]


def grouped(run: Run, model: str, rows: list[Row]) -> Group:
    """The rows of a run for each case and way, in the order of its cases."""
    known = {about(row): row for row in rows}
    found: Group = {}
    for case, way in itertools.product(run.cases, run.ways):
        names = [about(reading.row(model, case, way)) for reading in run.readings]
        of_case = [known[name] for name in names if name in known]
        if of_case:
            found[case, way] = of_case
    return found


def line(case: Case, rows: list[Row]) -> Row:
    """One line of a table: the rows of one case."""
    found: Row = {"case": case.label, "bytes_%": 100 * stored(case, rows)}
    texts = [row["figures"] for row in rows if "text" in row]
    if texts:
        found["over_dense"] = statistics.fmean(figures["over_dense"] for figures in texts)
        found["+-"] = half_width(_blocks(rows))
        found["kl"] = statistics.fmean(figures["kl"] for figures in texts)
    for name in ("key_error", "value_error"):
        errors = [row["figures"][name] for row in rows if name in row["figures"]]
        found |= {name: statistics.fmean(errors)} if errors else {}
    for name in dict.fromkeys(task(row) for row in rows if "scores" in row["figures"]):
        figures = [row["figures"] for row in rows if task(row) == name]
        scores = [score for of_row in figures for score in of_row["scores"]]
        found[name] = f"{statistics.fmean(scores):.0%} +- {half_width(scores):.0%}"
        found[f"{name} nats"] = statistics.fmean(nats for of_row in figures for nats in of_row["answers"])
    return found


def task(row: Row) -> str:
    """What is asked in a row that is not of a text."""
    return row.get("task", "questions")


def stored(case: Case, rows: list[Row]) -> float:
    """Mean share of the dense bytes that the caches of some rows take."""
    return statistics.fmean(case.stored_share(row["head_dim"], row["figures"]["tokens"]) for row in rows)
