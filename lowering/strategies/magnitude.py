"""Magnitude: what is large is kept. The default, and what the paper recommends for V."""

from __future__ import annotations

from .strategy import Strategy


class Magnitude(Strategy):
    """Ranks ``|x|`` within a row."""
