"""What commands print: text for people, or JSON; errors, and the exit status that they are."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.", show_default=False)]

_WIDTH = 160  # where the output is no terminal


def console(err: bool = False) -> Console:
    """Standard output, or standard error."""
    out = Console(stderr=err, highlight=False)
    if not out.is_terminal:
        out.width = _WIDTH
    return out


def print_json(result: Any) -> None:
    """One object on one line, so that several can follow each other."""
    typer.echo(json.dumps(result, ensure_ascii=False))


def table(title: str, columns: Iterable[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table of texts. Columns with a ``>`` before their name are set to the right."""
    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in columns:
        grid.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    return grid


def fail(message: str) -> NoReturn:
    """Leave with status 1. message: may name the project first, as its errors do."""
    typer.echo(f"mustafar: {message.removeprefix('mustafar: ')}", err=True)
    raise typer.Exit(1)


def first_line(error: BaseException) -> str:
    """An error as one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what other libraries say on the way. Our own notices are shown as what they are."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="mustafar: ")
        shown = warnings.showwarning
        warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)
        try:
            yield
        finally:
            warnings.showwarning = shown
