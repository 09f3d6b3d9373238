"""Strategies of your own: what one is made of, and ``register_strategy``, which gives it a name.

``Strategy`` chooses among the channels of each token, ``ByChannel`` among the tokens of each channel of values.
"""

from __future__ import annotations

import re

from .lowering.buffers import MAX_QUERY_TOKENS, Buffer
from .lowering.format import Format
from .lowering.strategies import STRATEGIES, Strategy
from .lowering.strategies.by_channel import ByChannel

__all__ = ["MAX_QUERY_TOKENS", "Buffer", "ByChannel", "Format", "Strategy", "register_strategy"]

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_ANY = Format(128, 64, 32)
_TAKEN = {"values", "bitmap", "peaks", "floors", "window", "counts"}


def register_strategy(name: str, strategy: Strategy) -> None:
    """Let ``name`` stand for a strategy of yours, in this process: ``key_strategy=name``, ``value_strategy=name``.

    Saved caches hold the name, so a process that loads one registers the strategy first. A name stands for one object,
    as compiled code holds on to what it was: for a changed strategy take another name or a new process.

    name: lower-case letters, digits, "-" and "_". strategy: an instance of a subclass of ``Strategy``. Raises TypeError
    for anything else, ValueError for another name, one that is taken, roles other than "key" and "value", and state
    that cannot be kept (see ``Strategy.buffers``).
    """
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"mustafar: register_strategy({name!r}, ...) takes an instance of a subclass of "
            f"mustafar_compile.strategies.Strategy; given is {strategy!r}"
        )
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"mustafar: {name!r} is no name of a strategy; accepted are lower-case letters, digits, - and _, a letter "
            "first"
        )
    if STRATEGIES.get(name, strategy) is not strategy:
        raise ValueError(
            f"mustafar: the strategy {name!r} is known already, as {STRATEGIES[name]!r}; take another name, since "
            "compiled code keeps the old one"
        )
    if not strategy.roles or not set(strategy.roles) <= {"key", "value"}:
        raise ValueError(
            f"mustafar: the strategy {name!r} has the roles {strategy.roles!r}; accepted are 'key' and 'value'"
        )
    _check_state(name, strategy)
    STRATEGIES[name] = strategy


def _check_state(name: str, strategy: Strategy) -> None:
    buffers = strategy.buffers(_ANY)
    names = [buffer.name for buffer in buffers]
    for buffer in buffers:
        first, others = buffer.dims[:1], buffer.dims[1:]
        fits = first == ("batch",) and all(isinstance(dim, int) or dim == "heads" for dim in others)
        if not fits or buffer.name in _TAKEN or names.count(buffer.name) > 1:
            raise ValueError(
                f"mustafar: the strategy {name!r} cannot keep {buffer}; accepted are dims ('batch', ...) of numbers "
                f"and 'heads', and a name of its own that is none of {', '.join(sorted(_TAKEN))}"
            )
