"""Rows of results as tables: each with how it compares with its peers of the same size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .case import LARGEST, Case
from .paper import BATCH, TABLE_14, Line
from .runs import Run

Row = dict[str, Any]
Found = dict[Case, Row]

NOTHING_LOST = ("eager", "inductor", "hf", "dense")
NOISE = 0.02
"""Share by which two figures may differ and still be called equal."""

NOTE = 60
"""Characters of a note on a terminal."""

_SHORT = {"first_token_ms": "first token", "ms": "a step", "tokens_per_s": "tokens/s", "over_dense": "nats over dense",
          "peak_GB": "GB", "batch": "batch"}  # fmt: skip


def by_case(rows: list[Row]) -> Found:
    """The latest figures of each case."""
    return {Case.of(row): row["figures"] for row in rows}


def shown(figures: Row) -> str:
    """Figures in one line."""
    if "failed" in figures:
        return figures["failed"]
    return ", ".join(f"{name}: {figures[key]:.4g}" for key, name in _SHORT.items() if key in figures)


def table(run: Run, rows: list[Row]) -> list[Row]:
    """The lines of a run, in its order."""
    found = by_case(rows)
    return [line(case, found) for case in run.cases if case in found]


def line(case: Case, found: Found) -> Row:
    """One line of a table."""
    figures = found[case]
    size: Row = {"way": case.label, "shape": case.shape, "layers": case.layers or "all"}
    size |= {"batch": batch_text(case, figures), "context": case.context}
    size |= {"new": case.new_tokens} if case.new_tokens else {}
    if "failed" in figures:
        return size | {"note": figures["failed"]}
    numbers = {name: figures[name] for name in ("ms", "tokens_per_s", "first_token_ms", "peak_GB") if name in figures}
    numbers |= {name: figures[name] for name in ("over_dense", "+-", "kl") if name in figures}
    for peer in ("dense", "hf", "inductor"):
        other = _peer(case, peer, found)
        numbers |= {f"over_{peer}": gain(case, other, found)} if other else {}
    lost = loss(case, found)
    numbers |= {"loss": lost} if lost is not None and case.measure != "loss" else {}
    return size | numbers | {"note": figures.get("note", "")}


def cut(line: Row) -> Row:
    """A line for a terminal, where a reason may be too long."""
    return line | {"note": line["note"][:NOTE]}


def batch_text(case: Case, figures: Row) -> str:
    """The batch; the largest one with what was planned."""
    if case.batch != LARGEST:
        return str(case.batch)
    planned = f", planned {figures['planned']}" if "planned" in figures else ""
    card = f" in {case.memory_GB:g} GB" if case.memory_GB else ""
    return f"{figures.get('batch', 0)} (largest{card}{planned})"


def batch_of(case: Case, figures: Row) -> int:
    """The batch that was measured."""
    return figures["batch"] if case.batch == LARGEST else int(case.batch)


def loss(case: Case, found: Found) -> float | None:
    """Nats a token that the setting of a case costs the model of the loss rows; None where it was not measured."""
    if case.way in NOTHING_LOST:
        return 0.0
    way = "ours" if case.is_ours else case.way
    of_setting = (row for other, row in found.items() if (other.way, other.setting) == (way, case.setting))
    return next((row["over_dense"] for row in of_setting if "over_dense" in row), None)


def gain(case: Case, peer: Case, found: Found) -> float:
    """How many times better than ``peer``: more tokens a second, or less time to the first token."""
    mine, theirs = found[case], found[peer]
    if case.measure == "first token":
        return theirs["first_token_ms"] / mine["first_token_ms"]
    return mine["tokens_per_s"] / theirs["tokens_per_s"]


def _peer(case: Case, way: str, found: Found) -> Case | None:
    """The case of the same size in another way, if it was measured on the same device."""
    return next((other for other in peers(case, found) if other.way == way), None)


def peers(case: Case, found: Found) -> list[Case]:
    """Cases of other people's ways that may be compared with ``case``: of the same size, on the same device."""
    mine = found[case]
    if "failed" in mine or case.measure == "loss":
        return []
    alike = (other for other in found if other.sizes == case.sizes and not other.is_ours)
    measured = (other for other in alike if "failed" not in found[other])
    return [other for other in measured if found[other]["device"] == mine["device"]]


def gains(found: Found) -> list[Row]:
    """A line for each of our cases that has peers: its gain over each of them."""
    lines = []
    for case in found:
        over = {other.label: gain(case, other, found) for other in peers(case, found)}
        if case.is_ours and over:
            lines.append(_named(case, found) | {"over": over})
    return lines


def losing(found: Found) -> list[Row]:
    """Where a peer is better than one of our ways with any setting: the quantity, and both figures."""
    measured = [case for case in found if case.is_ours and case.measure != "loss" and "failed" not in found[case]]
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in measured:
        groups.setdefault((case.sizes, case.way), []).append(case)
    return [line for ours in groups.values() for quantity in _QUANTITIES for line in _losing(ours, quantity, found)]


def _losing(ours: list[Case], quantity: Quantity, found: Found) -> Iterator[Row]:
    known = [case for case in ours if quantity.of(case, found[case])]
    if not known:
        return
    winner = quantity.best(known, key=lambda case: quantity.of(case, found[case]))
    mine = quantity.of(winner, found[winner])
    for peer in peers(winner, found):
        theirs = quantity.of(peer, found[peer])
        better = theirs / mine if quantity.best is max else mine / (theirs or math.inf)
        if theirs and better > 1 + NOISE:
            figures = {"peer": peer.label, "theirs": theirs, "ours": mine, "peer_loss": loss(peer, found)}
            yield _named(winner, found) | {"quantity": quantity.name} | figures


def _peak(case: Case, figures: Row) -> float:
    return 0.0 if case.batch == LARGEST else figures.get("peak_GB", 0.0)


def _largest(case: Case, figures: Row) -> float:
    return float(figures["batch"]) if case.batch == LARGEST else 0.0


@dataclass(frozen=True)
class Quantity:
    """What rows are compared by. of: of a case and its figures, 0 where it has none. best: ``max`` or ``min``."""

    name: str
    of: Callable[[Case, Row], float]
    best: Callable[..., Case]


_QUANTITIES = (
    Quantity("tokens a second", lambda case, figures: figures.get("tokens_per_s", 0.0), max),
    Quantity("ms to the first token", lambda case, figures: figures.get("first_token_ms", 0.0), min),
    Quantity("peak memory, GB", _peak, min),
    Quantity("largest batch", _largest, max),
)


def _named(case: Case, found: Found) -> Row:
    size = {"measure": case.measure, "shape": case.shape, "layers": case.layers or "all", "context": case.context}
    return size | {"batch": batch_text(case, found[case]), "way": case.label, "loss": loss(case, found)}


def table_14(found: Found) -> list[Row]:
    """For each model of the paper's table its lines, ``paper`` and ``here``, with the gain over the dense one there.

    Calls that end before the first of the paper's marks are none of it.
    """
    tables = []
    for (shape, context), printed in TABLE_14.items():
        here = [
            (case, figures)
            for case, figures in found.items()
            if (case.measure, case.shape, case.context, case.batch) == ("generate", shape, context, BATCH)
            and "failed" not in figures
            and not printed[0].tokens_per_s.keys().isdisjoint(_marks(figures))
        ]
        if here:
            lines = [Line(case.label, figures["first_token_ms"] / 1e3, _marks(figures)) for case, figures in here]
            dense = next((mine for (case, _), mine in zip(here, lines, strict=True) if case.way == "hf"), None)
            layers = sorted({case.layers for case, _ in here})
            sides = {"paper": _compared(printed, printed[0]), "here": _compared(lines, dense)}
            tables.append({"shape": shape, "context": context, "layers": layers, **sides})
    return tables


def _marks(figures: Row) -> dict[int, float]:
    return {int(mark): speed for mark, speed in figures["tokens_per_s_over"].items()}


def _compared(lines: list[Line], dense: Line | None) -> list[Row]:
    return [{"line": mine, "gains": _over(mine, dense)} for mine in lines]


def _over(mine: Line, dense: Line | None) -> dict[int, float]:
    theirs = {} if dense is None else dense.tokens_per_s
    return {mark: speed / theirs[mark] for mark, speed in mine.tokens_per_s.items() if mark in theirs}
