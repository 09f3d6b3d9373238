"""What it costs to store keys or values of one layer in some way, by what they do to the output of its attention.

To second order the divergence of what a model says from what it said, KL in nats, is half the mean of (g . e) ^ 2: e is
the error of an intermediate result, and g the gradient of log p(y) to that result, for y drawn from what the model says
(Fisher information; Theis et al. 2018, arXiv 1801.05787, prune weights by it). Errors of several query tokens and heads
are taken to be independent, so that their squares add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attending import Attention

_QUERIES = 256
"""Query tokens that stand for all of a text."""


class Reader:
    """The queries of one layer over a text, evenly apart, and what they read of it. In float32.

    attention: of one text. gradient: g, [1, Hq, T, D], for its result. window: tokens that are read exactly.
    """

    def __init__(self, attention: Attention, gradient: Tensor, window: int) -> None:
        self.key, self.value = attention.key.float(), attention.value.float()
        heads, tokens = self.key.shape[1], self.key.shape[2]
        position = torch.arange(tokens - 1, -1, -max(tokens // _QUERIES, 1), device=self.key.device)
        age = position.unsqueeze(-1) - torch.arange(tokens, device=self.key.device)
        self.is_old, self.is_later = age >= window, age < 0
        self.query = attention.query[:, :, position].float().unflatten(1, (heads, -1)) * attention.scale
        self.gradient = gradient[:, :, position].float().unflatten(1, (heads, -1))
        self.scores = self._scores(self.key).masked_fill(self.is_later, float("-inf"))
        self.weights = self.scores.softmax(-1)
        self.result = self._read(self.weights, self.value)

    def key_loss(self, stored: Tensor) -> Tensor:
        """Nats a token of each KV head, [H], where its old keys are read as ``stored``, [1, H, T, D]."""
        scores = torch.where(self.is_old, self._scores(stored), self.scores)
        return self._loss(self._read(scores.softmax(-1), self.value) - self.result)

    def value_loss(self, stored: Tensor) -> Tensor:
        """Nats a token of each KV head, [H], where its old values are read as ``stored``, [1, H, T, D]."""
        return self._loss(self._read(self.weights * self.is_old, stored - self.value))

    def _scores(self, key: Tensor) -> Tensor:
        """[1, H, G, n, T], of the G query heads of each KV head."""
        return self.query @ key.unsqueeze(2).mT

    @staticmethod
    def _read(weights: Tensor, value: Tensor) -> Tensor:
        return weights @ value.unsqueeze(2)

    def _loss(self, error: Tensor) -> Tensor:
        projected = (self.gradient * error).sum(-1)
        return 0.5 * projected.square().sum((0, 2)).mean(-1)
