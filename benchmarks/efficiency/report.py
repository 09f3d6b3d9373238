"""The report: one HTML file with all tables and pictures in it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

from . import plots, tables
from .case import AT_THE_SAME_BYTES, OURS, PEERS
from .runs import Study

_TEMPLATE = "report.html.jinja"


def html(study: Study, rows: list[dict[str, Any]]) -> str:
    """All of a study that there are rows for."""
    found = {case: figures for case, figures in tables.by_case(rows).items() if case in study.cases}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = number
    return environment.get_template(_TEMPLATE).render(
        name=study.name,
        devices=sorted({figures["device"] for figures in found.values() if "device" in figures}),
        gains=tables.gains(found),
        losing=tables.losing(found),
        table_14=tables.table_14(found),
        pictures=[(title, _data_uri(svg)) for title, svg in plots.draw_all(found)],
        runs=[(run.name, tables.table(run, rows)) for run in study.runs],
        profiled=[(case, figures) for case, figures in found.items() if "kernels" in figures],
        ways=PEERS | AT_THE_SAME_BYTES | OURS,
    )


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def number(value: Any) -> str:
    """A cell of a table: numbers in four digits."""
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
