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
from .checks import OUT_OF_PLACE, UNWRITTEN
from .format import BLOCK_TOKENS, Buffer, Format, blocks_for
from .masks import admitted, decides_later, with_four_dims
from .strategies.rings import ring_tokens

aten = torch.ops.aten


class _Cache:
    """A cache tensor, its buffers by their names."""

    def __init__(self, buffers: Sequence[Tensor], format: Format) -> None:
        *packed, self.window, self.counts = format.plain_of(buffers)
        self.format = format
        self.packed = dict(zip(format.packed, packed, strict=True))

    @property
    def tokens(self) -> Tensor:
        """Tokens written, [B]."""
        return self.counts[:, 0]

    @property
    def slots(self) -> int:
        """Tokens that the packed part has room for."""
        return next(iter(self.packed.values())).shape[2] * BLOCK_TOKENS

    @property
    def batch(self) -> Tensor:
        """[B, 1]: the rows of the batch, as an index beside those of tokens [B, n]."""
        return torch.arange(self.window.shape[0], device=self.window.device).unsqueeze(-1)

    def read_rows(self, token: Tensor) -> list[Tensor]:
        """The packed rows [B, H, n, ...] of ``token`` ([B, n] or [1, n])."""
        return [aten.index(x, self._at(buffer, token)).transpose(1, 2).flatten(3) for buffer, x in self.packed.items()]

    def write_rows(self, token: Tensor, rows: Sequence[Tensor]) -> None:
        """Put packed rows [B, H, n, ...] where ``token`` [B, n] stands.

        One write for each buffer, to the buffer itself: Inductor then writes in place. Through a view it would copy
        the cache.
        """
        for (buffer, x), new in zip(self.packed.items(), rows, strict=True):
            aten.index_put_(x, self._at(buffer, token), new.unflatten(-1, buffer.row_shape).transpose(1, 2))

    def _at(self, buffer: Buffer, token: Tensor) -> list[Tensor | None]:
        """The index of ``token`` (not negative) in a buffer: [B, n, H] and what a row has."""
        between = [None] * (buffer.token_dim - 3)
        return [self.batch, None, token // BLOCK_TOKENS, *between, token % BLOCK_TOKENS]

    def all_rows(self) -> list[Tensor]:
        """All packed rows, [B, H, N, 32, ...]. Inductor does not store the result."""
        return [x.movedim(buffer.token_dim, 3).flatten(4) for buffer, x in self.packed.items()]

    def read_ring(self, token: Tensor) -> Tensor:
        """What stands in the ring for ``token`` [B, n]: [B, H, n, D]."""
        return aten.index(self.window, [self.batch, None, self._in_ring(token)]).transpose(1, 2)

    def write_ring(self, token: Tensor, rows: Tensor) -> None:
        """Put rows [B, H, n, D] in the slots of ``token`` [B, n]."""
        aten.index_put_(self.window, [self.batch, None, self._in_ring(token)], rows.transpose(1, 2))

    def _in_ring(self, token: Tensor) -> Tensor:
        return torch.remainder(token, self.format.ring)

    def ring_tokens(self) -> Tensor:
        """The token that each slot of the ring holds, [B, R]; negative: none."""
        return ring_tokens(self.tokens, self.format.ring)


def _of_each_row(tokens: Tensor, like: Tensor) -> Tensor:
    """One number, or one for each row of the batch of ``like``: int64 [B]."""
    return tokens.reshape(-1).to(torch.int64).expand(like.shape[0])


def compress(
    dense: Tensor, tokens: Tensor, format: Format, capacity: int, weights: Tensor | None = None
) -> list[Tensor]:
    """Buffers of a cache tensor [B, H, S, D] whose first ``tokens`` (int64, [1] or [B]) rows are written.

    weights: [B, H, 1, D], see ``strategies.strategy``; the buffers are without those of the strategy.
    """
    tokens = _of_each_row(tokens, dense)
    slots = blocks_for(capacity) * BLOCK_TOKENS
    rows = dense[:, :, :slots]
    packed = [torch.nn.functional.pad(x, (0, 0, 0, slots - rows.shape[2])) for x in packing.pack(rows, format, weights)]
    packed = [_blocked(x, buffer) for x, buffer in zip(packed, format.packed, strict=True)]
    counts = torch.stack([tokens, (tokens - format.ring).clamp(min=0), _has_extreme(dense, tokens)], dim=-1)
    return [*packed, _ring(dense, tokens, format.ring), counts]


def _blocked(rows: Tensor, buffer: Buffer) -> Tensor:
    """Packed rows [B, H, S, ...] as the buffer has them."""
    blocks = rows.unflatten(2, (-1, BLOCK_TOKENS)).unflatten(-1, buffer.row_shape)
    return blocks.movedim(3, buffer.token_dim).contiguous()


def reordered(buffers: Sequence[Tensor], format: Format, order: str) -> list[Tensor]:
    """The buffers of the same cache with its elements in another order."""
    cache, wanted = _Cache(buffers, format), format.ordered(order)
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
    batch = torch.arange(dense.shape[0], device=dense.device).unsqueeze(-1)
    ring = aten.index(dense, [batch, None, in_ring.clamp(min=0, max=dense.shape[2] - 1)]).transpose(1, 2)
    return torch.where((in_ring >= 0)[:, None, :, None], ring, 0).contiguous()


def _has_extreme(dense: Tensor, tokens: Tensor) -> Tensor:
    """Whether the first ``tokens`` rows of [B, H, S, D] have an extreme value: int64 [B], 1 or 0."""
    written = torch.arange(dense.shape[2], device=dense.device) < tokens.unsqueeze(-1)
    return (packing.extreme(dense) & written[:, None, :, None]).any(3).any(2).any(1).to(torch.int64)


def decompress(buffers: Sequence[Tensor], format: Format, length: int) -> Tensor:
    """Dense [B, H, length, D]: pruned tokens with zeros, window tokens exact, zero past the tokens written."""
    cache = _Cache(buffers, format)
    token = torch.arange(length, device=cache.window.device).unsqueeze(0)
    in_ring = cache.read_ring(token)
    pruned = packing.expand(cache.read_rows(token.clamp(max=cache.slots - 1)), format)
    tokens, held = cache.counts[:, 0:1], cache.counts[:, 1:2]
    written = torch.where((token < tokens)[:, None, :, None], in_ring, 0)
    first_exact = torch.maximum(held, tokens - format.window)
    return torch.where((token < first_exact)[:, None, :, None], pruned.to(written.dtype), written).contiguous()


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
    cache, count = _Cache(buffers, format), rows.shape[2]
    position = (cache.tokens if position is None else _of_each_row(position, rows)).unsqueeze(-1)
    held, end, leaving = torch.minimum(cache.counts[:, 1:2], position), position + count, position - format.window
    offset = torch.arange(count, device=rows.device)
    cache.write_ring(position + offset, rows)
    # As many slots as tokens come in, each once; those that none leaves for keep what they hold.
    slot = leaving.clamp(min=0, max=cache.slots - count) + offset
    leaves = (slot >= torch.maximum(held, leaving)) & (slot < leaving + count)
    if weights is not None and count != 1 and weights.shape[2] != 1:
        token = (slot - leaving).clamp(min=0, max=count - 1)  # for which it leaves
        weights = aten.index(weights, [cache.batch, None, token]).transpose(1, 2)
    packed, stays = packing.pack(cache.read_ring(slot), format, weights), cache.read_rows(slot)
    leaves = leaves[:, None, :, None]
    cache.write_rows(slot, [torch.where(leaves, new, old) for new, old in zip(packed, stays, strict=True)])
    extreme = packing.extreme(rows).any(3).any(2).any(1, keepdim=True).to(torch.int64)
    flag = torch.maximum(cache.counts[:, 2:3], extreme)
    cache.counts.copy_(torch.cat([end, torch.maximum(held, end - format.ring), flag], dim=-1))


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """[B, H, G, L, D] and blocks of n rows [B, H, N, n, D] -> [B, H, G, L, N * n], in float32.

    One reduction for each query head of the group: they fuse into one loop that expands each key once.
    """
    keys, query = keys.float().unsqueeze(2), query.float()
    heads = [(query[:, :, g, :, None, None] * keys).sum(-1).flatten(3) for g in range(query.shape[2])]
    return torch.stack(heads, dim=2)


def _weighted_sum(weights: Tensor, values: Tensor, attended: Tensor | None) -> Tensor:
    """[B, H, G, L, N * n] and blocks of n rows [B, H, N, n, D] -> [B, H, G, L, D], in float32.

    attended: [B, L, N * n], where it differs from query to query: of other rows even NaN has no part then.
    """
    blocks = values.shape[2:4]
    weights, values = weights.unflatten(-1, blocks).unsqueeze(-1), values.float().unsqueeze(2)
    products = [weights[:, :, g] * values for g in range(weights.shape[2])]
    if attended is not None:
        attended = attended.unflatten(-1, blocks)[:, None, ..., None]
        products = [torch.where(attended, product, 0) for product in products]
    return torch.stack([product.sum((-3, -2)) for product in products], dim=2)


def _masked(scores: Tensor, mask: Tensor | None, token: Tensor, attended: Tensor) -> Tensor:
    """Apply a mask [B or 1, Hq or 1, L or 1, S] at the tokens [B or 1, n] of the scores [B, H, G, L, n].

    attended: [B, L, n], where there is anything to attend to.
    """
    nothing = float("-inf")
    if mask is not None:
        mask = with_four_dims(mask)
        token = token.clamp(min=0, max=mask.shape[-1] - 1)
        if token.shape[0] == 1:
            at_token = mask.index_select(-1, token[0])
        else:
            mask = mask.expand(token.shape[0], -1, -1, -1)
            at_token = mask.gather(-1, token[:, None, None].expand(-1, *mask.shape[1:3], -1))
        grouped = at_token.unflatten(1, (1, 1) if at_token.shape[1] == 1 else scores.shape[1:3])
        scores = torch.where(grouped, scores, nothing) if mask.dtype == torch.bool else scores + grouped.float()
    return torch.where(attended[:, None, None], scores, nothing)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; a row in which nothing is allowed gives zeros, as SDPA does."""
    weights = torch.softmax(scores, dim=-1)
    return torch.where((scores == float("-inf")).all(-1, keepdim=True), 0.0, weights)


def _bounded(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def attend(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_format: Format,
    value_format: Format,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of the latest L tokens [B, Hq, L, D] over the compressed tokens and the ring, with one softmax each.

    Each token sees the cache as it was when that token was the latest; of later ones what the mask allows.
    """
    key, value = _Cache(keys, key_format), _Cache(values, value_format)
    batch, query_heads, count, head_dim = query.shape
    heads = key.window.shape[1]
    grouped = query.reshape(batch, heads, query_heads // heads, count, head_dim)
    latest = (key.tokens.unsqueeze(-1) - count + torch.arange(count, device=query.device)).unsqueeze(-1)
    first_exact = torch.maximum(key.counts[:, 1:2, None], latest + 1 - key_format.window)

    slot, in_ring = torch.arange(key.slots, device=query.device), key.ring_tokens()
    pruned, exact = slot < first_exact, in_ring.unsqueeze(1) >= first_exact
    if not decides_later(mask):
        exact = exact & (in_ring.unsqueeze(1) <= latest)
    past = packing.expand(key.all_rows(), key_format)
    scores = [
        _masked(_bounded(_scores(grouped, past) * scale, softcap), mask, slot.unsqueeze(0), pruned),
        _masked(_bounded(_scores(grouped, key.window.unsqueeze(2)) * scale, softcap), mask, in_ring, exact),
    ]
    if sinks is not None:
        scores.append(sinks.float().view(1, heads, -1, 1, 1).expand(batch, -1, -1, count, -1))
    weights = packing.computed_once(_softmax(torch.cat(scores, dim=-1)))
    split, end = key.slots, key.slots + key_format.ring
    # What no token attends to may hold anything, and 0 * NaN is NaN.
    rows = packing.cleared(value.all_rows(), pruned[:, -1].view(batch, 1, -1, BLOCK_TOKENS), value_format)
    past = packing.expand(rows, value_format)
    recent = torch.where(exact.any(1)[:, None, :, None], value.window, 0).unsqueeze(2)
    differ = not (isinstance(count, int) and count == 1)
    out = _weighted_sum(weights[..., :split], past, pruned if differ else None)
    out = out + _weighted_sum(weights[..., split:end], recent, exact if differ else None)
    return out.reshape(batch, query_heads, count, value_format.head_dim).to(query.dtype)


def _check_place(cache: _Cache, position: Tensor | None, count: int, length: int | None) -> None:
    """See ``checks``. Stops before anything is written."""
    start = cache.tokens if position is None else _of_each_row(position, cache.window)
    room = cache.slots + cache.format.window if length is None else length
    fits = (start >= 0) & (start <= cache.tokens) & (start + count <= room)
    aten._assert_async.msg(fits.all(), OUT_OF_PLACE)


def _check_mask(mask: Tensor, cache: _Cache, position: Tensor | None, count: int) -> None:
    start = cache.tokens if position is None else _of_each_row(position, cache.window)
    mask = with_four_dims(mask)
    token = torch.arange(mask.shape[-1], device=mask.device)
    unwritten = token >= (start + count)[:, None, None, None]
    aten._assert_async.msg(~(admitted(mask) & unwritten).any(), UNWRITTEN)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_format: Format,
    value_format: Format,
    position: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    length: int | None = None,
    key_weights: Tensor | None = None,
    value_weights: Tensor | None = None,
) -> Tensor:
    """One decode step of one layer: append the new tokens' keys and values, then attend. See ``ops.py``."""
    cache, count = _Cache(keys, key_format), query.shape[2]
    _check_place(cache, position, count, length)
    if mask is not None and length is not None:
        _check_mask(mask, cache, position, count)
    append(key, keys, key_format, position, key_weights)
    append(value, values, value_format, position, value_weights)
    return attend(query, keys, values, key_format, value_format, mask, sinks, scale, softcap)
