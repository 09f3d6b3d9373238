"""Inductor: compiling a graph, its config and caches, and how it builds C++."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .probe import probe

compile_fx: Callable = probe("torch._inductor.compile_fx", "compile_fx")
config = probe("torch._inductor", "config")
probe("torch._inductor.config", "get_type")
functorch_config = probe("torch._functorch", "config")
probe("torch._functorch.config", "enable_autograd_cache")
list_mode_options: Callable[..., dict] = probe("torch._inductor", "list_mode_options")
cpp_code_cache = probe("torch._inductor.codecache", "CppCodeCache")
cpp_compiler: Callable[[], str] = probe("torch._inductor.cpp_builder", "get_cpp_compiler")


def boxed(compiled: Callable) -> Callable[[list[Any]], Sequence[Any]]:
    """What ``compile_fx`` returns, as a function of a list of arguments, which it empties: so they can be freed."""
    inner = compiled
    while hasattr(inner, "__wrapped__"):
        inner = inner.__wrapped__
        code = getattr(inner, "__code__", None)
        if getattr(inner, "_boxed_call", False) and code is not None and not code.co_flags & inspect.CO_VARARGS:
            return inner  # wrappers of it have the mark, too, though they take arguments one by one
    return lambda arguments: compiled(*arguments)


@contextmanager
def configured(options: dict[str, Any], digest: str, traces_are_cached: bool = True) -> Iterator[None]:
    """Inductor's config with ``options`` set, and ``digest`` in the keys of its caches on disk.

    The key of AOTAutograd's cache names our ops but not their code, so after an upgrade stale code would run. This
    table is part of the key, and made for such digests. traces_are_cached: whether that cache is used. Inductor's own
    is in any case: its key is the graph of all that the ops became.
    """
    known = "unsafe_marked_cacheable_functions"
    changes = {**options, known: getattr(config, known) | {"mustafar_compile": digest}}
    traces = {} if traces_are_cached else {"enable_autograd_cache": False}
    with config.patch(changes), functorch_config.patch(traces):
        yield


def loops_of_cpus() -> dict[str, int]:
    """Options of Inductor for a graph on a CPU: as long a loop as newer torch admits there by itself.

    That of torch 2.11, 30 operations, is short of what expands a packed row, which would be stored as a dense one.
    """
    return {"realize_opcount_threshold": 50} if config.realize_opcount_threshold == 30 else {}
