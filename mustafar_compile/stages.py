"""A stage of the backend that fails on a graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MustafarError
from .patterns.rewriting.rewriter import UnsupportedWriteError


class StageError(Exception):
    """A stage failed. The text says which, at which line of the model where that is known, and why."""


@contextmanager
def stage(done: str, raise_errors: bool) -> Iterator[None]:
    """The stage after which a graph is ``done``. What it raises becomes a StageError, unless ``raise_errors`` is set.

    Errors that are meant for users stay as they are: a graph that runs as it is would not do what was asked for.
    """
    try:
        yield
    except (MustafarError, UnsupportedWriteError):
        raise
    except Exception as error:
        if raise_errors:
            raise
        place = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        reason = f"the graph could not be {done}{place}: {type(error).__name__}: {_first_line(error)}"
        raise StageError(reason) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
