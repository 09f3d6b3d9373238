"""Rows in plain PyTorch: pruning, packing, expanding. They know nothing of blocks.

A row is one token of one KV head. Packed, it is one tensor for each buffer of its format that grows, in their order:
values [..., K] and bitmap words [..., w], int32; with a code, fewer or narrower values, and what ``codes`` adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import codes
from .format import EXTREME, WORD_CHANNELS, Format

_EACH_BYTE = 0x01010101  # a group of four channels, all kept
_SPREAD = 0x00204081  # times four bits: each of them at the start of a byte


def computed_once(x: Tensor) -> Tensor:
    """``x``. Inductor stores it and does not repeat its computation for each element that depends on it.

    as_strided is about memory, so Inductor has to have its argument in memory, with the strides that eager gives it.
    """
    return x.as_strided(x.shape, x.stride())


def _groups(words: Tensor, order: str) -> Tensor:
    """Groups of four channels, one channel in each byte, 1 where kept: int32 [..., w] -> int64 [..., w, 8]."""
    words, group = words.to(torch.int64).unsqueeze(-1), torch.arange(8, device=words.device)
    if order == "rows":
        return ((words >> 4 * group & 15) * _SPREAD) & _EACH_BYTE
    return (words >> group) & _EACH_BYTE


def _kept_below(group: Tensor, bit: Tensor | int) -> Tensor:
    """Kept channels of a group in the bytes below ``bit``, a multiple of 8: those of the product hold the sums."""
    return ((group * (_EACH_BYTE << 8)) >> bit) & 7


def _kept_before(words: Tensor, order: str) -> Tensor:
    """Kept channels before each group of four, in a narrow type: [..., w] -> [..., w, 8].

    A buffer of its own: expanding a row then takes three loads and under 50 operations an element (under 30 in the
    order of a GPU), few enough for Inductor to do it inside the loop of each query head instead of storing dense rows
    (``should_realize_on_reuse`` and ``has_large_inner_fn`` in torch/_inductor/ir.py).
    """
    dtype = torch.uint8 if words.shape[-1] <= 8 else torch.int16
    earlier = _kept_below(_groups(words, order), 32).flatten(-2)[..., :-1].to(dtype)
    return torch.nn.functional.pad(earlier, (1, 0)).cumsum(-1, dtype=dtype).unflatten(-1, (-1, 8))


def channel_ranks(words: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """For every channel, whether it was kept and its place among the kept: [..., w] -> bool and int64 [..., D]."""
    group, bit = _groups(words, format.order).unsqueeze(-1), torch.arange(0, 32, 8, device=words.device)
    rank = _kept_below(group, bit) + _kept_before(words, format.order).unsqueeze(-1)
    kept, channels = (group & (1 << bit)).to(torch.bool), slice(format.head_dim)
    return kept.flatten(-3)[..., channels], rank.flatten(-3)[..., channels]


def expand(packed: Sequence[Tensor], format: Format) -> Tensor:
    """Dense rows [..., D] of packed ones, zero where pruned. Of a code they are float32, else of the cache's dtype."""
    row = _named(packed, format)
    if not format.has_bitmap:
        return codes.decoded(row, torch.arange(format.head_dim, device=packed[0].device), format.code)
    kept, rank = channel_ranks(row["bitmap"], format)
    rank = rank.clamp(max=format.kept - 1)
    elements = row["values"].gather(-1, rank) if format.code == "none" else codes.decoded(row, rank, format.code)
    return torch.where(kept, elements, 0)


def cleared(packed: Sequence[Tensor], stays: Tensor, format: Format) -> list[Tensor]:
    """Packed rows that are all zero but where ``stays`` [...]: cheaper than to clear what they are expanded to."""
    row = _named(packed, format)
    decides = "bitmap" if format.code == "none" else "peaks"
    row[decides] = computed_once(torch.where(stays.unsqueeze(-1), row[decides], 0))
    return list(row.values())


def _named(packed: Sequence[Tensor], format: Format) -> dict[str, Tensor]:
    return {buffer.name: x for buffer, x in zip(format.packed, packed, strict=True)}


def _ranking_keys(x: Tensor) -> Tensor:
    """An int64 for each element that orders a row without ties: by magnitude (NaN on top), then the lower channel."""
    narrow = torch.int32 if x.dtype == torch.float32 else torch.int16
    largest = torch.iinfo(narrow).max
    magnitude = torch.where(x.isnan(), largest, x.view(narrow) & largest).to(torch.int64)
    head_dim = x.shape[-1]
    return magnitude * head_dim + (head_dim - 1 - torch.arange(head_dim, device=x.device))


def keep_mask(x: Tensor, kept: int, weights: Tensor | None = None) -> Tensor:
    """True for the ``kept`` elements of largest magnitude of each row; ties go to the lower channel.

    weights: float32, what magnitudes count times in the ranking, see ``strategies.strategy``.
    """
    if kept == x.shape[-1]:
        return torch.ones_like(x, dtype=torch.bool)
    keys = _ranking_keys(x if weights is None else (x.float() * weights).to(x.dtype))
    return keys >= keys.topk(kept, dim=-1).values[..., -1:]


def channel_bits(order: str, device: torch.device) -> Tensor:
    """The bit of a word that stands for each of its channels, int32 [32]."""
    channel = torch.arange(WORD_CHANNELS, dtype=torch.int32, device=device)
    return channel if order == "rows" else channel % 4 * 8 + channel // 4


def words_of(mask: Tensor, order: str) -> Tensor:
    """The bitmap of rows: bool [..., D] -> int32 [..., w]."""
    whole = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % WORD_CHANNELS)).unflatten(-1, (-1, WORD_CHANNELS))
    return (whole.to(torch.int32) << channel_bits(order, mask.device)).sum(-1, dtype=torch.int32)


def reordered_words(words: Tensor, order: str, wanted: str) -> Tensor:
    """Words of one order as those of another."""
    kept = (words.unsqueeze(-1) >> channel_bits(order, words.device)) & 1
    return (kept << channel_bits(wanted, words.device)).sum(-1, dtype=torch.int32)


def pack(x: Tensor, format: Format, weights: Tensor | None = None) -> list[Tensor]:
    """Prune and pack rows [..., D]: values, words of the bitmap and what a code adds, where the format has them.

    weights: as of ``keep_mask``.
    """
    if not format.has_bitmap:
        return codes.encoded(x, format.code)
    mask = keep_mask(x, format.kept, weights)
    bitmap = words_of(mask, format.order)
    _, rank = channel_ranks(bitmap, format)
    slot = torch.where(mask, rank, format.kept)  # pruned elements all go to one slot that is cut off
    kept = x.new_zeros(*x.shape[:-1], format.kept + 1).scatter(-1, slot, x)
    values, *others = codes.encoded(kept[..., : format.kept].contiguous(), format.code)
    return [values, bitmap, *others]


def extreme(x: Tensor) -> Tensor:
    """True where NaN, infinite or at least ``EXTREME`` in magnitude."""
    return ~(x.float().abs() < EXTREME)
