"""Caches that are pruned in each channel over the tokens of a block, in plain PyTorch: the ops over them.

A packed row is one channel of a block of 32 tokens, so that ``rows`` packs, codes and expands it as it does a token.
Blocks leave the window as a whole: those are pruned of which no token is in it any more. All else is as in
``portable``, whose glossary holds here, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import portable
from . import rows as packing
from .attention import attended, sum_of_values, weights_of
from .buffers import BLOCK_TOKENS, blocks_for
from .cache import Cache, of_each_row
from .decode_step import DecodeStep
from .format import Format
from .strategies.answers import scaled
from .strategies.by_channel import ByChannel

aten = torch.ops.aten


class ChannelCache(Cache):
    """A cache tensor each of whose packed rows is a channel of a block."""

    def __init__(self, buffers: Sequence[Tensor], format: Format) -> None:
        super().__init__(buffers, format)
        self.strategy, self.state = _strategy(format), format.state_of(buffers)

    def expanded(self, stays: Tensor | None = None) -> Tensor:
        """All packed tokens [B, H, N, 32, D], zero where pruned. Inductor does not store the result.

        stays: boolean [B, N, 32]; all other tokens are zero, too. They may hold anything.
        """
        rows = {buffer.name: x for buffer, x in self.packed.items()}
        if stays is not None:
            bits = packing.words_of(stays, self.format.order)[:, None, :, None]
            rows["bitmap"] = packing.computed_once(rows["bitmap"] & bits)
        return packing.expand(list(rows.values()), self.format.channel).transpose(-1, -2)

    def read_block(self, block: Tensor) -> Tensor:
        """The packed tokens of ``block`` [B, 1], zero where pruned: [B, H, 32, D]."""
        packed = [aten.index(x, self._place(block)).squeeze(1) for x in self.packed.values()]
        return packing.expand(packed, self.format.channel).transpose(-1, -2).to(self.window.dtype)

    def write_block(self, block: Tensor, packed: Sequence[Tensor], where: Tensor) -> None:
        """Put packed rows in the place of ``block`` [B, 1], in those rows of the batch where so (boolean [B, 1])."""
        place = self._place(block)
        for x, new in zip(self.packed.values(), packed, strict=True):
            aten.index_put_(x, place, torch.where(where[..., None, None, None], new.unsqueeze(1), aten.index(x, place)))

    def _place(self, block: Tensor) -> list[Tensor | None]:
        return [self.batch, None, block.clamp(min=0, max=self.slots // BLOCK_TOKENS - 1)]


def _strategy(format: Format) -> ByChannel:
    assert isinstance(format.ranking, ByChannel)
    return format.ranking


def _pack(tokens: Tensor, format: Format, weights: Tensor | None) -> list[Tensor]:
    """Blocks [..., 32, D] pruned and packed, each channel a row. weights: [..., 32], by which tokens rank."""
    weights = None if weights is None else scaled(weights).unsqueeze(-2)
    return packing.pack(tokens.transpose(-1, -2).contiguous(), format.channel, weights)


def _in_blocks(x: Tensor, slots: int) -> Tensor:
    """The first ``slots`` tokens of [B, H, S, ...], zeros where there are fewer: [B, H, N, 32, ...]."""
    x = x[:, :, :slots]
    padding = (0, 0) * (x.dim() - 3) + (0, slots - x.shape[2])
    return torch.nn.functional.pad(x, padding).unflatten(2, (-1, BLOCK_TOKENS))


def compress(
    dense: Tensor, tokens: Tensor, format: Format, capacity: int, attention: Tensor | None = None
) -> list[Tensor]:
    """Buffers of a cache tensor [B, H, S, D] whose first ``tokens`` (int64, [1] or [B]) rows are written.

    attention: [B, H, n, S], weights of the last n tokens, see ``strategies.by_channel``.
    """
    tokens, slots = of_each_row(tokens, dense), blocks_for(capacity) * BLOCK_TOKENS
    weights, state = _strategy(format).of_prompt(dense, tokens, format, attention)
    weights = None if weights is None else _in_blocks(weights, slots)
    packed = [x.contiguous() for x in _pack(_in_blocks(dense, slots), format, weights)]
    return format.joined([*packed, *portable.window_and_counts(dense, tokens, format)], state)


def decompress(buffers: Sequence[Tensor], format: Format, length: int) -> Tensor:
    """Dense [B, H, length, D]: pruned tokens with zeros, window tokens exact, zero past the tokens written."""
    cache = ChannelCache(buffers, format)
    token = torch.arange(length, device=cache.window.device)
    rows = cache.expanded().flatten(2, 3)
    return cache.whole(token.unsqueeze(0), aten.index(rows, [None, None, token.clamp(max=cache.slots - 1)]))


def decode_attention(step: DecodeStep) -> Tensor:
    """One decode step of one layer whose values are pruned by channel and its keys by token. See ``ops``."""
    k, v, count = Cache(step.keys, step.key_format), ChannelCache(step.values, step.value_format), step.query_tokens
    portable.check_step(k, step)
    portable.append(step.key, step.keys, step.key_format, step.position, step.key_weights)
    start = v.start(step.position)
    _take_back(v, start)
    held = v.take(step.value, start)
    weights = weights_of(step, k)
    v.strategy.observe(v.latest(count), lambda token: _at(token, weights, k).sum(2), v.format, v.state)
    _prune_leaving(v, start, count, held)
    return _attend(weights, k, v, count, step.mask).to(step.query.dtype)


def _take_back(cache: ChannelCache, start: Tensor) -> None:
    """Where a block has pruned tokens before ``start`` [B, 1] and will have exact ones, put the former in the ring.

    That is so after a rewind beyond what the ring holds. They stay as they were pruned until the block leaves again.
    """
    held = torch.minimum(cache.counts[:, 1:2], start)
    block, cut = held // BLOCK_TOKENS, cache.format.left(start) < held
    token = block * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=start.device)
    back = cut & (token < held)
    rows = torch.where(back[:, None, :, None], cache.read_block(block), cache.read_ring(token))
    cache.write_ring(token, rows)
    cache.strategy.forget(token, back, cache.state)
    cache.counts[:, 1:2].copy_(torch.where(cut, block * BLOCK_TOKENS, held))


def _prune_leaving(cache: ChannelCache, start: Tensor, count: int, held: Tensor) -> None:
    """Pack the block that left the window with the tokens from ``start`` [B, 1] on: of so few there is one at most.

    held: the first token that the ring held before, [B, 1].
    """
    format = cache.format
    first = format.left(start + count) - BLOCK_TOKENS
    weights = cache.strategy.of_block(first, format, cache.state)
    tokens = cache.read_ring(first + torch.arange(BLOCK_TOKENS, device=start.device))
    leaves = first >= torch.maximum(format.left(start), held)
    cache.write_block(first // BLOCK_TOKENS, _pack(tokens, format, weights), leaves)


def _attend(weights: Tensor, key: Cache, value: ChannelCache, count: int, mask: Tensor | None) -> Tensor:
    """Sums of values [B, Hq, L, D], in float32. weights: as keys are kept, which are pruned before values are."""
    pruned, exact = attended(value, count, mask)
    past = value.expanded(pruned[:, -1].unflatten(-1, (-1, BLOCK_TOKENS)))
    of_recent = _at(value.ring_tokens().unsqueeze(1).expand(-1, count, -1), weights, key)
    return sum_of_values(weights[..., : value.slots], of_recent, past, value, pruned, exact)


def _at(token: Tensor, weights: Tensor, key: Cache) -> Tensor:
    """The weights [B, H, G, L, n] of tokens [B, L, n], from where their keys are: [B, H, G, L, N * 32 + R]."""
    packed = token < key.first_exact(token.shape[1]).unsqueeze(-1)
    in_ring = key.slots + torch.remainder(token, key.format.ring)
    place = torch.where(packed, token.clamp(min=0, max=key.slots - 1), in_ring)
    return weights.gather(-1, place[:, None, None].expand(*weights.shape[:3], -1, -1))
