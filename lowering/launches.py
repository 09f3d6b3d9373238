"""Launching the kernels of a step: those that are new are compiled side by side."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton

_launched: set[tuple[object, ...]] = set()  # kernels that were launched together


@dataclass(frozen=True)
class Launch:
    """A kernel that Triton compiles, its grid, and its arguments by name with Triton's options among them."""

    kernel: Any
    grid: tuple[int, ...]
    given: dict[str, Any]


def launch(launches: Sequence[Launch], device: torch.device) -> None:
    """Launch kernels on ``device``, in this order."""
    together = (device, *(each.kernel for each in launches))
    if device.type == "cuda" and together not in _launched:
        _compile(launches)
        _launched.add(together)
    for each in launches:
        each.kernel[each.grid](**each.given)


def _compile(launches: Sequence[Launch]) -> None:
    """Each takes seconds, most of them outside of Python's lock. An error comes again at the launch."""
    with ThreadPoolExecutor(len(launches)) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        for each in launches:
            each.kernel.warmup(grid=each.grid, **each.given)
