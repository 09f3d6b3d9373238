"""``compile_loop``: a decorator for a user's own generate loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch

from .settings import read_options, setting_names

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
    unknown = settings.keys() - set(setting_names())
    if unknown:
        raise ValueError(
            f"compile_loop: unknown setting {', '.join(sorted(unknown))}; accepted are {', '.join(setting_names())}, "
            "mode and options"
        )
    merged = {**(options or {}), **settings}
    read_options(mode, merged)
    from .backend import mustafar

    backend = functools.partial(mustafar, mode=mode, options=merged)
    # Dynamo skips the frame of a non-recursively disabled function and compiles the frames called from it.
    return functools.wraps(function)(
        torch.compile(torch._dynamo.disable(function, recursive=False), backend=backend)
    )
