"""Codes: how kept elements are stored in fewer bits than the cache's dtype. The contract, in plain PyTorch.

An element becomes a level, an integer from -127 to 127, relative to the largest magnitude of its row, the peak. It
stands for ``level * peak / 127``. Signs stay, what is larger never gets a smaller level, and the peak is exact (in
float32 to a unit in the last place).

- **int8**: the nearest level.
- **int4**: a sign and the nearest of eight levels of the row's own. They run from the floor, the level of the smallest
  kept magnitude, to 127, in steps that grow: level i is
  ``floor + (127 - floor) * i * (8 i + floor) / (7 (56 + floor))``, rounded.
  Kept magnitudes span one to four binades. There this is near to the best eight levels for Gaussian rows, and
  with outliers far better than even steps. With a floor of 0 the steps are those of a square, and zeros stay zeros.

A row that is not finite has a peak of NaN and is NaN as a whole. One without anything from ``TINY`` on is stored as
zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TOP = 127
"""The level of the largest magnitude of a row."""

TINY = 2.0**-119
"""Rows of smaller magnitudes count as zero: 127 over them would overflow."""

_LEVELS = 8  # of int4, without the sign


def encoded(kept: Tensor, code: str) -> list[Tensor]:
    """The kept elements [..., K] of rows, in the cache's dtype, as the buffers have them: values, then the rest."""
    if code == "none":
        return [kept]
    magnitudes = kept.float().abs()
    peak = magnitudes.amax(-1, keepdim=True)
    finite = peak < float("inf")
    ratio = torch.full_like(peak, TOP) / peak  # TOP / peak would be TOP times the rounded 1 / peak
    inverse = torch.where(finite & (peak >= TINY), ratio, 0)
    level = torch.round(torch.where(finite, magnitudes, 0) * inverse).to(torch.int32)
    negative = kept < 0
    peaks = torch.where(finite, peak, float("nan")).to(kept.dtype)
    if code == "int8":
        return [torch.where(negative, -level, level).to(torch.int8), peaks]
    floor = level.amin(-1, keepdim=True)
    index = torch.zeros_like(level)
    for i in range(1, _LEVELS):
        index = index + (2 * level > level_of(i - 1, floor) + level_of(i, floor)).to(torch.int32)
    nibble = (index + _LEVELS * negative.to(torch.int32)).unflatten(-1, (-1, 2))
    values = (nibble[..., 0] | nibble[..., 1] << 4).to(torch.uint8)
    return [values, peaks, floor.to(torch.uint8)]


def decoded(row: Mapping[str, Tensor], rank: Tensor, code: str) -> Tensor:
    """The elements of rows at these places among the kept, float32. rank: int64 [..., n], or [n] for all rows alike."""
    values = row["values"]
    rank = rank.expand(*values.shape[:-1], rank.shape[-1])
    if code == "int8":
        level = values.gather(-1, rank).float()
    else:
        nibble = values.gather(-1, rank // 2).to(torch.int32) >> rank % 2 * 4
        level = level_of((nibble & (_LEVELS - 1)), (row["floors"] & TOP).to(torch.int32)).float()
        level = torch.where((nibble & _LEVELS) != 0, -level, level)
    return level * (row["peaks"].float() * (1 / TOP))


def level_of(index: Tensor | int, floor: Tensor) -> Tensor:
    """Which level of int4 ``index`` (0 to 7) stands for in rows with this floor, int32."""
    whole = (_LEVELS - 1) * (_LEVELS * (_LEVELS - 1) + floor)
    return floor + ((TOP - floor) * index * (_LEVELS * index + floor) + whole // 2) // whole


def level_table() -> list[list[int]]:
    """The eight levels for each floor from 0 to 127."""
    floors = torch.arange(TOP + 1, dtype=torch.int32)
    return level_of(torch.arange(_LEVELS, dtype=torch.int32), floors.unsqueeze(-1)).tolist()
