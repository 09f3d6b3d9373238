"""Notices of what is lost or costs more than it should: a warning, given once, and a line in every open report."""

from __future__ import annotations

import warnings
from typing import Any

from .. import _compat
from .report import Report

_given: set[str] = set()
open_reports: list[Report] = []
"""The reports of ``explain()`` blocks that run now, of all threads."""


def notify(message: str, stacklevel: int = 2) -> None:
    """Enter ``message`` into the open reports, and warn with it unless that was done before."""
    for report in open_reports:
        if message not in report.notices:
            report.notices.append(message)
    if message not in _given:
        _given.add(message)
        warnings.warn(f"mustafar: {message}", stacklevel=stacklevel + 1)


def notify_blind() -> None:
    """Say that keys or values rank by less than their strategy wants."""
    notify(
        "keys or values that were cached before the first compiled step are pruned without their queries, which were "
        "not seen: where the strategy is output-aware, by magnitude. Compile the prompt, too, into a cache that it "
        "makes itself",
        stacklevel=3,
    )


def notify_decompressed(func: Any) -> None:
    """Say that an op outside the compiled graphs decompresses a cache, and if Dynamo gave up compiling, that too."""
    notify(f"{func} runs on a compressed KV cache outside the compiled graphs, which decompresses it", stacklevel=5)
    function = _compat.dynamo.function_at_recompile_limit()
    if function is not None:
        notify_recompile_limit(function)


def notify_recompile_limit(function: str) -> None:
    """Say that ``function`` is not compiled any more."""
    notify(
        f"Dynamo's recompile limit is reached in {function}: what would compile anew runs eagerly now, right but "
        "uncompressed. Let fewer shapes or settings change, or raise torch._dynamo.config.recompile_limit",
        stacklevel=6,
    )
