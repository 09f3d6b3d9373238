"""Saved caches are untrusted input: kernels go by what the buffers say, so all of it is checked when one is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SavedCacheError
from ..lowering.buffers import blocks_for
from ..lowering.codes import TOP
from ..lowering.format import BLOCK_TOKENS, Format
from ..lowering.head_groups import decode
from ..lowering.layout import FormatError
from ..lowering.rows import channel_bits


def check_saved(format: Any, buffers: Any, tokens: Any, grows: Any, tokens_dim: Any) -> None:
    """Raise SavedCacheError unless a cache can be made of these, and be read and continued within its buffers."""
    try:
        known = decode(format)
        known.check(buffers)
    except (FormatError, TypeError, AttributeError) as error:
        raise SavedCacheError(f"this is no saved KV cache: {error}") from error
    _require(type(tokens) is int and tokens >= 0, f"it has {tokens!r} tokens; accepted is an integer from 0 on")
    _require(type(grows) is bool, f"whether it grows is {grows!r}; accepted are True and False")
    _require(type(tokens_dim) is int and tokens_dim in (1, 2), f"its tokens are dimension {tokens_dim!r}, not 1 or 2")
    if known.window_of(buffers).device.type == "meta":  # where there is nothing to look at
        return
    own = known.split(buffers)
    for part, given in zip(known.parts, own, strict=True):
        _check_part(part, given, tokens, grows)
    alike = all(torch.equal(given[-1][:, 0], own[0][-1][:, 0]) for given in own)
    _require(alike, "its groups of KV heads have different numbers of tokens")


def _check_part(format: Format, buffers: Sequence[Tensor], tokens: int, grows: bool) -> None:
    """What the KV heads of one format hold."""
    _check_counts(format, buffers, tokens, grows)
    if format.has_bitmap:
        _check_bitmap(format, buffers)
    if format.code == "int4":
        floors = buffers[format.place("floors")]
        _require(bool((floors <= TOP).all()), f"a floor of some row is above {TOP}")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise SavedCacheError(f"a saved KV cache cannot be used: {problem}")


def _check_counts(format: Format, buffers: Sequence[Tensor], tokens: int, grows: bool) -> None:
    capacity = format.capacity_of(buffers)
    room = capacity + format.window if grows else tokens
    fits = tokens <= room if grows else capacity == BLOCK_TOKENS * blocks_for(tokens)
    _require(fits, f"its buffers have room for {capacity} packed tokens, which does not fit its {tokens} tokens")
    for written, held, extreme in buffers[format.place("counts")].tolist():
        counts = f"counts of {written} tokens written, the first of them in the window {held}, and a mark of {extreme}"
        whole = written == tokens if grows else written <= tokens
        in_order = 0 <= held <= written <= held + format.ring and extreme in (0, 1)
        _require(whole and in_order and max(held, format.left(written)) <= capacity, f"it has {counts}")


def _check_bitmap(format: Format, buffers: Sequence[Tensor]) -> None:
    """Each pruned row keeps as many elements as its format says, or none where it was zeroed, and no others."""
    bitmap, counts = (buffers[format.place(name)] for name in ("bitmap", "counts"))
    if bitmap.numel() == 0:
        return
    bits = (bitmap.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=bitmap.device)) & 1
    pruned = torch.maximum(counts[:, 1], format.left(counts[:, 0]))
    token = torch.arange(format.capacity_of(buffers), device=bitmap.device).view(-1, BLOCK_TOKENS)
    first = token[:, :1] if format.by_channel else token  # of each row
    kept = bits.sum((-2, -1))
    right = ((kept == format.kept) | (kept == 0)) & ~_past_the_end(format, bits)
    unread = first >= pruned.view(-1, 1, 1, 1)
    _require(bool((right | unread).all()), f"the bitmap of some row does not keep {format.kept} of {format.row_size}")


def _past_the_end(format: Format, bits: Tensor) -> Tensor:
    """Whether a row [..., w, 32] has a bit of an element that there is not."""
    in_order = bits[..., channel_bits(format.order, bits.device)].flatten(-2)
    return in_order[..., format.row_size :].any(-1)
