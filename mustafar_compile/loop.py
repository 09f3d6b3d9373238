"""``compile_loop``: a decorator for a user's own generate loop."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping
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

    A loop may be a generator, which yields each token as it comes, and may be asynchronous.

    mode and options are those of torch.compile; settings may stand in either place. Raises ValueError for an unknown
    setting or a value out of range and TypeError for what is no function, when the function is decorated.
    """
    if function is None:
        return functools.partial(compile_loop, mode=mode, options=options, **settings)
    if not callable(function):
        raise TypeError(f"mustafar: compile_loop takes a function; given is {function!r}")
    merged, _ = merged_options("compile_loop", mode, options, settings)
    for code in _frames_of(function):
        _compat.dynamo.skip_code(code)
    _compat.dynamo.skip_code(_call.__code__)
    run = torch.compile(_call, backend=functools.partial(mustafar, options=merged))

    @functools.wraps(function)
    def loop(*args: Any, **kwargs: Any) -> Any:
        return _with_each_part(run(function, *args, **kwargs), run)

    return loop


def _call(function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    return function(*args, **kwargs)


def _with_each_part(result: Any, run: Callable[..., Any]) -> Any:
    """``result``; if it is a function that is only begun, one of which ``run`` runs each part from then on."""
    if inspect.isasyncgen(result):
        return _each(result, run)
    return _Parts(result, run) if inspect.isgenerator(result) or inspect.iscoroutine(result) else result


class _Parts(Generator, Coroutine):
    """A generator or a coroutine that ``run`` resumes."""

    def __init__(self, whole: Any, run: Callable[..., Any]) -> None:
        self.whole, self.run = whole, run

    def send(self, value: Any) -> Any:
        return self.run(self.whole.send, value)

    def throw(self, *error: Any) -> Any:
        return self.run(self.whole.throw, *error)

    def __await__(self) -> _Parts:
        return self


async def _each(whole: Any, run: Callable[..., Any]) -> AsyncIterator[Any]:
    try:
        while True:
            yield await _Parts(whole.__anext__(), run)
    except StopAsyncIteration:
        return
    finally:
        await whole.aclose()


def _frames_of(function: Callable[..., Any]) -> Iterator[CodeType]:
    """The code of a function and of the functions that decorators wrapped, which Dynamo is to run as they are."""
    seen: Any = function
    while seen is not None:
        if hasattr(seen, "__code__"):
            yield seen.__code__
        seen = getattr(seen, "__wrapped__", None)
