"""``explain()``, and what is counted for it at each call."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .. import _compat
from .notices import notify_recompile_limit, open_reports
from .report import NOTHING_RAN, Report, asked, nothing_ran

_counting = threading.Lock()


@contextmanager
def explain() -> Iterator[Report]:
    """Record every graph that the backend compiles within the ``with`` block.

    Yields the report; it may be read at any time, also after the block. Graphs compiled earlier are not in it. Warns
    where the block neither compiled anything nor ran a graph with a compressed cache.
    """
    report = Report()
    hits = _compat.dynamo.recompile_limit_hits()
    open_reports.append(report)
    try:
        with _compat.dynamo.functions_given_up() as report.given_up:
            yield report
        unnamed = (
            ["a compiled function"] if _compat.dynamo.recompile_limit_hits() > hits else []
        )  # by a log that is off
        earlier = _compat.dynamo.functions_at_recompile_limit() if hits and not report.graphs else []
        for function in report.given_up or earlier or unnamed:
            notify_recompile_limit(function)
    finally:
        open_reports.remove(report)
    if not report.graphs and not report.calls:
        warnings.warn(nothing_ran(), stacklevel=3)


def warn_if_nothing_was_compiled() -> None:
    """Warn where the backend was never given a graph. For the end of a process that chose it."""
    if not asked.is_set():
        warnings.warn(NOTHING_RAN, stacklevel=2)


def record_call() -> None:
    """Count a call of a rewritten graph, on any thread."""
    for report in open_reports:
        with _counting:
            report.calls += 1
