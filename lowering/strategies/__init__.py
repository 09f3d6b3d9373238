"""Strategies: by what the elements that a cache keeps are chosen. One file each.

``strategy.Strategy`` says what a strategy is asked. ``STRATEGIES`` has those of this package and any that were
registered from outside.
"""

from __future__ import annotations

from .channel_magnitude import ChannelMagnitude
from .channel_output_aware import ChannelOutputAware
from .magnitude import Magnitude
from .output_aware import OutputAware
from .strategy import Strategy
from .think import Think

__all__ = ["STRATEGIES", "Strategy", "all_packaged", "strategies_of", "strategy_named"]

STRATEGIES: dict[str, Strategy] = {
    "magnitude": Magnitude(),
    "output-aware": OutputAware(),
    "think": Think(),
    "channel-magnitude": ChannelMagnitude(),
    "channel-output-aware": ChannelOutputAware(),
}
"""All of them by name."""

_PACKAGED = frozenset(STRATEGIES)


def all_packaged() -> bool:
    """Whether the code of all strategies is part of this package."""
    return STRATEGIES.keys() == _PACKAGED


def strategies_of(role: str) -> list[str]:
    """Names of the strategies that "key" or "value" may have."""
    return [name for name, strategy in STRATEGIES.items() if role in strategy.roles]


def strategy_named(name: str) -> Strategy:
    """The strategy of this name. Raises ValueError for an unknown one."""
    if name not in STRATEGIES:
        raise ValueError(
            f"the strategy {name!r} is unknown; accepted are {', '.join(STRATEGIES)}, and names that "
            "mustafar_compile.register_strategy was given in this process"
        )
    return STRATEGIES[name]
