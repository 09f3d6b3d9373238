"""Processes that share a device take turns: they prepare side by side and measure one at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections import defaultdict
from collections.abc import Iterator

LOCK = "BENCHMARK_LOCK"
"""The environment variable that names a file. Processes with the same one share a device."""

seconds: dict[str, float] = defaultdict(float)
"""Of this process: ``waited`` for its turn, ``alone`` with the device, and what ``timed`` was given."""


def shared() -> bool:
    """Whether there may be other processes."""
    return bool(os.environ.get(LOCK))


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """What it takes is added to ``seconds[name]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - start


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it no other of the processes is within it. Not to be nested."""
    path = os.environ.get(LOCK)
    with open(path, "w") if path else contextlib.nullcontext() as file:
        if file:
            with timed("waited"):
                fcntl.flock(file, fcntl.LOCK_EX)
        try:
            with timed("alone"):
                yield
        finally:
            if file:  # closing is not enough where a process that was forked has the file, too
                fcntl.flock(file, fcntl.LOCK_UN)
