"""Dynamo: the compilation in progress and what it guards on, and how many versions of a function there may be."""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import CodeType, FrameType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch

from .probe import probe

config = probe("torch._dynamo", "config")
TracingContext = probe("torch._guards", "TracingContext")
AttrSource = probe("torch._dynamo.source", "AttrSource")
_LocalSource = probe("torch._dynamo.source", "LocalSource")
ConstantSource = probe("torch._dynamo.source", "ConstantSource")
_is_the_object = probe("torch._dynamo.guards", "GuardBuilder").ID_MATCH
_has_as_many = probe("torch._dynamo.guards", "GuardBuilder").SEQUENCE_LENGTH
_InstructionTranslator = probe("torch._dynamo.symbolic_convert", "InstructionTranslator")
skip_code: Callable = probe("torch._dynamo.eval_frame", "skip_code")
untraced: Callable[[Callable], Callable] = probe("torch._dynamo", "disable")
maybe_mark_dynamic: Callable = probe("torch._dynamo", "maybe_mark_dynamic")
_DynamoContext = probe("torch._dynamo.eval_frame", "_TorchDynamoContext")
_log = probe("torch._dynamo.convert_frame", "log")
_counters = probe("torch._dynamo.utils", "counters")
_compiled_versions: Callable = probe("torch._dynamo.eval_frame", "_debug_get_cache_entry_list")


def guarded_owners(name: str) -> dict[str, Any]:
    """The objects that the compilation in progress guards on an attribute ``name`` of, by their path.

    A path is an expression such as "L['self'].attn".
    """
    scope = _scope()
    found = {}
    for guard in TracingContext.get().guards_context.dynamo_guards:
        path, _, attribute = guard.name.rpartition(".")
        if attribute == name and path not in found:
            with suppress(*_CANNOT_BE_READ):
                found[path] = eval(path, dict(scope))
    return found


def object_at(path: str) -> Any:
    """What an expression such as "L['self'].layers" leads to in the compilation in progress, None where it does not."""
    with suppress(*_CANNOT_BE_READ):
        return eval(path, dict(_scope()))
    return None


_CANNOT_BE_READ = (AttributeError, KeyError, IndexError, NameError, SyntaxError, TypeError)


def _scope() -> dict[str, Any]:
    """What the names of guards begin with."""
    translator = _InstructionTranslator.current_tx()
    return {"L": translator.f_locals, "G": translator.f_globals}


def bind_to_module() -> None:
    """Make the compilation in progress one for that module alone whose method it is of.

    Dynamo's recompile limit then counts the versions of a function for each module.
    """
    guards = TracingContext.get().guards_context.dynamo_guards
    for name, value in _InstructionTranslator.current_tx().f_locals.items():
        if isinstance(value, torch.nn.Module):
            guards.add(_LocalSource(name).make_guard(_is_the_object))


def guard_on_hooks(name: str) -> None:
    """Make the compilation in progress one for as many forward hooks as there are now on the modules that it concerns.

    Those that it guards on an attribute ``name`` of. By default Dynamo guards on hooks only where there are some.
    """
    owners = guarded_owners(name)
    guards = TracingContext.get().guards_context.dynamo_guards
    for guard in list(guards):
        path, _, attribute = guard.name.rpartition(".")
        if attribute == name and isinstance(owners.get(path), torch.nn.Module):
            hooks = AttrSource(guard.originating_source.base, "_forward_hooks")
            guards.add(hooks.make_guard(_has_as_many))


def runs_in_a_wrapper() -> bool:
    """Whether what is compiled now is a decorator's wrapper of ``forward``: one function for all that it decorates."""
    translator = _InstructionTranslator.current_tx()
    given = [x for value in translator.f_locals.values() for x in (value if isinstance(value, tuple) else (value,))]
    return any(isinstance(x, torch.nn.Module) and _wraps(translator.f_code, type(x).forward) for x in given)


def _wraps(code: CodeType, function: Any) -> bool:
    while hasattr(function, "__wrapped__"):
        if getattr(function, "__code__", None) is code:
            return True
        function = function.__wrapped__
    return False


def buffers_read() -> list[Any]:
    """The registered buffers, which may be None, that the compilation in progress guards on."""
    scope = _scope()
    names = {guard.name for guard in TracingContext.get().guards_context.dynamo_guards}
    found = []
    for name in names:
        if re.search(r"\._buffers\[[^]]*\]$", name):
            with suppress(*_CANNOT_BE_READ):
                found.append(eval(name, dict(scope)))
    return found


def patch_config(**changes: Any) -> None:
    """Set entries of Dynamo's config while the function runs that is compiled now, from its next call on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        context = frame.f_locals.get("self")
        if isinstance(context, _DynamoContext):
            patch = _patch(**changes)
            if patch not in context.enter_exit_hooks:
                context.enter_exit_hooks.append(patch)
            return
        frame = frame.f_back


@functools.cache
def _patch(**changes: Any) -> Callable[[], Callable[[], None]]:
    """Sets entries of Dynamo's config and returns what sets them back."""
    return config._make_closure_patcher(**changes)


def function_being_compiled() -> str:
    return _described(_InstructionTranslator.current_tx().f_code)


def _described(code: CodeType) -> str:
    return f"'{code.co_name}' ({code.co_filename}:{code.co_firstlineno})"  # as Dynamo says it


@contextmanager
def functions_given_up() -> Iterator[list[str]]:
    """A list that gets each function that Dynamo gives up on, as it has too many compiled versions."""
    found: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("torch._dynamo hit config."):
            found.append(cast(tuple, record.args)[2])
        return True

    _log.addFilter(note)
    try:
        yield found
    finally:
        _log.removeFilter(note)


_limits: WeakKeyDictionary[CodeType, int] = WeakKeyDictionary()
"""How many versions Dynamo makes at most of each function that the backend was given a graph of."""


def note_recompile_limit() -> None:
    """Note the limit of the function whose compilation is in progress."""
    _limits[_InstructionTranslator.current_tx().f_code] = config.recompile_limit


def functions_at_recompile_limit() -> list[str]:
    """The functions of which the backend was given as many graphs as Dynamo makes versions."""
    return [_described(code) for code in _limits if _is_at_limit(code)]


def _is_at_limit(code: CodeType) -> bool:
    return len(_compiled_versions(code)) >= _limits.get(code, config.recompile_limit)


def recompile_limit_hits() -> int:
    """How often Dynamo gave up on a function since it has too many compiled versions."""
    graph_breaks = _counters["unimplemented"]
    known = list(graph_breaks.items())  # Dynamo may be counting meanwhile: it sees the frames that are called here
    return sum(count for reason, count in known if reason.startswith("Dynamo recompile limit exceeded"))


def function_at_recompile_limit() -> str | None:
    """The function on the Python stack that Dynamo gave up on, if any."""
    frame = sys._getframe(1) if recompile_limit_hits() else None
    while frame is not None:
        if _is_at_limit(frame.f_code):
            return _described(frame.f_code)
        frame = frame.f_back
    return None
