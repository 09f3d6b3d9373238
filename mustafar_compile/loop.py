"""``compile_loop``: a decorator for a user's own generate loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any, ParamSpec, TypeVar

import torch

from . import _compat
from .backend import mustafar
from .settings import merged_options

P = ParamSpec("P")
R = TypeVar("R")


def compile_loop(
    function: Callable[P, R] | None = None,
    /,
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Run a generate loop as plain Python with every model call in it compiled by this backend.

    The loop itself is not traced: it is not unrolled, may read values (``.item()``), stop early, and does not
    recompile when it runs longer. Use it bare or with ``Settings`` as keywords::

        @mustafar_compile.compile_loop(key_sparsity=0.7, value_sparsity=0.7)
        @torch.no_grad()
        def generate(model, ids, steps): ...

    mode and options are those of torch.compile; settings may stand in either place. Raises ValueError for an unknown
    setting or a value out of range, when the function is decorated.
    """
    if function is None:
        return functools.partial(compile_loop, mode=mode, options=options, **settings)
    merged, _ = merged_options("compile_loop", mode, options, settings)

    @functools.wraps(function)
    def loop(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    for code in _frames_of(loop):
        _compat.dynamo.skip_code(code)
    return torch.compile(loop, backend=functools.partial(mustafar, options=merged))


def _frames_of(function: Callable[..., Any]) -> Iterator[CodeType]:
    """The code of a function and of the functions that decorators wrapped, which Dynamo is to run as they are."""
    seen: Any = function
    while seen is not None:
        if hasattr(seen, "__code__"):
            yield seen.__code__
        seen = getattr(seen, "__wrapped__", None)
