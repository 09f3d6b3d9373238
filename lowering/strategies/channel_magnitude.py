"""Magnitude within a channel: of 32 tokens those are kept that are large in it (Mustafar, arXiv 2505.22913)."""

from __future__ import annotations

from .by_channel import ByChannel


class ChannelMagnitude(ByChannel):
    """Ranks ``|V|`` within each channel of a block."""
