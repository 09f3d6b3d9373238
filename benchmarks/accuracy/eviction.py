"""Heavy hitters: tokens that get little attention leave the cache, and what stays may be pruned; all in one forward.

H2O (arXiv 2306.14048): what stays are the latest tokens, and of the others those that got most attention, summed
over all queries so far. Each KV head has its own; the heads of a group are summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .teacher_forced import scores_of, weighted_sum
from .window import Window

_QUERIES = 128  # of a prompt at a time: all its weights at once would take gigabytes


@dataclass(frozen=True)
class HeavyHitters:
    """How many tokens stay.

    budget: so many of each KV head, ``recent`` of them the latest. every: tokens leave after each so many steps, so up
    to ``every - 1`` more are there in between; 1 is the method as published. prompt: tokens that come at once, attend
    to each other all, and leave first at the end of it. Raises ValueError where these contradict each other.
    """

    budget: int
    recent: int
    every: int = 1
    prompt: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.recent <= self.budget and self.every >= 1 and self.prompt >= 0):
            raise ValueError(f"{self} is not accepted; it must have 1 <= recent <= budget, every >= 1 and prompt >= 0")

    def parts(self, tokens: int) -> Iterator[tuple[int, int]]:
        """First and last (exclusive) of the queries that read the same tokens, but for their own."""
        start = 0
        while start < tokens:
            in_prompt = start < self.prompt
            end = min(start + _QUERIES, self.prompt) if in_prompt else start + self.every
            yield start, min(end, tokens)
            start = end

    def staying(self, sums: Tensor, held: Tensor) -> Tensor:
        """Which of the tokens that are ``held`` stay; sums: their attention weights so far; all [B, H, n]."""
        tokens = sums.shape[-1]
        sums = sums.masked_fill(~held, -1)
        sums[..., max(tokens - self.recent, 0) :] = float("inf")
        largest = sums.topk(min(self.budget, tokens)).indices
        return torch.zeros_like(held).scatter(-1, largest, True) & held


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stored_k: Tensor,
    stored_v: Tensor,
    window: int | Window,
    scale: float,
    eviction: HeavyHitters,
) -> Tensor:
    """``teacher_forced.attention`` in which a query reads only what has not left.

    q: [B, Hq, T, D], k, v and what is stored of them: [B, H, T, D], where H divides Hq. Returns [B, Hq, T, D].
    """
    parts = weights_of(q, k, stored_k, window, scale, eviction)
    results = [weighted_sum(weights, start, v, stored_v, Window.of(window)) for start, weights in parts]
    return torch.cat(results, dim=2)


def readable(
    q: Tensor, k: Tensor, stored_k: Tensor, window: int | Window, scale: float, eviction: HeavyHitters
) -> Tensor:
    """Which tokens each query may read, [B, H, T, T]; arguments as of ``attention``."""
    tokens = k.shape[2]
    mask = torch.zeros(*k.shape[:2], tokens, tokens, dtype=torch.bool, device=k.device)
    for start, weights in weights_of(q, k, stored_k, window, scale, eviction):
        mask[:, :, start : start + weights.shape[3], : weights.shape[4]] = (weights > 0).any(2)
    return mask


def weights_of(
    q: Tensor, k: Tensor, stored_k: Tensor, window: int | Window, scale: float, eviction: HeavyHitters
) -> Iterator[tuple[int, Tensor]]:
    """The attention weights of some queries after the others, each with the position of the first: [B, H, G, n, end].

    Those of tokens that left are 0. Who leaves is told by the very weights: no query knows of a later one.
    """
    sums = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    held = torch.ones_like(sums, dtype=torch.bool)
    for start, end in eviction.parts(k.shape[2]):
        scores = scores_of(q[:, :, start:end], start, k, stored_k, Window.of(window), scale)
        weights = scores.masked_fill_(~held[:, :, None, None, :end], float("-inf")).softmax(-1)
        sums[:, :, :end] += weights.float().sum((2, 3))
        yield start, weights
        if end >= eviction.prompt:
            held[:, :, :end] = eviction.staying(sums[:, :, :end], held[:, :, :end])
