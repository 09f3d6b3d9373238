"""Strategies: by what the elements that a cache keeps are chosen. One file each.

A strategy is added in a file of its own and in the table below. ``strategy.Strategy`` says what it is asked.
"""

from __future__ import annotations

from .magnitude import Magnitude
from .output_aware import OutputAware
from .strategy import Strategy
from .think import Think

__all__ = ["STRATEGIES", "STRATEGIES_OF", "Strategy", "UnbuiltStrategyError", "strategy_named"]

STRATEGIES_OF = {
    "key": ("magnitude", "output-aware", "think"),
    "value": ("magnitude", "think", "channel-magnitude", "channel-output-aware"),
}
"""Names of the strategies that keys and values may have."""

STRATEGIES = tuple(dict.fromkeys(name for names in STRATEGIES_OF.values() for name in names))
"""All names."""

_BUILT: dict[str, Strategy] = {"magnitude": Magnitude(), "output-aware": OutputAware(), "think": Think()}


class UnbuiltStrategyError(NotImplementedError):
    """A strategy that has a name and no code yet."""


def strategy_named(name: str) -> Strategy:
    """The strategy of a name. Raises UnbuiltStrategyError where there is none yet."""
    if name not in _BUILT:
        raise UnbuiltStrategyError(f"mustafar: the strategy {name!r} is not built; accepted are {', '.join(_BUILT)}")
    return _BUILT[name]
