"""The contract in plain PyTorch: pruning, packing, expanding, and attention over the compressed form.

These functions trace into ATen, so Inductor compiles them for any device. They are written to fuse: expanding a row
is pointwise (some bit operations and one gather an element), so a score is one reduction over the packed row and no
dense copy of the cache is ever made. Nothing here reads a device value on the host.

Glossary: B batch, H KV heads, G query heads per KV head, C compressed slots, W window slots, D channels of a row,
K kept elements of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _computed_once(x: Tensor) -> Tensor:
    """``x``. Inductor stores it and does not repeat its computation for each element that depends on it.

    as_strided is about memory, so Inductor has to have its argument in memory, with the strides that eager gives it.
    """
    return x.as_strided(x.shape, x.stride())


def _set_bits(bits: Tensor) -> Tensor:
    """The number of set bits of integers below 128."""
    apart = (bits * 0x204081) & 0x1111111  # one bit in every four
    return ((apart * 0x1111111) >> 24) & 15


def _kept_before(bitmap: Tensor) -> Tensor:
    """Kept channels in the bytes before each byte, in a narrow type: [..., D / 8] uint8 -> [..., D / 8].

    A buffer of its own: expanding a row then takes three loads and under 30 operations an element, few enough for
    Inductor to do it inside the loop of each query head instead of storing dense rows (``should_realize_on_reuse`` and
    ``has_large_inner_fn`` in torch/_inductor/ir.py).
    """
    dtype = torch.uint8 if bitmap.shape[-1] <= 32 else torch.int16
    earlier = bitmap[..., :-1].to(torch.int64)
    set_bits = (_set_bits(earlier & 127) + (earlier >> 7)).to(dtype)
    return torch.nn.functional.pad(set_bits, (1, 0)).cumsum(-1, dtype=dtype)


def channel_ranks(bitmap: Tensor) -> tuple[Tensor, Tensor]:
    """For every channel, whether it was kept and its place among the kept: [..., D / 8] -> bool and int64 [..., D]."""
    byte = bitmap.to(torch.int64).unsqueeze(-1)
    bit = 1 << torch.arange(8, device=bitmap.device)
    rank = _set_bits(byte & (bit - 1)) + _kept_before(bitmap).unsqueeze(-1)
    return (byte & bit).to(torch.bool).flatten(-2), rank.flatten(-2)


def expand(values: Tensor, bitmap: Tensor) -> Tensor:
    """Dense rows, zero where pruned: values [..., K] and bitmap [..., D / 8] -> [..., D]."""
    kept, rank = channel_ranks(bitmap)
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


def pack(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Prune and pack rows: [..., D] -> values [..., K] and bitmap [..., D / 8] uint8."""
    mask = keep_mask(x, kept)
    bit = torch.arange(8, dtype=torch.int32, device=x.device)
    bitmap = (mask.unflatten(-1, (-1, 8)).to(torch.int32) << bit).sum(-1, dtype=torch.int32).to(torch.uint8)
    _, rank = channel_ranks(bitmap)
    slot = torch.where(mask, rank, kept).long()  # pruned elements all go to one slot that is cut off
    values = x.new_zeros(*x.shape[:-1], kept + 1).scatter(-1, slot, x)
    return values[..., :kept].contiguous(), bitmap


def _ring_tokens(tokens: Tensor, window: int) -> Tensor:
    """The token that each ring slot holds when ``tokens`` (int64, one element) are written; negative: none."""
    slot = torch.arange(window, device=tokens.device)
    last = tokens - 1
    return last - torch.remainder(last - slot, window)


def compress(
    dense: Tensor, tokens: Tensor, kept: int, window: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Buffers of a cache tensor [B, H, S, D] whose first ``tokens`` (int64, one element) rows are written."""
    rows = dense[:, :, :capacity]
    values, bitmap = pack(rows, kept)
    spare = (0, 0, 0, capacity - rows.shape[2])
    values = torch.nn.functional.pad(values, spare)
    bitmap = torch.nn.functional.pad(bitmap, spare)
    tokens = tokens.reshape(1)
    in_ring = _ring_tokens(tokens, window)
    if dense.shape[2] == 0:  # a row to select where there is none
        dense = torch.nn.functional.pad(dense, (0, 0, 0, 1))
    ring = dense.index_select(2, in_ring.clamp(min=0, max=dense.shape[2] - 1))
    ring = torch.where((in_ring >= 0).view(1, 1, -1, 1), ring, torch.zeros((), dtype=dense.dtype, device=dense.device))
    counts = torch.cat([tokens, (tokens - window).clamp(min=0)])
    return values, bitmap, ring, counts


def decompress(values: Tensor, bitmap: Tensor, window: Tensor, counts: Tensor, length: int) -> Tensor:
    """Dense [B, H, length, D]: pruned tokens with zeros, window tokens exact, zero past the tokens written."""
    token = torch.arange(length, device=values.device)
    in_ring = window.index_select(2, torch.remainder(token, window.shape[2]))
    slot = token.clamp(max=values.shape[2] - 1)
    pruned = expand(values.index_select(2, slot), bitmap.index_select(2, slot))
    written = torch.where((token < counts[0]).view(1, 1, -1, 1), in_ring, torch.zeros_like(in_ring))
    return torch.where((token < counts[1]).view(1, 1, -1, 1), pruned, written)


def append(
    row: Tensor, values: Tensor, bitmap: Tensor, window: Tensor, counts: Tensor, position: Tensor | None
) -> None:
    """Write one token [B, H, 1, D] at ``position`` (default: behind the last) and prune the one that leaves the window.

    A position before the last token rewinds the cache to it. What was pruned stays pruned then: the exact rows are
    gone, so the window refills from the tokens written after.
    """
    ring_slots = window.shape[2]
    position = counts[0:1].clone() if position is None else position.reshape(1).to(torch.int64)
    pruned = torch.minimum(counts[1:2], position)
    leaving = position + 1 - ring_slots > pruned
    ring_slot = torch.remainder(position, ring_slots)
    new_values, new_bitmap = pack(window.index_select(2, ring_slot), values.shape[-1])
    slot = (position - ring_slots).clamp(min=0, max=values.shape[2] - 1)
    values.index_copy_(2, slot, torch.where(leaving, new_values, values.index_select(2, slot)))
    bitmap.index_copy_(2, slot, torch.where(leaving, new_bitmap, bitmap.index_select(2, slot)))
    window.index_copy_(2, ring_slot, row)
    counts.copy_(torch.cat([position + 1, torch.maximum(pruned, position + 1 - ring_slots)]))


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """[B, H, G, D] and [B, H, C, D] -> [B, H, G, C], in float32.

    One reduction for each query head of the group: they fuse into one loop that expands each key once.
    """
    keys = keys.float()
    return torch.stack([(query[:, :, g, None].float() * keys).sum(-1) for g in range(query.shape[2])], dim=2)


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """[B, H, G, C] and [B, H, C, D] -> [B, H, G, D], in float32."""
    values = values.float()
    return torch.stack([(weights[:, :, g, :, None] * values).sum(-2) for g in range(weights.shape[2])], dim=2)


def _masked(scores: Tensor, mask: Tensor | None, token: Tensor, valid: Tensor) -> Tensor:
    """Apply an attention mask [B or 1, Hq or 1, 1, S] at the tokens that the scores [B, H, G, n] belong to."""
    nothing = float("-inf")
    if mask is not None:
        while mask.dim() < 4:
            mask = mask.unsqueeze(0)
        at_token = mask.index_select(-1, token.clamp(min=0, max=mask.shape[-1] - 1))
        heads = at_token.shape[1]
        grouped = at_token.reshape(at_token.shape[0], *((1, 1) if heads == 1 else scores.shape[1:3]), token.shape[0])
        scores = torch.where(grouped, scores, nothing) if mask.dtype == torch.bool else scores + grouped.float()
    return torch.where(valid, scores, nothing)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; a row in which nothing is allowed gives zeros, as SDPA does."""
    weights = torch.softmax(scores, dim=-1)
    return torch.where((scores == float("-inf")).all(-1, keepdim=True), 0.0, weights)


def attend(query: Tensor, key: Sequence[Tensor], value: Sequence[Tensor], mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query token [B, Hq, 1, D] over the compressed tokens and the window, with one softmax."""
    batch, query_heads, _, head_dim = query.shape
    key_values, key_bitmap, key_window, counts = key
    value_values, value_bitmap, value_window, _ = value
    heads = key_values.shape[1]
    grouped = query.reshape(batch, heads, query_heads // heads, head_dim)
    tokens, pruned = counts[0:1], counts[1:2]

    slot = torch.arange(key_values.shape[2], device=query.device)
    in_ring = _ring_tokens(tokens, key_window.shape[2])
    stored, exact = slot < pruned, in_ring >= pruned
    scores = torch.cat(
        [
            _masked(_scores(grouped, expand(key_values, key_bitmap)) * scale, mask, slot, stored),
            _masked(_scores(grouped, key_window) * scale, mask, in_ring, exact),
        ],
        dim=-1,
    )
    weights = _computed_once(_softmax(scores))
    split = key_values.shape[2]
    # Slots that hold nothing may hold anything, and 0 * NaN is NaN. Clearing their bitmap is cheaper than their rows.
    past = expand(value_values, _computed_once(torch.where(stored.unsqueeze(-1), value_bitmap, 0)))
    recent = torch.where(exact.unsqueeze(-1), value_window, 0)
    out = _weighted_sum(weights[..., :split], past) + _weighted_sum(weights[..., split:], recent)
    return out.reshape(batch, query_heads, 1, value_window.shape[-1]).to(query.dtype)


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
    scale: float,
) -> Tensor:
    """One decode step of one layer: append the new token's key and value, then attend. See ``ops.py``."""
    key_buffers = (key_values, key_bitmap, key_window, key_counts)
    value_buffers = (value_values, value_bitmap, value_window, value_counts)
    append(key, *key_buffers, position)
    append(value, *value_buffers, position)
    return attend(query, key_buffers, value_buffers, mask, scale)
