"""Strategies such as users register: one that ranks each row by itself, and one that remembers."""

from __future__ import annotations

import torch
from torch import Tensor

from mustafar_compile.strategies import Buffer, Strategy


class Ramp(Strategy):
    """Later channels count for more, on a wild scale; one of them for less than nothing."""

    def __init__(self, scale: float = 2.0**66) -> None:
        self.scale = scale

    def weights(self, like: Tensor) -> Tensor:
        channel = torch.arange(like.shape[-1], device=like.device, dtype=torch.float64).view(1, 1, 1, -1)
        return (self.scale * torch.where(channel == 3, -channel, channel)).float()

    def of_prompt(self, dense, tokens, format, queries, past):
        return self.weights(dense), []

    def of_step(self, query, position, format, state):
        # A query has the head dim of keys. Values may have another one.
        return self.weights(query.new_empty(format.head_dim))


class First(Strategy):
    """Channels count for as much as the first token of the first prompt has in them."""

    def buffers(self, format):
        return (Buffer("first", ("batch", "heads", 1, format.head_dim), torch.float32),)

    def of_prompt(self, dense, tokens, format, queries, past):
        first = dense[:, :, :1].abs().float()
        return (first, [first]) if past is None else (past[0], list(past))

    def of_step(self, query, position, format, state):
        return state[0]


RAMP, FIRST = Ramp(), First()


def ramp_weights(x: Tensor) -> Tensor:
    """The oracle's weights of rows like x [.., D]: the same on a scale of its own."""
    weights = torch.arange(x.shape[-1]).float() / 64
    weights[3] = 0
    return weights.expand_as(x)


def first_weights(first: Tensor) -> Tensor:
    """The oracle's weights [B, H, 1, D] of caches whose first token was [B, H, 1, D]: its largest is from 0.5 to 1."""
    size = first.abs().float()
    return torch.ldexp(size, -torch.frexp(size.amax(-1, keepdim=True)).exponent)
