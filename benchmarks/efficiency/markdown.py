"""All of a study as tables in Markdown, in place of those that a document has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from study_files import StudyError

from . import tables
from .runs import Study

BEGIN, END = "<!-- efficiency study: begin -->", "<!-- efficiency study: end -->"
"""Lines between which a document has the tables."""

_SIZES = "shape", "layers", "batch", "context", "new"
_NAMES = {"ms": "ms a step", "tokens_per_s": "tokens/s", "first_token_ms": "first token, ms", "peak_GB": "peak, GB",
          "over_hf": "over HF", "over_dense": "over best dense", "over_inductor": "over Inductor", "new": "new tokens",
          "loss": "loss, nats"}  # fmt: skip
_OF_LOSSES = {"over_dense": "nats over dense"}
_MARKS = 512, 1024, 2048

Row = dict[str, Any]


def replace(path: Path, study: Study, rows: list[Row]) -> None:
    """Put the tables of a study into a document. Raises StudyError as ``around`` does."""
    before, after = around(path)
    path.write_text(f"{before}{BEGIN}\n\n{document(study, rows)}\n{END}{after}", encoding="utf-8")


def around(path: Path) -> tuple[str, str]:
    """What a document has before and behind its tables. Raises StudyError for one without ``BEGIN`` and ``END``."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise StudyError(f"{path} has no lines {BEGIN} and {END}")
    return before, after


def document(study: Study, rows: list[Row]) -> str:
    """A table for each run that has rows, the paper's beside ours, and where a peer is better."""
    found = {case: figures for case, figures in tables.by_case(rows).items() if case in study.cases}
    parts = [_run(run.name, tables.table(run, rows), run.cases[0].measure == "loss") for run in study.runs]
    parts += [_of_paper(table) for table in tables.table_14(found)]
    parts += [_losing(tables.losing(found))]
    return "\n".join(part for part in parts if part)


def _run(name: str, lines: list[Row], of_losses: bool) -> str:
    if not lines:
        return ""
    same = [size for size in _SIZES if len({line.get(size) for line in lines}) == 1 and lines[0].get(size)]
    about = ", ".join(f"{_NAMES.get(size, size)} {lines[0][size]}" for size in same if lines[0][size] != "all")
    columns = [key for key in dict.fromkeys(key for line in lines for key in line) if key not in same]
    columns = [key for key in columns if any(line.get(key) not in ("", None) for line in lines)]
    columns.sort(key=lambda key: (key == "note", key == "loss"))
    names = _NAMES | (_OF_LOSSES if of_losses else {})
    cells = [[line.get(key, "") for key in columns] for line in lines]
    return f"**{name}** ({about}):\n\n{_table([names.get(key, key) for key in columns], cells)}"


def _of_paper(table: Row) -> str:
    cells = [
        [side, entry["line"].label, entry["line"].first_token, *(_gained(entry, mark) for mark in _MARKS)]
        for side in ("paper", "here")
        for entry in table[side]
    ]
    head = ["", "way", "first token, s", *(f"tokens/s over {mark}" for mark in _MARKS)]
    return f"**The paper's Table 14, {table['shape']}, prompts of {table['context']} tokens**:\n\n{_table(head, cells)}"


def _gained(entry: Row, mark: int) -> str:
    speed, gain = entry["line"].tokens_per_s.get(mark), entry["gains"].get(mark)
    return "" if speed is None else f"{speed:.1f}" + (f" ({gain:.2f})" if gain else "")


def _losing(lines: list[Row]) -> str:
    head = ["", "of", "peer", "its", "its loss", "our best", "ours", "our loss"]
    cells = [
        [
            f"{line['measure']}, {line['shape']}, batch {line['batch']}, {line['context']} tokens",
            *(line[key] for key in ("quantity", "peer", "theirs", "peer_loss", "way", "ours", "loss")),
        ]
        for line in lines
    ]
    return f"**Where a peer is better** by more than 2%:\n\n{_table(head, cells)}" if lines else ""


def _table(head: list[str], cells: list[list[Any]]) -> str:
    """With an empty line behind it."""
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _text(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
