"""Candidates for how the kept elements of a row are stored: what is read back of them.

A row is one token of one KV head. Each code is a function ``(x, keep) -> decoded``: x [..., T, D] in the dtype of the
cache, keep a boolean tensor of that shape with as many elements in each row, decoded as x with zeros where nothing is
kept. No bits are packed here; ``Code.row_bytes`` says what they would take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
_INT8, _INT4, _FP8 = 127, 7, 448.0
_OCTAVE = 128  # between a bfloat16 and its double, in steps of the bit pattern

Decoded = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Code:
    """A candidate.

    function: see above. bits: of a kept element. scales: bytes of a scale and the like. over: what has one in common, a
    "row", a "group" of the kept elements of a row, or a "channel" of a group of tokens.
    """

    function: Decoded
    bits: int
    scales: int = 0
    over: str = "row"

    def row_bytes(self, head_dim: int, kept: int) -> float:
        """Bytes of a row, with its bitmap where not all is kept."""
        count = {"row": 1, "group": -(-kept // GROUP), "channel": head_dim / GROUP}[self.over]
        bitmap = head_dim / 8 if kept < head_dim else 0
        return bitmap + kept * self.bits / 8 + self.scales * count


def kept_mask(x: Tensor, kept: int) -> Tensor:
    """Where the ``kept`` largest magnitudes of each row are; ties go to the lower channel."""
    places = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, places, True)


# One scale a row


def _of_rows(function: Callable[[Tensor], Tensor]) -> Decoded:
    """A code of a function of the kept elements, rows [..., T, kept] in float32 -> the same shape."""

    def decoded(x: Tensor, keep: Tensor) -> Tensor:
        rows = x[keep].view(*x.shape[:-1], -1).float()
        return torch.zeros_like(x).masked_scatter_(keep, function(rows).to(x.dtype))

    return decoded


def _stored(scale: Tensor, dtype: torch.dtype, up: bool = False) -> Tensor:
    """A positive scale as a dtype stores it, rounded to nearest or up; never 0."""
    stored = scale.to(dtype)
    if up:
        stored = torch.where(stored.float() < scale, (stored.view(torch.int16) + 1).view(dtype), stored)
    return stored.float().clamp(min=torch.finfo(torch.float32).tiny)


def _symmetric(rows: Tensor, largest: int, dtype: torch.dtype, up: bool = False) -> Tensor:
    """Multiples of the row's maximum / ``largest``."""
    scale = _stored(rows.abs().amax(-1, keepdim=True) / largest, dtype, up)
    return (rows / scale).round().clamp(-largest, largest) * scale


def _asymmetric(rows: Tensor, bits: int = 4) -> Tensor:
    """Even levels, as many as bits can tell apart, from the least to the largest element."""
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    top = 2**bits - 1
    scale = _stored((high - low) / top, torch.bfloat16)
    return ((rows - low) / scale).round().clamp(0, top) * scale + low


def _fp8(rows: Tensor) -> Tensor:
    return rows.clamp(-_FP8, _FP8).to(torch.float8_e4m3fn).float()


def _fp8_scaled(rows: Tensor) -> Tensor:
    scale = _stored(rows.abs().amax(-1, keepdim=True) / _FP8, torch.bfloat16, up=True)
    return _fp8(rows / scale) * scale


def _grouped(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of each ``GROUP`` neighbouring kept elements on their own."""
    return lambda rows: torch.cat([function(part) for part in rows.split(GROUP, -1)], -1)


# A sign and one of eight magnitudes


def _nearest(rows: Tensor, levels: list[Tensor]) -> Tensor:
    """The nearest of magnitudes [..., T, 1], with the sign of the element."""
    size = rows.abs()
    best = levels[0].expand_as(size)
    for level in levels[1:]:
        best = torch.where((level - size).abs() < (best - size).abs(), level, best)
    return best.copysign(rows)


def _bits(magnitude: Tensor) -> Tensor:
    """Bit patterns of bfloat16 magnitudes."""
    return magnitude.to(torch.bfloat16).view(torch.int16).int()


def _magnitude(bits: Tensor) -> Tensor:
    return bits.clamp(min=0).to(torch.int16).view(torch.bfloat16).float()


def _between(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest magnitude of each row."""
    return rows.abs().amin(-1, keepdim=True), rows.abs().amax(-1, keepdim=True)


def _uniform(rows: Tensor) -> Tensor:
    """Evenly spaced from the least magnitude to the largest."""
    low, high = _between(rows)
    return _nearest(rows, [low + (high - low) * code / 7 for code in range(8)])


def _odd(rows: Tensor) -> Tensor:
    """Odd multiples of the largest magnitude / 15: with their signs 16 evenly spaced levels, none of which is 0."""
    _, high = _between(rows)
    return _nearest(rows, [high * (2 * code + 1) / 15 for code in range(8)])


def _growing(rows: Tensor) -> Tensor:
    """Steps that grow from the least to the largest, in units of the largest / 127: between even and logarithmic.

    Level i is floor + (127 - floor) i (8 i + floor) / (7 (56 + floor)), rounded, where floor is the least magnitude.
    """
    low, high = _between(rows)
    unit = high / _INT8
    floor = (low / unit.clamp(min=torch.finfo(torch.float32).tiny)).round()
    exact = (floor + (_INT8 - floor) * code * (8 * code + floor) / (7 * (56 + floor)) for code in range(8))
    return _nearest(rows, [(level + 0.5).floor() * unit for level in exact])


def _log_levels(rows: Tensor, parts: int, from_top: bool, octaves: float | None = None) -> list[Tensor]:
    """Evenly spaced in the bit patterns of bfloat16 from the least magnitude to the largest.

    parts: the step between two is a multiple of 1 / parts, rounded up. from_top: whether they are counted from the
    largest, so that the least gets a little less; else the last one is cut off at the largest. octaves: no lower than
    so many below the largest.
    """
    low, high = map(_bits, _between(rows))
    if octaves is not None:
        low = low.maximum(high - round(octaves * _OCTAVE))
    step = ((high - low) * parts + 6) // 7
    if from_top:
        return [_magnitude(high - (step * code) // parts) for code in reversed(range(8))]
    return [_magnitude((low + (step * code) // parts).minimum(high)) for code in range(8)]


def _log(
    rows: Tensor, parts: int = 1, from_top: bool = True, by_bits: bool = False, octaves: float | None = None
) -> Tensor:
    """by_bits: the level is that with the nearest bit pattern, else that with the nearest value."""
    levels = _log_levels(rows, parts, from_top, octaves)
    if not by_bits:
        return _nearest(rows, levels)
    chosen = _nearest(_bits(rows.abs()).float(), [_bits(level).float() for level in levels])
    return _magnitude(chosen.int()).copysign(rows)


def _log_variant(**how: bool | int | float) -> Code:
    return Code(_of_rows(functools.partial(_log, **how)), 4, 4)  # type: ignore[arg-type]


# Along the tokens


def _per_channel(x: Tensor, keep: Tensor) -> Tensor:
    """16 levels from the least to the largest kept element of a channel in each ``GROUP`` tokens."""
    groups = F.pad(x, (0, 0, 0, -x.shape[-2] % GROUP)).unflatten(-2, (-1, GROUP)).float()
    kept = F.pad(keep, (0, 0, 0, -x.shape[-2] % GROUP)).unflatten(-2, (-1, GROUP))
    low = groups.masked_fill(~kept, float("inf")).amin(-2, keepdim=True)
    high = groups.masked_fill(~kept, float("-inf")).amax(-2, keepdim=True)
    scale = _stored((high - low).clamp(min=0) / 15, torch.bfloat16)
    decoded = ((groups - low) / scale).round().clamp(0, 15) * scale + low
    decoded = torch.where(kept, decoded, 0).flatten(-3, -2)[..., : x.shape[-2], :]
    return decoded.to(x.dtype)


def _scaled(largest: int, dtype: torch.dtype, up: bool = False) -> Decoded:
    return _of_rows(lambda rows: _symmetric(rows, largest, dtype, up))


CODES = {
    "none": Code(_of_rows(lambda rows: rows), 16),
    "fp8": Code(_of_rows(_fp8), 8),
    "fp8, row scale": Code(_of_rows(_fp8_scaled), 8, 2),
    "int8": Code(_scaled(_INT8, torch.bfloat16), 8, 2),
    "int8, scale up": Code(_scaled(_INT8, torch.bfloat16, up=True), 8, 2),
    "int8, fp16 scale": Code(_scaled(_INT8, torch.float16), 8, 2),
    "int8, fp16 scale up": Code(_scaled(_INT8, torch.float16, up=True), 8, 2),
    "int8, fp32 scale": Code(_scaled(_INT8, torch.float32), 8, 4),
    "int4 log": _log_variant(),
    "int4 log, 1/8 steps": _log_variant(parts=8),
    "int4 log, 1/16 steps": _log_variant(parts=16),
    "int4 log, exact steps": _log_variant(parts=7),
    "int4 log, from threshold": _log_variant(from_top=False),
    "int4 log, 1/8, from threshold": _log_variant(parts=8, from_top=False),
    "int4 log, by bits": _log_variant(by_bits=True),
    "int4 log, 3 octaves": _log_variant(octaves=3),
    "int4 log, 4 octaves": _log_variant(octaves=4),
    "int4 growing": Code(_of_rows(_growing), 4, 3),
    "int4 uniform": Code(_of_rows(_uniform), 4, 4),
    "int4 symmetric": Code(_scaled(_INT4, torch.bfloat16), 4, 2),
    "int4 symmetric, groups": Code(_of_rows(_grouped(lambda r: _symmetric(r, _INT4, torch.bfloat16))), 4, 2, "group"),
    "int4 odd": Code(_of_rows(_odd), 4, 2),
    "int4 odd, groups": Code(_of_rows(_grouped(_odd)), 4, 2, "group"),
    "int4 asymmetric": Code(_of_rows(_asymmetric), 4, 4),
    "int4 asymmetric, groups": Code(_of_rows(_grouped(_asymmetric)), 4, 4, "group"),
    "int3 asymmetric, groups": Code(_of_rows(_grouped(functools.partial(_asymmetric, bits=3))), 3, 4, "group"),
    "int2 asymmetric, groups": Code(_of_rows(_grouped(functools.partial(_asymmetric, bits=2))), 2, 4, "group"),
    "int4 per channel": Code(_per_channel, 4, 4, "channel"),
}
"""By name. Scales are bfloat16, and rounded to nearest, unless the name says otherwise."""
