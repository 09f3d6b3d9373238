"""Models with live caches under the compiler, each beside the oracle of every layer; here those written by hand.

Each layer's oracle is given what the compiled model gave that layer, so that rounding does not add up from layer to
layer and K and V are equal to the last bit: else two channels of nearly equal magnitude could be pruned differently.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histories import History
from live_caches import Shape
from models import _Attention

WIDTH = 32
GROWING = ("cat", "cat to nothing")
KEEPERS = ("the caller", "one tensor", "buffers", "attributes")
"""What keeps the caches: the caller, as pairs of tensors or as one tensor for all layers, of which it makes new views
at each step; or each layer, as registered buffers or as plain attributes."""


@dataclass(eq=False)
class Live:
    """A cache, its oracle for each layer, and which tokens [B, n] may be attended to."""

    cache: Any
    histories: list[History]
    kept: Tensor

    @classmethod
    def empty(cls, cache: Any, histories: list[History]) -> Live:
        return cls(cache, histories, torch.ones(histories[0].rows[0].shape[0], 0, dtype=torch.bool))

    @property
    def batch(self) -> int:
        return self.kept.shape[0]

    @property
    def tokens(self) -> int:
        return self.kept.shape[1]

    @property
    def room(self) -> int | None:
        """Slots of a static cache."""
        return self.histories[0].room

    def crop(self, tokens: int) -> None:
        """Forget later tokens, in the oracle."""
        self.kept = self.kept[:, :tokens]
        for history in self.histories:
            history.crop(tokens)

    def select(self, picks: list[int]) -> None:
        """Select rows of the batch, in the oracle."""
        self.kept = self.kept[picks]
        self.histories = [history.selected(picks) for history in self.histories]

    def copied(self, cache: Any) -> Live:
        """With a copy of the cache."""
        return Live(cache, [history.copied() for history in self.histories], self.kept)


def write(form: str, cache: Tensor, new: Tensor, start: Any, dim: int) -> None:
    """New tokens into a buffer, from ``start`` of dimension ``dim`` on: an int for slices, else one element."""
    count, before = new.shape[dim], (slice(None),) * dim
    if form == "slice":
        cache[(*before, slice(start, start + count))] = new
    elif form == "where" and count == 1:
        cache.copy_(torch.where((torch.arange(cache.shape[dim]) == start).view(-1, *[1] * (3 - dim)), new, cache))
    elif form == "index_put":
        cache[(*before, torch.arange(count) + start)] = new
    else:
        cache.index_copy_(dim, torch.arange(count) + start, new)


def by_sdpa(q, k, v, mask, scale, softcap, sinks):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def by_repeating(q, k, v, mask, scale, softcap, sinks):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def by_softmax(q, k, v, mask, scale, softcap, sinks):
    group = q.shape[1] // k.shape[1]
    k, v = (x.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
    return weigh(q @ k.transpose(2, 3) * scale, mask, softcap, sinks).to(q.dtype) @ v


def by_einsum(q, k, v, mask, scale, softcap, sinks):
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bhgld,bhsd->bhgls", grouped, k).flatten(1, 2) * scale
    weights = weigh(scores, mask, softcap, sinks).to(q.dtype).unflatten(1, (k.shape[1], -1))
    return torch.einsum("bhgls,bhsd->bhgld", weights, v).flatten(1, 2)


def weigh(scores, mask, softcap, sinks):
    scores = scores.float()
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]


SPELLINGS = {"sdpa": by_sdpa, "repeating": by_repeating, "softmax": by_softmax, "einsum": by_einsum}


def held_by(layer):
    """The K and V that a layer has, if any."""
    return None if layer.keys is None else (layer.keys, layer.values)


class Decoder(nn.Module):
    """Attention layers over embeddings [B, L, E]; their caches come and go as pairs of tensors, or stay with them."""

    def __init__(self, choose: random.Random, shape: Shape, form: str) -> None:
        super().__init__()
        self.shape, self.form, self.grows = shape, form, form in GROWING
        heads, sizes = shape.heads * shape.group, (shape.key_dim, shape.value_dim)
        layers = choose.choice([1, 1, 2])
        self.layers = nn.ModuleList(_Attention(heads, shape.heads, *sizes, WIDTH) for _ in range(layers))
        self.spelling = choose.choice(list(SPELLINGS))
        spelled_out = self.spelling in ("softmax", "einsum")
        self.softcap = choose.choice([0.0, 2.0]) if spelled_out else 0.0
        self.sinks = nn.Parameter(torch.randn(heads)) if spelled_out and choose.random() < 0.3 else None
        self.scale = choose.choice([shape.key_dim**-0.5, 0.3])
        self.mask = choose.choice(["inside", "boolean", "additive", "by head", "causal"])
        self.tokens_dim = 2 if self.grows else choose.choice([1, 2])
        self.slots = None if self.grows else choose.choice([40, 64])
        self.reads_prefix = form == "slice" and choose.random() < 0.5
        self.shares = choose.random() < 0.3  # a second attention reads the cache of each layer
        self.keeper = choose.choice([keeper for keeper in KEEPERS if not (self.grows and keeper == "one tensor")])
        self.held_by_layers = self.keeper in ("buffers", "attributes")
        for layer in self.layers if self.keeper == "buffers" else ():
            layer.register_buffer("keys", None, persistent=False)
            layer.register_buffer("values", None, persistent=False)
        self.to(shape.dtype)

    def forward(self, x, caches, start, mask):
        """What attention takes and gives in each layer, and the caches. start: tokens before."""
        passed, after = [], []
        for i, layer in enumerate(self.layers):
            q, *new = layer.project(x)
            past = held_by(layer) if self.held_by_layers else caches[i] if caches else None
            pair = self.updated(past, [self.swapped(t) for t in new], start)
            k, v = (self.swapped(t) for t in self.read(pair, start, x.shape[1]))
            k, v = (t.transpose(1, 2) for t in (k, v))
            queries = self.queries(q.transpose(1, 2))
            results = [layer.merge(self.attend(y, k, v, start, mask, begins=past is None)) for y in queries]
            passed.append((x, results))
            if self.held_by_layers:
                layer.keys, layer.values = pair
            else:
                after.append(pair)
            x = torch.tanh(x + sum(results))
        return passed, after

    def queries(self, q):
        """Those of each attention of a layer."""
        return (q, q.flip(-1)) if self.shares else (q,)

    def swapped(self, x):
        """Between [B, S, H, D] and how the cache is kept."""
        return x if self.tokens_dim == 1 else x.transpose(1, 2)

    def updated(self, pair, new, start):
        if self.grows:
            return tuple(new if pair is None else (torch.cat(both, dim=2) for both in zip(pair, new, strict=True)))
        for cache, rows in zip(pair, new, strict=True):
            write(self.form, cache, rows, start, self.tokens_dim)
        return pair

    def read(self, pair, start, count):
        return [x.narrow(self.tokens_dim, 0, start + count) for x in pair] if self.reads_prefix else pair

    def attend(self, q, k, v, start, mask, begins):
        count = q.shape[2]
        if begins and count > 1 and self.mask == "causal" and self.spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        if mask is None and not (self.grows and count == 1):
            mask = torch.arange(k.shape[2]) <= torch.arange(count).unsqueeze(1) + start
        return SPELLINGS[self.spelling](q, k, v, mask, self.scale, self.softcap, self.sinks)


class OwnModel:
    """A ``Decoder`` under the compiler. Static caches are allocated by the caller."""

    def __init__(self, choose: random.Random, shape: Shape, form: str) -> None:
        self.model = Decoder(choose, shape, form).eval()
        self.shape, self.room, self.tokens_dim = shape, self.model.slots, self.model.tokens_dim

    def compile(self, **how) -> None:
        self.step = torch.compile(self.model, backend="mustafar", **how)

    def fresh(self, batch: int, spare: int = 0) -> Live:
        """An empty cache; a static one has so many slots more than ``room``."""
        shape, room = self.shape, None if self.room is None else self.room + spare
        layout = [batch, shape.heads, room or 0] if self.tokens_dim == 2 else [batch, room or 0, shape.heads]
        dims = [shape.key_dim, shape.value_dim]
        if self.model.keeper == "one tensor":
            whole = torch.zeros(len(self.model.layers), *layout, sum(dims), dtype=shape.dtype)
            caches = [layer.split(dims, dim=-1) for layer in whole]
        else:
            caches = [[torch.zeros(*layout, dim, dtype=shape.dtype) for dim in dims] for _ in self.model.layers]
        histories = [History.empty(shape, batch, room, of_caller=not self.model.grows) for _ in caches]
        return Live.empty(None if self.model.form == "cat" else caches, histories)

    def call(self, live: Live, count: int, at: int, seed: int, eager: bool) -> list[tuple[Tensor, Tensor]]:
        """So many new tokens at ``at``: what attention gave in each layer, and what its oracle gives."""
        live.crop(at)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(live.batch, count, WIDTH, generator=generator).to(self.shape.dtype)
        mask = self._mask(live.batch, count, at, generator)
        start = at if self.model.form == "slice" else torch.tensor([at])
        passed = self._run(self.model if eager else self.step, live, x, start, self._padded(mask, live.room))
        live.kept = F.pad(live.kept, (0, count), value=True)
        how = {"scale": self.model.scale, "softcap": self.model.softcap, "sinks": self.model.sinks}
        results = []
        for layer, history, (taken, given) in zip(self.model.layers, live.histories, passed, strict=True):
            q, k, v = (t.transpose(1, 2) for t in layer.project(taken))
            oracles = [history, *(replace(history) for _ in given[1:])]  # each attends to what the first does
            for actual, query, oracle in zip(given, self.model.queries(q), oracles, strict=True):
                results.append((actual, layer.merge(oracle.attend(query, [k, v], at, mask, eager, **how))))
        return results

    def _run(self, step, live: Live, x: Tensor, start: Any, mask: Tensor | None) -> list:
        """What attention takes and gives in each layer, after the caches were put where the model looks for them."""
        if self.model.keeper == "one tensor":
            return step(x, [[t[:] for t in pair] for pair in live.cache], start, mask)[0]
        if self.model.keeper == "the caller":
            passed, live.cache = step(x, live.cache, start, mask)
            return passed
        for i, layer in enumerate(self.model.layers):
            layer.keys, layer.values = live.cache[i] if live.cache else (None, None)
        passed, _ = step(x, None, start, mask)
        live.cache = [held_by(layer) for layer in self.model.layers]
        return passed

    def _mask(self, batch: int, count: int, at: int, generator: torch.Generator) -> Tensor | None:
        """A causal mask [B, 1 or Hq, L, n] with holes, though no token is hidden from itself; None: made inside."""
        kind = self.model.mask
        if kind in ("inside", "causal"):
            return None
        heads = self.shape.heads * self.shape.group if kind == "by head" else 1
        holes = torch.rand(batch, heads, count, at + count, generator=generator) < 0.3
        own = torch.arange(at + count) == torch.arange(count).unsqueeze(1) + at
        mask = torch.ones(count, at + count, dtype=torch.bool).tril(at) & (~holes | own)
        bias = torch.randn(heads, 1, 1, generator=generator)
        return mask if kind == "boolean" else torch.where(mask, bias, float("-inf")).to(self.shape.dtype)

    def _padded(self, mask: Tensor | None, room: int | None) -> Tensor | None:
        """``mask`` with a column for each slot that attention reads."""
        if mask is None or room is None or self.model.reads_prefix:
            return mask
        return F.pad(mask, (0, room - mask.shape[3]), value=False if mask.dtype == torch.bool else float("-inf"))

    def tensors(self, live: Live) -> list:
        """K and V of each layer."""
        return live.cache or []

    def crop(self, live: Live, tokens: int) -> None:
        live.cache = [tuple(x[:, :, :tokens] for x in pair) for pair in live.cache]
        live.crop(tokens)

    def select(self, live: Live, picks: list[int], how: str) -> None:
        live.cache = [tuple(x[torch.tensor(picks)] for x in pair) for pair in live.cache]
        live.select(picks)

    def reset(self, live: Live) -> None:
        """A new sequence in the same buffers; a past that grows has none."""
        live.cache = live.cache if self.room is not None or live.cache is None else self.fresh(live.batch).cache
        live.kept = live.kept[:, :0]
        for history in live.histories:
            history.crop(0)
            history.held = history.held if history.of_caller else None
            history.first = None
