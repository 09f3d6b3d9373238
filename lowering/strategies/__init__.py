"""Strategies: by what the elements that a cache keeps are chosen. One file each.

A strategy is added in a file of its own and in the table below. ``strategy.Strategy`` says what it is asked.
"""

from __future__ import annotations

from .channel_magnitude import ChannelMagnitude
from .channel_output_aware import ChannelOutputAware
from .magnitude import Magnitude
from .output_aware import OutputAware
from .strategy import Strategy
from .think import Think

__all__ = ["STRATEGIES", "STRATEGIES_OF", "Strategy"]

STRATEGIES_OF = {
    "key": ("magnitude", "output-aware", "think"),
    "value": ("magnitude", "think", "channel-magnitude", "channel-output-aware"),
}
"""Names of the strategies that keys and values may have."""

STRATEGIES: dict[str, Strategy] = {
    "magnitude": Magnitude(),
    "output-aware": OutputAware(),
    "think": Think(),
    "channel-magnitude": ChannelMagnitude(),
    "channel-output-aware": ChannelOutputAware(),
}
"""All of them by name."""
