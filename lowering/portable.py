"""The contract in plain PyTorch: the ops over a compressed cache.

These functions trace into ATen, so Inductor compiles them for any device. They are written to fuse: expanding a row
is pointwise (some bit operations and one gather an element), so a score is one reduction over the packed row and no
dense copy of the cache is ever made. Nothing here reads a device value on the host.

Glossary: B batch, H KV heads, G query heads per KV head, L query tokens, N blocks of 32 tokens, R slots of the ring, D
channels of a row. Tokens and positions are given for each row of the batch, int64 [B].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import rows as packing
from .attention import attend
from .buffers import BLOCK_TOKENS, Buffer, blocks_for
from .cache import Cache, of_each_row
from .checks import OUT_OF_PLACE, UNWRITTEN
from .decode_step import DecodeStep
from .format import Format
from .masks import admitted, with_four_dims
from .strategies.rings import ring_tokens, rows_at

aten = torch.ops.aten


def compress(
    dense: Tensor, tokens: Tensor, format: Format, capacity: int, weights: Tensor | None = None
) -> list[Tensor]:
    """Buffers of a cache tensor [B, H, S, D] whose first ``tokens`` (int64, [1] or [B]) rows are written.

    weights: [B, H, 1, D], see ``strategies.strategy``; the buffers are without those of the strategy.
    """
    tokens = of_each_row(tokens, dense)
    slots = blocks_for(capacity) * BLOCK_TOKENS
    rows = dense[:, :, :slots]
    packed = [torch.nn.functional.pad(x, (0, 0, 0, slots - rows.shape[2])) for x in packing.pack(rows, format, weights)]
    packed = [_blocked(x, buffer) for x, buffer in zip(packed, format.packed, strict=True)]
    return [*packed, *window_and_counts(dense, tokens, format)]


def window_and_counts(dense: Tensor, tokens: Tensor, format: Format) -> list[Tensor]:
    """These buffers of a cache tensor [B, H, S, D] whose first ``tokens`` [B] rows are written."""
    counts = torch.stack([tokens, (tokens - format.ring).clamp(min=0), _has_extreme(dense, tokens)], dim=-1)
    return [_ring(dense, tokens, format.ring), counts]


def _blocked(rows: Tensor, buffer: Buffer) -> Tensor:
    """Packed rows [B, H, S, ...] as the buffer has them."""
    blocks = rows.unflatten(2, (-1, BLOCK_TOKENS)).unflatten(-1, buffer.row_shape)
    return blocks.movedim(3, buffer.token_dim).contiguous()


def reordered(buffers: Sequence[Tensor], format: Format, order: str) -> list[Tensor]:
    """The buffers of the same cache with its elements in another order."""
    cache, wanted = Cache(buffers, format), format.ordered(order)
    rows = dict(zip(cache.packed, (rows.flatten(2, 3) for rows in cache.all_rows()), strict=True))
    packed = (
        _blocked(packing.reordered_words(x, format.order, order) if buffer.name == "bitmap" else x, into)
        for (buffer, x), into in zip(rows.items(), wanted.packed, strict=True)
    )
    return [*packed, *buffers[len(format.packed) :]]


def _ring(dense: Tensor, tokens: Tensor, slots: int) -> Tensor:
    """The latest ``slots`` of the first ``tokens`` rows of [B, H, S, D] in their slots; zeros where there is none."""
    in_ring = ring_tokens(tokens, slots)
    if dense.shape[2] == 0:  # a row to select where there is none
        dense = torch.nn.functional.pad(dense, (0, 0, 0, 1))
    ring = rows_at(dense, in_ring.clamp(min=0, max=dense.shape[2] - 1))
    return torch.where((in_ring >= 0)[:, None, :, None], ring, 0).contiguous()


def _has_extreme(dense: Tensor, tokens: Tensor) -> Tensor:
    """Whether the first ``tokens`` rows of [B, H, S, D] have an extreme value: int64 [B], 1 or 0."""
    written = torch.arange(dense.shape[2], device=dense.device) < tokens.unsqueeze(-1)
    return (packing.extreme(dense) & written[:, None, :, None]).any(3).any(2).any(1).to(torch.int64)


def decompress(buffers: Sequence[Tensor], format: Format, length: int) -> Tensor:
    """Dense [B, H, length, D]: pruned tokens with zeros, window tokens exact, zero past the tokens written."""
    cache = Cache(buffers, format)
    token = torch.arange(length, device=cache.window.device).unsqueeze(0)
    return cache.whole(token, packing.expand(cache.read_rows(token.clamp(max=cache.slots - 1)), format))


def append(
    rows: Tensor,
    buffers: Sequence[Tensor],
    format: Format,
    position: Tensor | None,
    weights: Tensor | None = None,
) -> None:
    """Write tokens [B, H, L, D] from ``position`` on (default: behind the last); prune those that leave the window.

    weights: [B, H, L or 1, D], by which the one ranks that leaves for each of them, see ``strategies.strategy``.
    A position before the last token rewinds the cache to it. What the ring no longer holds stays pruned then, so the
    window refills from the tokens written after.
    """
    cache, count = Cache(buffers, format), rows.shape[2]
    start, offset = cache.start(position), torch.arange(count, device=rows.device)
    held, leaving = cache.take(rows, start), start - format.window
    # As many slots as tokens come in, each once; those that none leaves for keep what they hold.
    slot = leaving.clamp(min=0, max=cache.slots - count) + offset
    leaves = (slot >= torch.maximum(held, leaving)) & (slot < leaving + count)
    if weights is not None and count != 1 and weights.shape[2] != 1:
        token = (slot - leaving).clamp(min=0, max=count - 1)  # for which it leaves
        weights = rows_at(weights, token)
    packed, stays = packing.pack(cache.read_ring(slot), format, weights), cache.read_rows(slot)
    leaves = leaves[:, None, :, None]
    cache.write_rows(slot, [torch.where(leaves, new, old) for new, old in zip(packed, stays, strict=True)])


def check_step(cache: Cache, step: DecodeStep) -> None:
    """See ``checks``. Stops before anything is written. cache: K of the step."""
    start, end = cache.start(step.position), cache.start(step.position) + step.query_tokens
    room = cache.slots + cache.format.window if step.length is None else step.length
    fits = (start >= 0) & (start <= cache.tokens.unsqueeze(-1)) & (end <= room)
    aten._assert_async.msg(fits.all(), OUT_OF_PLACE)
    if step.mask is not None and step.length is not None:
        mask = with_four_dims(step.mask)
        unwritten = torch.arange(mask.shape[-1], device=mask.device) >= end[:, :, None, None]
        aten._assert_async.msg(~(admitted(mask) & unwritten).any(), UNWRITTEN)


def decode_attention(step: DecodeStep) -> Tensor:
    """One decode step of one layer: append the new tokens' keys and values, then attend. See ``ops``."""
    cache = Cache(step.keys, step.key_format)
    check_step(cache, step)
    append(step.key, step.keys, step.key_format, step.position, step.key_weights)
    append(step.value, step.values, step.value_format, step.position, step.value_weights)
    return attend(step, cache, Cache(step.values, step.value_format))
