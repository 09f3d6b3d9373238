"""The contract in plain PyTorch: pruning, packing, expanding, and attention over the compressed form.

These functions trace into ATen, so Inductor compiles them for any device. They are written to fuse: expanding a row
is pointwise (some bit operations and one gather an element), so a score is one reduction over the packed row and no
dense copy of the cache is ever made. Nothing here reads a device value on the host.

Functions of rows know nothing of blocks, and those that move rows into and out of blocks nothing of what is in them.

Glossary: B batch, H KV heads, G query heads per KV head, L query tokens, N blocks of 32 tokens, R slots of the ring, D
channels of a row, K kept elements of a row, w words of the bitmap of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .format import BLOCK_TOKENS, CHUNK, EXTREME, MAX_QUERY_TOKENS, WORD_CHANNELS, blocks_for, window_of
from .masks import decides_later, with_four_dims

aten = torch.ops.aten

_EACH_BYTE = 0x01010101  # a group of four channels, all kept


def _computed_once(x: Tensor) -> Tensor:
    """``x``. Inductor stores it and does not repeat its computation for each element that depends on it.

    as_strided is about memory, so Inductor has to have its argument in memory, with the strides that eager gives it.
    """
    return x.as_strided(x.shape, x.stride())


def _groups(words: Tensor) -> Tensor:
    """Groups of four channels, one channel in each byte, 1 where kept: int32 [..., w] -> int64 [..., w, 8]."""
    return (words.to(torch.int64).unsqueeze(-1) >> torch.arange(8, device=words.device)) & _EACH_BYTE


def _kept_below(group: Tensor, bit: Tensor | int) -> Tensor:
    """Kept channels of a group in the bytes below ``bit``, a multiple of 8: those of the product hold the sums."""
    return ((group * (_EACH_BYTE << 8)) >> bit) & 7


def _kept_before(words: Tensor) -> Tensor:
    """Kept channels before each group of four, in a narrow type: [..., w] -> [..., w, 8].

    A buffer of its own: expanding a row then takes three loads and under 30 operations an element, few enough for
    Inductor to do it inside the loop of each query head instead of storing dense rows (``should_realize_on_reuse`` and
    ``has_large_inner_fn`` in torch/_inductor/ir.py).
    """
    dtype = torch.uint8 if words.shape[-1] <= 8 else torch.int16
    earlier = _kept_below(_groups(words), 32).flatten(-2)[..., :-1].to(dtype)
    return torch.nn.functional.pad(earlier, (1, 0)).cumsum(-1, dtype=dtype).unflatten(-1, (-1, 8))


def channel_ranks(words: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """For every channel, whether it was kept and its place among the kept: [..., w] -> bool and int64 [..., D]."""
    group, bit = _groups(words).unsqueeze(-1), torch.arange(0, 32, 8, device=words.device)
    rank = _kept_below(group, bit) + _kept_before(words).unsqueeze(-1)
    return (group & (1 << bit)).to(torch.bool).flatten(-3)[..., :head_dim], rank.flatten(-3)[..., :head_dim]


def expand(values: Tensor, words: Tensor, head_dim: int) -> Tensor:
    """Dense rows, zero where pruned: values [..., K] and words [..., w] -> [..., D]."""
    kept, rank = channel_ranks(words, head_dim)
    gathered = values.gather(-1, rank.clamp(max=values.shape[-1] - 1))
    return torch.where(kept, gathered, 0)


def _ranking_keys(x: Tensor) -> Tensor:
    """An int64 for each element that orders a row without ties: by magnitude (NaN on top), then the lower channel."""
    narrow = torch.int32 if x.dtype == torch.float32 else torch.int16
    largest = torch.iinfo(narrow).max
    magnitude = torch.where(x.isnan(), largest, x.view(narrow) & largest).to(torch.int64)
    head_dim = x.shape[-1]
    return magnitude * head_dim + (head_dim - 1 - torch.arange(head_dim, device=x.device))


def keep_mask(x: Tensor, kept: int) -> Tensor:
    """True for the ``kept`` elements of largest magnitude of each row; ties go to the lower channel."""
    if kept == x.shape[-1]:
        return torch.ones_like(x, dtype=torch.bool)
    keys = _ranking_keys(x)
    return keys >= keys.topk(kept, dim=-1).values[..., -1:]


def _words(mask: Tensor) -> Tensor:
    """The bitmap of rows: bool [..., D] -> int32 [..., w]."""
    bit = torch.arange(8, dtype=torch.int32, device=mask.device).unsqueeze(-1)
    bit = bit + 8 * torch.arange(4, dtype=torch.int32, device=mask.device)
    whole = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % WORD_CHANNELS))
    return (whole.unflatten(-1, (-1, 8, 4)).to(torch.int32) << bit).sum((-2, -1), dtype=torch.int32)


def pack(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Prune and pack rows: [..., D] -> values [..., K] and words [..., w] int32."""
    mask = keep_mask(x, kept)
    words = _words(mask)
    _, rank = channel_ranks(words, x.shape[-1])
    slot = torch.where(mask, rank, kept)  # pruned elements all go to one slot that is cut off
    values = x.new_zeros(*x.shape[:-1], kept + 1).scatter(-1, slot, x)
    return values[..., :kept].contiguous(), words


def extreme(x: Tensor) -> Tensor:
    """True where NaN, infinite or at least ``EXTREME`` in magnitude."""
    return ~(x.float().abs() < EXTREME)


def _blocked(rows: Tensor) -> Tensor:
    """Packed rows in blocks: [..., N, 32, K] -> [..., N, K / 8, 32, 8]."""
    return rows.unflatten(-1, (-1, CHUNK)).transpose(-3, -2)


def _unblocked(values: Tensor) -> Tensor:
    """The inverse of ``_blocked``. Inductor does not store the result."""
    return values.transpose(-3, -2).flatten(-2)


def _place(token: Tensor) -> tuple[Tensor, Tensor]:
    """The block and the row in it of each token (int64, not negative)."""
    return token // BLOCK_TOKENS, token % BLOCK_TOKENS


def _read_rows(values: Tensor, bitmap: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Packed rows of ``token`` (int64 [n]): values [B, H, n, K] and words [B, H, n, w]."""
    block, row = _place(token)
    rows = aten.index(values, [None, None, block, None, row])  # [n, B, H, K / 8, 8], as indices stand apart
    return rows.permute(1, 2, 0, 3, 4).flatten(-2), aten.index(bitmap, [None, None, block, row])


def _write_rows(values: Tensor, bitmap: Tensor, token: Tensor, rows: Tensor, words: Tensor) -> None:
    """Put packed rows [B, H, n, K] and words [B, H, n, w] where ``token`` (int64 [n]) stands.

    One write each, to the buffer itself: Inductor then writes in place. Through a view it would copy the cache.
    """
    block, row = _place(token)
    chunks = rows.unflatten(-1, (-1, CHUNK)).permute(2, 0, 1, 3, 4)
    aten.index_put_(values, [None, None, block, None, row], chunks)
    aten.index_put_(bitmap, [None, None, block, row], words)


def _ring_tokens(tokens: Tensor, slots: int) -> Tensor:
    """The token that each ring slot holds when ``tokens`` (int64, one element) are written; negative: none."""
    slot = torch.arange(slots, device=tokens.device)
    last = tokens - 1
    return last - torch.remainder(last - slot, slots)


def compress(
    dense: Tensor, tokens: Tensor, kept: int, window: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Buffers of a cache tensor [B, H, S, D] whose first ``tokens`` (int64, one element) rows are written."""
    tokens = tokens.reshape(1)
    slots = blocks_for(capacity) * BLOCK_TOKENS
    rows = dense[:, :, :slots]
    packed = [torch.nn.functional.pad(x, (0, 0, 0, slots - rows.shape[2])) for x in pack(rows, kept)]
    values, bitmap = (x.unflatten(2, (-1, BLOCK_TOKENS)) for x in packed)
    slots = window + MAX_QUERY_TOKENS
    counts = torch.cat([tokens, (tokens - slots).clamp(min=0), _has_extreme(dense, tokens)])
    return _blocked(values).contiguous(), bitmap, _ring(dense, tokens, slots), counts


def _ring(dense: Tensor, tokens: Tensor, slots: int) -> Tensor:
    """The latest ``slots`` of the first ``tokens`` rows of [B, H, S, D] in their slots; zeros where there is none."""
    in_ring = _ring_tokens(tokens, slots)
    if dense.shape[2] == 0:  # a row to select where there is none
        dense = torch.nn.functional.pad(dense, (0, 0, 0, 1))
    ring = dense.index_select(2, in_ring.clamp(min=0, max=dense.shape[2] - 1))
    return torch.where((in_ring >= 0).unsqueeze(-1), ring, torch.zeros_like(ring))


def _has_extreme(dense: Tensor, tokens: Tensor) -> Tensor:
    """Whether the first ``tokens`` rows of [B, H, S, D] have an extreme value: int64 [1], 1 or 0."""
    written = torch.arange(dense.shape[2], device=dense.device) < tokens
    return (extreme(dense) & written.unsqueeze(-1)).any().reshape(1).to(torch.int64)


def decompress(values: Tensor, bitmap: Tensor, window: Tensor, counts: Tensor, length: int) -> Tensor:
    """Dense [B, H, length, D]: pruned tokens with zeros, window tokens exact, zero past the tokens written."""
    token = torch.arange(length, device=values.device)
    in_ring = window.index_select(2, torch.remainder(token, window.shape[2]))
    slot = token.clamp(max=values.shape[2] * BLOCK_TOKENS - 1)
    pruned = expand(*_read_rows(values, bitmap, slot), window.shape[3])
    written = torch.where((token < counts[0]).view(1, 1, -1, 1), in_ring, torch.zeros_like(in_ring))
    first_exact = torch.maximum(counts[1], counts[0] - window_of(window))
    return torch.where((token < first_exact).view(1, 1, -1, 1), pruned, written)


def append(
    rows: Tensor, values: Tensor, bitmap: Tensor, window: Tensor, counts: Tensor, position: Tensor | None
) -> None:
    """Write tokens [B, H, L, D] from ``position`` on (default: behind the last); prune those that leave the window.

    A position before the last token rewinds the cache to it. What the ring no longer holds stays pruned then, so the
    window refills from the tokens written after.
    """
    count, ring_slots, slots = rows.shape[2], window.shape[2], values.shape[2] * BLOCK_TOKENS
    position = counts[0:1] if position is None else position.reshape(1).to(torch.int64)
    held, end, leaving = torch.minimum(counts[1:2], position), position + count, position - window_of(window)
    offset = torch.arange(count, device=rows.device)
    window.index_copy_(2, torch.remainder(position + offset, ring_slots), rows)
    # As many slots as tokens come in, each once; those that none leaves for keep what they hold.
    slot = leaving.clamp(min=0, max=slots - count) + offset
    leaves = (slot >= torch.maximum(held, leaving)) & (slot < leaving + count)
    packed = pack(window.index_select(2, torch.remainder(slot, ring_slots)), values.shape[3] * CHUNK)
    stays = _read_rows(values, bitmap, slot)
    leaves = leaves.unsqueeze(-1)
    _write_rows(values, bitmap, slot, *(torch.where(leaves, new, old) for new, old in zip(packed, stays, strict=True)))
    flag = torch.maximum(counts[2:3], extreme(rows).any().reshape(1).to(torch.int64))
    counts.copy_(torch.cat([end, torch.maximum(held, end - ring_slots), flag]))


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """[B, H, G, L, D] and blocks of n rows [B, H, N, n, D] -> [B, H, G, L, N * n], in float32.

    One reduction for each query head of the group: they fuse into one loop that expands each key once.
    """
    keys, query = keys.float().unsqueeze(2), query.float()
    heads = [(query[:, :, g, :, None, None] * keys).sum(-1).flatten(3) for g in range(query.shape[2])]
    return torch.stack(heads, dim=2)


def _weighted_sum(weights: Tensor, values: Tensor, attended: Tensor | None) -> Tensor:
    """[B, H, G, L, N * n] and blocks of n rows [B, H, N, n, D] -> [B, H, G, L, D], in float32.

    attended: [L, N * n], where it differs from token to token: of other rows even NaN has no part then.
    """
    blocks = values.shape[2:4]
    weights, values = weights.unflatten(-1, blocks).unsqueeze(-1), values.float().unsqueeze(2)
    products = [weights[:, :, g] * values for g in range(weights.shape[2])]
    if attended is not None:
        attended = attended.unflatten(-1, blocks).unsqueeze(-1)
        products = [torch.where(attended, product, 0) for product in products]
    return torch.stack([product.sum((-3, -2)) for product in products], dim=2)


def _masked(scores: Tensor, mask: Tensor | None, token: Tensor, attended: Tensor) -> Tensor:
    """Apply a mask [B or 1, Hq or 1, L or 1, S] at the tokens [n] that the scores [B, H, G, L, n] belong to."""
    nothing = float("-inf")
    if mask is not None:
        mask = with_four_dims(mask)
        at_token = mask.index_select(-1, token.clamp(min=0, max=mask.shape[-1] - 1))
        grouped = at_token.unflatten(1, (1, 1) if at_token.shape[1] == 1 else scores.shape[1:3])
        scores = torch.where(grouped, scores, nothing) if mask.dtype == torch.bool else scores + grouped.float()
    return torch.where(attended, scores, nothing)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; a row in which nothing is allowed gives zeros, as SDPA does."""
    weights = torch.softmax(scores, dim=-1)
    return torch.where((scores == float("-inf")).all(-1, keepdim=True), 0.0, weights)


def _bounded(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def attend(
    query: Tensor,
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of the latest L tokens [B, Hq, L, D] over the compressed tokens and the ring, with one softmax each.

    Each token sees the cache as it was when that token was the latest; of later ones what the mask allows.
    """
    batch, query_heads, count, head_dim = query.shape
    key_values, key_bitmap, key_window, counts = key
    value_values, value_bitmap, value_window, _ = value
    heads = key_values.shape[1]
    grouped = query.reshape(batch, heads, query_heads // heads, count, head_dim)
    tokens = counts[0:1]
    latest = (tokens - count + torch.arange(count, device=query.device)).unsqueeze(-1)
    first_exact = torch.maximum(counts[1:2], latest + 1 - window_of(key_window))

    slot = torch.arange(key_values.shape[2] * BLOCK_TOKENS, device=query.device)
    in_ring = _ring_tokens(tokens, key_window.shape[2])
    pruned, exact = slot < first_exact, in_ring >= first_exact
    if not decides_later(mask):
        exact = exact & (in_ring <= latest)
    past = expand(_unblocked(key_values), key_bitmap, head_dim)
    scores = [
        _masked(_bounded(_scores(grouped, past) * scale, softcap), mask, slot, pruned),
        _masked(_bounded(_scores(grouped, key_window.unsqueeze(2)) * scale, softcap), mask, in_ring, exact),
    ]
    if sinks is not None:
        scores.append(sinks.float().view(1, heads, -1, 1, 1).expand(batch, -1, -1, count, -1))
    weights = _computed_once(_softmax(torch.cat(scores, dim=-1)))
    split, end = slot.shape[0], slot.shape[0] + in_ring.shape[0]
    # What no token attends to may hold anything, and 0 * NaN is NaN. Clearing bitmaps is cheaper than clearing rows.
    words = _computed_once(torch.where(pruned[-1].view(-1, BLOCK_TOKENS, 1), value_bitmap, 0))
    past = expand(_unblocked(value_values), words, value_window.shape[3])
    recent = torch.where(exact.any(0).unsqueeze(-1), value_window, 0).unsqueeze(2)
    differ = not (isinstance(count, int) and count == 1)
    out = _weighted_sum(weights[..., :split], past, pruned if differ else None)
    out = out + _weighted_sum(weights[..., split:end], recent, exact if differ else None)
    return out.reshape(batch, query_heads, count, value_window.shape[-1]).to(query.dtype)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_values: Tensor,
    key_bitmap: Tensor,
    key_window: Tensor,
    key_counts: Tensor,
    value_values: Tensor,
    value_bitmap: Tensor,
    value_window: Tensor,
    value_counts: Tensor,
    position: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """One decode step of one layer: append the new tokens' keys and values, then attend. See ``ops.py``."""
    key_buffers = (key_values, key_bitmap, key_window, key_counts)
    value_buffers = (value_values, value_bitmap, value_window, value_counts)
    append(key, *key_buffers, position)
    append(value, *value_buffers, position)
    return attend(query, key_buffers, value_buffers, mask, sinks, scale, softcap)
