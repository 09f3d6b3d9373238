"""Which elements of keys and values are kept: the strategies of the paper, over a whole text at once.

A strategy is a pure function ``(x, seen, choice) -> keep``. x: rows [B, H, T, D] of one layer in the cache's dtype,
keys after rotary. keep: a boolean tensor of that shape. Each row is ranked once, when it leaves the window, by what
there is to be seen at that time (``Window.pruned_at``): rows of a prompt all at its end, later ones at a step of their
own. Ties go to the lower channel, or along a channel to the earlier token.

"magnitude", "output-aware" and the two of channels are those of Mustafar (arXiv 2505.22913), "think" is the structured
baseline that it compares with (ThinK, arXiv 2407.21018).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from .codes import kept_mask
from .window import Window

QUERIES = 32
"""The latest queries, which tell what attention looks for."""


@dataclass(frozen=True)
class Choice:
    """How much is kept.

    sparsity: share that is dropped, in [0, 1). rounding: the number kept is rounded up to a multiple of it. group:
    tokens among which one channel is pruned.
    """

    sparsity: float
    rounding: int = 8
    group: int = 32

    def of(self, size: int) -> int:
        """How many of ``size`` are kept."""
        exact = (1 - Fraction(repr(float(self.sparsity)))) * size
        return min(ceil(exact / self.rounding) * self.rounding, size)


@dataclass(frozen=True)
class Seen:
    """What there is to be seen of a layer.

    queries: [B, Hq, T, D], after rotary. window: when tokens are pruned. token_weights: gives [B, H, T], the attention
    weights of each token, summed over the query heads of its KV head and the 32 latest queries when it is pruned.
    """

    queries: Tensor
    window: Window
    token_weights: Callable[[], Tensor]


Strategy = Callable[[Tensor, Seen, Choice], Tensor]


def magnitude(x: Tensor, seen: Seen, choice: Choice) -> Tensor:
    """The largest of each row."""
    return kept_mask(x, choice.of(x.shape[-1]))


def output_aware(x: Tensor, seen: Seen, choice: Choice) -> Tensor:
    """The largest |K| * w of each row, w the sum of |Q| over the group's heads and the 32 latest queries."""
    heads = seen.queries.unflatten(1, (x.shape[1], -1))
    weights = latest_sums(heads.abs().sum(2), seen.window)
    return kept_mask((x.abs().float() * weights).to(x.dtype), choice.of(x.shape[-1]))


def latest_sums(x: Tensor, window: Window) -> Tensor:
    """Sums [B, H, T, D] over the 32 latest positions when each token is pruned; of [B, H, T, D]."""
    totals = F.pad(x.double().cumsum(2), (0, 0, 1, 0))  # [t] holds all before t
    end = window.pruned_at(torch.arange(x.shape[2], device=x.device)).clamp(max=x.shape[2] - 1) + 1
    return (totals[:, :, end] - totals[:, :, (end - QUERIES).clamp(min=0)]).float()


def think_keys(x: Tensor, seen: Seen, choice: Choice) -> Tensor:
    """The same channels for all tokens of a head: at the end of the prompt the largest mean(Q^2) * mean(K^2)."""
    prompt = _prompt(seen)
    latest = seen.queries[:, :, max(prompt - QUERIES, 0) : prompt].unflatten(1, (x.shape[1], -1))
    score = latest.float().square().mean((2, 3)) * x[:, :, :prompt].float().square().mean(2)
    return kept_mask(score, choice.of(x.shape[-1]))[:, :, None].expand_as(x)


def think_values(x: Tensor, seen: Seen, choice: Choice) -> Tensor:
    """The same channels for all tokens of a head: at the end of the prompt the largest mean(V^2)."""
    score = x[:, :, : _prompt(seen)].float().square().mean(2)
    return kept_mask(score, choice.of(x.shape[-1]))[:, :, None].expand_as(x)


def _prompt(seen: Seen) -> int:
    if not seen.window.prompt:
        raise ValueError("strategy 'think' chooses channels at the end of a prompt; a prompt of 0 tokens is given")
    return seen.window.prompt


def channel_magnitude(x: Tensor, seen: Seen, choice: Choice) -> Tensor:
    """The largest of each channel in groups of tokens."""
    return _along_tokens(x.abs(), choice)


def channel_output_aware(x: Tensor, seen: Seen, choice: Choice) -> Tensor:
    """The largest |V| * a of each channel in groups of tokens, a the weights of a token (``Seen.token_weights``)."""
    return _along_tokens((x.abs().float() * seen.token_weights()[..., None]).to(x.dtype), choice)


def _along_tokens(score: Tensor, choice: Choice) -> Tensor:
    """Where the largest scores of each channel in each group are. The last group may be short; it is never pruned."""
    groups = F.pad(score, (0, 0, 0, -score.shape[2] % choice.group)).unflatten(2, (-1, choice.group))
    keep = kept_mask(groups.mT, choice.of(choice.group)).mT
    return keep.flatten(2, 3)[:, :, : score.shape[2]]


KEYS: dict[str, Strategy] = {"magnitude": magnitude, "output-aware": output_aware, "think": think_keys}
VALUES: dict[str, Strategy] = {
    "magnitude": magnitude,
    "think": think_values,
    "channel-magnitude": channel_magnitude,
    "channel-output-aware": channel_output_aware,
}
ALONG_CHANNELS = "channel-magnitude", "channel-output-aware"
"""Those that prune along the tokens, in groups which leave the window as a whole."""
