"""How sure a figure is: bootstrap intervals of means."""

from __future__ import annotations

from collections.abc import Sequence

import torch

RESAMPLES = 2000
COVERED = 0.95


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean of samples, by drawing as many of them again and again. The same each time."""
    x = torch.tensor(samples, dtype=torch.float64)
    drawn = torch.randint(len(x), (RESAMPLES, len(x)), generator=torch.Generator().manual_seed(0))
    low, high = x[drawn].mean(1).quantile(torch.tensor([(1 - COVERED) / 2, (1 + COVERED) / 2], dtype=torch.float64))
    return low.item(), high.item()


def half_width(samples: Sequence[float]) -> float:
    """Half of that interval, to be written behind a plus-minus sign; NaN for a single sample."""
    if len(samples) < 2:
        return float("nan")
    low, high = interval(samples)
    return (high - low) / 2
