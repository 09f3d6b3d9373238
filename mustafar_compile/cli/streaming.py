"""Texts on the terminal as they come: one, or several side by side."""

from __future__ import annotations

from types import TracebackType

import typer
from rich.live import Live

from .output import console, table

_CUT = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for a part of a character


class Stream:
    """One text, on standard output."""

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._printed = ""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._silent:
            typer.echo()

    def update(self, text: str, title: str = "") -> None:
        """Print what is new in ``text``, from the last whole character on."""
        text = text.rstrip(_CUT)
        if not self._silent and text.startswith(self._printed):
            typer.echo(text[len(self._printed) :], nl=False)
            self._printed = text


class Columns:
    """Texts side by side, by their titles."""

    def __init__(self, titles: list[str]) -> None:
        self._texts = dict.fromkeys(titles, "")
        self._live = Live(console=console(), auto_refresh=False)

    def __enter__(self) -> Columns:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def update(self, text: str, title: str) -> None:
        """Show one of them as far as it has come."""
        self._texts[title] = text
        grid = table("", self._texts, [tuple(self._texts.values())])
        for column in grid.columns:
            column.ratio = 1
        self._live.update(grid, refresh=True)
