"""The oracle of strategies: what each row is ranked by, from plain keys, values and queries. See ``reference``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from channels import TOKENS, Blocks, summed_over_heads
from reference import kept_count, prune, pruned_cache, quantized, reference_attention, reference_weights

LATEST = 32
"""Queries that count."""

SLOTS = 48
"""Queries that a cache remembers, each at its number modulo this."""


def over_heads(queries: Tensor, heads: int) -> Tensor:
    """|Q|, summed over the query heads of each KV head as a cache of this dtype holds it: [B, H, n, D]."""
    groups = queries.chunk(heads, dim=1)
    return torch.stack([group.abs().double().sum(1) for group in groups], dim=1).float().to(queries.dtype)


def output_aware(sums: Tensor) -> Tensor:
    """The weights [B, H, D] of rows that are ranked when [B, H, n, D] are the sums so far. Sums of 0 say nothing."""
    w = sums[:, :, -LATEST:].double().sum(2).float()
    mantissa, exponent = torch.frexp(w.amax(-1, keepdim=True))
    return torch.where(mantissa == 0, torch.ones_like(w), torch.ldexp(w, -exponent))


def think(x: Tensor, kept: int, queries: Tensor | None = None) -> Tensor:
    """1 for the ``kept`` channels with the largest means of squares in a prompt [B, H, n, D], else 0: [B, H, D]."""
    score = x.float().square().mean(2)
    if queries is not None:
        groups = queries[:, :, -LATEST:].float().chunk(x.shape[1], dim=1)
        score = score * torch.stack([group.square().mean((1, 2)) for group in groups], dim=1)
    return torch.zeros_like(score).scatter(-1, score.topk(kept).indices, 1.0)


def weights_of_rows(
    strategy: str, x: Tensor, kept: int, prompt: int, window: int, queries: Tensor | None
) -> Tensor | None:
    """By what each row of a cache [B, H, n, D] is ranked when it leaves the window: [B, H, n, D].

    prompt: tokens that came in first, at once. queries: of all tokens, [B, Hq, n, D].
    """
    if strategy == "magnitude":
        return None
    if strategy == "think":
        known = None if queries is None else queries[:, :, :prompt]
        return think(x[:, :, :prompt], kept, known).unsqueeze(2).expand_as(x)
    sums, count = over_heads(queries, x.shape[1]), x.shape[2]
    seen = [max(row + window, prompt - 1) for row in range(count)]
    return torch.stack([output_aware(sums[:, :, : min(last, count - 1) + 1]) for last in seen], dim=2)


@dataclass
class Packed:
    """What a cache tensor has of each row once it is pruned, followed step by step; a rewound one, too.

    rows: [B, H, n, D], as they were last packed. ring: of output-aware, the sums over heads [B, H, 48, D] by slot.
    channels: of think, the weights [B, H, D].
    """

    strategy: str
    kept: int
    code: str
    window: int
    rows: Tensor
    ring: Tensor | None = None
    channels: Tensor | None = None

    @classmethod
    def of_prompt(cls, strategy: str, kept: int, code: str, window: int, x: Tensor, queries: Tensor | None) -> Packed:
        """Of a prompt [B, H, n, D], whose last tokens have ``queries``."""
        batch, heads, count, dim = x.shape
        packed = cls(strategy, kept, code, window, x)
        if strategy == "output-aware":
            packed.ring = x.new_zeros(batch, heads, SLOTS, dim)
            known = 0 if queries is None else min(SLOTS, queries.shape[2])
            for token in range(count - known, count):
                packed.take(queries[:, :, token - count :][:, :, :1], token)
        if strategy == "think":
            packed.channels = think(x, kept, queries) if count else x.new_zeros(batch, heads, dim).float()
        packed.rows = packed.pruned(x, packed.weights(count - 1))
        return packed

    def take(self, query: Tensor, token: int) -> None:
        """The query [B, Hq, 1, D] of a token."""
        if self.ring is not None:
            self.ring = self.ring.clone()
            self.ring[:, :, token % SLOTS] = over_heads(query, self.ring.shape[1])[:, :, 0]

    def weights(self, last: int) -> Tensor | None:
        """By what rows rank that are pruned when ``last`` is the latest token: [B, H, 1, D]."""
        if self.ring is not None:
            slots = [token % SLOTS for token in range(max(last - LATEST + 1, 0), last + 1)]
            return output_aware(self.ring[:, :, slots]).unsqueeze(2)
        if self.channels is None:
            return None
        chosen = self.channels.any(-1, keepdim=True)
        return torch.where(chosen, self.channels, 1).unsqueeze(2)

    def pruned(self, x: Tensor, weights: Tensor | None) -> Tensor:
        if self.code == "none":
            return prune(x, self.kept, weights)
        return quantized(x, self.kept, self.code, weights).to(x.dtype)

    def append(self, rows: Tensor, query: Tensor, held: int) -> None:
        """The last of ``rows`` [B, H, n, D] came in; the one that leaves for it is packed, if it is exact till then."""
        token = rows.shape[2] - 1
        self.take(query, token)
        self.rows = torch.cat([self.rows[:, :, :token], rows[:, :, token:]], dim=2)
        leaving = token - self.window
        if leaving >= held:
            left = self.pruned(rows[:, :, leaving : leaving + 1], self.weights(token))
            self.rows = torch.cat([self.rows[:, :, :leaving], left, self.rows[:, :, leaving + 1 :]], dim=2)

    def dense(self, x: Tensor, held: int) -> Tensor:
        """The cache as the last of ``x`` [B, H, n, D] sees it, if ``held`` tokens are pruned for good."""
        pruned = min(max(held, x.shape[2] - self.window), x.shape[2])
        return torch.cat([self.rows[:, :, :pruned], x[:, :, pruned:]], dim=2)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """With ``change`` applied to each tensor, all of which have the batch first."""
        return replace(self, **{name: change(x) for name, x in self._tensors().items()})

    def joined(self, other: Packed, tokens: int) -> Packed:
        """Both batches, as far as the first ``tokens``."""
        parts = [replace(x, rows=x.rows[:, :, :tokens])._tensors() for x in (self, other)]
        return replace(self, **{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"rows": self.rows, "ring": self.ring, "channels": self.channels}
        return {name: x for name, x in tensors.items() if x is not None}


class Layer:
    """One layer that attends to a cache which is pruned by strategies. Its prompt comes in at once."""

    def __init__(self, strategies: tuple[str, str], sparsity: float, window: int, codes: tuple[str, str]) -> None:
        self.strategies, self.sparsity, self.window, self.codes = strategies, sparsity, window, codes
        self.queries: Tensor | None = None
        self.blocks: Blocks | None = None  # of values that are pruned by channel

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Of the latest queries over all exact K and V so far."""
        if self.queries is None:
            self.queries, self.prompt = q, q.shape[2]
            if self.strategies[1].startswith("channel"):
                attention = summed_over_heads(reference_weights(q, k, mask, scale), k.shape[1])
                kept = kept_count(TOKENS, self.sparsity)
                self.blocks = Blocks.of_prompt(self.strategies[1], kept, self.codes[1], self.window, v, attention)
            return reference_attention(q, k, v, 0, 0, 1, mask, scale)
        self.queries = torch.cat([self.queries, q], dim=2)
        if self.blocks is not None:
            weights = reference_weights(q, self.stored(k, v)[0], mask, scale)
            self.blocks.write(v[:, :, -1:], v.shape[2] - 1, summed_over_heads(weights, k.shape[1]).squeeze(2))
        keys, values = self.stored(k, v)
        return reference_attention(q, keys, values, 0, 0, 1, mask, scale)

    def stored(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """K and V as the latest token sees them, in their dtype."""
        caches = []
        for x, strategy, code, queries in zip((k, v), self.strategies, self.codes, (self.queries, None), strict=True):
            if strategy.startswith("channel"):
                caches.append(self.blocks.dense(x))
                continue
            kept = kept_count(x.shape[3], self.sparsity)
            weights = weights_of_rows(strategy, x, kept, self.prompt, self.window, queries)
            caches.append(pruned_cache(x, self.sparsity, self.window, code, weights).to(x.dtype))
        return caches


@dataclass
class Heads:
    """One layer whose KV heads are pruned in ways of their own. each: one head by itself."""

    each: list[Layer]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        heads = zip(self.each, q.chunk(len(self.each), 1), k.split(1, 1), v.split(1, 1), strict=True)
        return torch.cat([head.attend(*x, mask, scale) for head, *x in heads], dim=1)

    def stored(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """As that of a layer."""
        rows = [head.stored(*x) for head, *x in zip(self.each, k.split(1, 1), v.split(1, 1), strict=True)]
        return [torch.cat(x, 1) for x in zip(*rows, strict=True)]


@contextmanager
def ranked_generation(
    strategies: tuple[str, str], sparsity: float, window: int, codes: tuple[str, str] = ("none", "none")
) -> Iterator[list[Layer]]:
    """Within it, eager HF models with SDPA generate as the model with caches pruned by strategies should."""
    with generation_by(lambda: Layer(strategies, sparsity, window, codes)) as layers:
        yield layers


@contextmanager
def generation_by(make: Callable[[], Layer | Heads]) -> Iterator[list[Any]]:
    """Within it, eager HF models with SDPA attend by what ``make`` makes for each layer."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layers: list[Any] = []

    def attend(module, query, key, value, attention_mask, scaling, **how):
        if module.layer_idx == len(layers):
            layers.append(make())
        if attention_mask is None and query.shape[2] > 1:
            attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        layer = layers[module.layer_idx]
        layer.latest = key, value
        return layer.attend(query, key, value, attention_mask, scaling).transpose(1, 2), None

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield layers
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
