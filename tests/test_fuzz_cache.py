"""Random sequences of operations on live caches: after each one they hold, and attend to, what plain rows would."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from cases import randn
from mustafar_compile import CompressedKV
from mustafar_compile.lowering import ops
from reference import kept_count, prune, reference_attention

COPIES = [copy.deepcopy, torch.clone, lambda kv: kv.to("cpu", copy=True)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

seeds = st.integers(0, 2**31)
lengths = st.one_of(st.integers(1, 8), st.integers(25, 40), st.integers(60, 75))  # around blocks and capacities, too


@dataclass(frozen=True)
class Shape:
    """What does not change while a cache lives: KV heads, query heads for each, head dims, dtype, settings."""

    heads: int
    group: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    key_sparsity: float
    value_sparsity: float
    window: int


shapes = st.builds(
    Shape,
    heads=st.integers(1, 3),
    group=st.integers(1, 5),
    key_dim=st.sampled_from([8, 16, 24, 40]),
    value_dim=st.sampled_from([8, 16, 32]),
    dtype=st.sampled_from(list(TOLERANCE)),
    key_sparsity=st.sampled_from([0.0, 0.5, 0.7]),
    value_sparsity=st.sampled_from([0.0, 0.5, 0.9]),
    window=st.integers(1, 12),
)


@dataclass
class Rows:
    """The oracle of one cache tensor: all rows [B, H, n, D] exact, of which those before ``held`` cannot come back."""

    exact: torch.Tensor
    sparsity: float
    window: int
    held: int = 0

    def dense(self) -> torch.Tensor:
        pruned = max(self.held, self.exact.shape[2] - self.window)
        kept = kept_count(self.exact.shape[3], self.sparsity)
        return torch.cat([prune(self.exact[:, :, :pruned], kept), self.exact[:, :, pruned:]], dim=2)

    def written(self, rows: torch.Tensor, at: int) -> Rows:
        """With ``rows`` at position ``at`` and nothing behind."""
        exact = torch.cat([self.exact[:, :, :at], rows], dim=2)
        return replace(self, exact=exact, held=max(min(self.held, at), exact.shape[2] - self.window, 0))

    def recompressed(self, rows: torch.Tensor) -> Rows:
        """With ``rows`` behind, by way of a dense tensor."""
        return replace(self, exact=self.dense(), held=0).written(rows, self.exact.shape[2])

    def mapped(self, change) -> Rows:
        return replace(self, exact=change(self.exact))


@dataclass
class Live:
    """A cache of one layer, K and V, and what it must hold."""

    key: CompressedKV
    value: CompressedKV
    key_rows: Rows
    value_rows: Rows

    @property
    def batch(self) -> int:
        return self.key.shape[0]

    @property
    def tokens(self) -> int:
        return self.key_rows.exact.shape[2]

    def check(self) -> None:
        assert torch.equal(self.key.dense(), self.key_rows.dense())
        assert torch.equal(self.value.dense(), self.value_rows.dense())


def random_mask(kind: str, batch: int, heads: int, queries: int, tokens: int, seed: int) -> torch.Tensor | None:
    """A causal mask [B, 1 or heads, queries, tokens] with random holes; None where none is asked for."""
    causal = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    if kind == "none":
        return None if queries == 1 else causal[None, None]
    shape = (batch, heads if kind == "by head" else 1, queries, tokens)
    holes = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask = causal & ~holes
    return torch.where(mask, 0.25, float("-inf")) if kind == "additive" else mask


mask_kinds = st.sampled_from(["none", "boolean", "by head", "additive"])


class GrowingCaches(RuleBasedStateMachine):
    """Growing caches under the custom ops, without a compiler."""

    caches = Bundle("caches")

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Live] = []

    # ------------------------------------------------------------------------------------------ how tokens get in

    def start(self, query, key, value, mask):
        """Prefill: (attention, K, V), the latter two compressed."""
        shape = self.shape
        attended = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        compressed = [
            CompressedKV.from_dense(key, shape.key_sparsity, shape.window),
            CompressedKV.from_dense(value, shape.value_sparsity, shape.window),
        ]
        return attended, *compressed

    def step(self, query, key, value, past_key, past_value, mask):
        """One more token: (attention, K, V)."""
        past_key.prepare(1)
        past_value.prepare(1)
        scale = query.shape[3] ** -0.5
        attended = ops.decode_attention(
            query, key, value, *past_key.buffers, *past_value.buffers, None, mask, None, scale
        )
        return attended, past_key.extended(1), past_value.extended(1)

    def chunk(self, query, key, value, past_key, past_value, mask):
        """Several more tokens, by way of dense tensors."""
        return self.start(query, torch.cat([past_key.dense(), key], 2), torch.cat([past_value.dense(), value], 2), mask)

    # --------------------------------------------------------------------------------------------------- the rules

    def new_tokens(self, batch, tokens, seed):
        shape = self.shape
        return (
            randn(batch, shape.heads * shape.group, tokens, shape.key_dim, seed=seed, dtype=shape.dtype),
            randn(batch, shape.heads, tokens, shape.key_dim, seed=seed + 1, dtype=shape.dtype),
            randn(batch, shape.heads, tokens, shape.value_dim, seed=seed + 2, dtype=shape.dtype),
        )

    def mask(self, kind, batch, queries, tokens, seed):
        mask = random_mask(kind, batch, self.shape.heads * self.shape.group, queries, tokens, seed)
        return mask.to(self.shape.dtype) if kind == "additive" else mask

    def assert_attended(self, actual, query, live, mask):
        expected = reference_attention(query, live.key_rows.dense(), live.value_rows.dense(), 0, 0, 1, mask)
        tolerance = TOLERANCE[self.shape.dtype]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

    def add(self, live: Live) -> Live:
        self.live.append(live)
        return live

    @initialize(shape=shapes)
    def choose(self, shape):
        self.shape = shape

    @rule(target=caches, batch=st.integers(1, 3), tokens=lengths, seed=seeds)
    def prefill(self, batch, tokens, seed):
        query, key, value = self.new_tokens(batch, tokens, seed)
        mask = self.mask("none", batch, tokens, tokens, seed)
        attended, cached_key, cached_value = self.start(query, key, value, mask)
        exact = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(attended, exact, rtol=TOLERANCE[key.dtype], atol=TOLERANCE[key.dtype])
        shape = self.shape
        key_rows = Rows(key[:, :, :0], shape.key_sparsity, shape.window).written(key, 0)
        value_rows = Rows(value[:, :, :0], shape.value_sparsity, shape.window).written(value, 0)
        return self.add(Live(cached_key, cached_value, key_rows, value_rows))

    @rule(live=caches, steps=st.integers(1, 6), kind=mask_kinds, seed=seeds)
    def decode(self, live, steps, kind, seed):
        for i in range(seed, seed + steps):
            query, key, value = self.new_tokens(live.batch, 1, i)
            mask = self.mask(kind, live.batch, 1, live.tokens + 1, i)
            attended, live.key, live.value = self.step(query, key, value, live.key, live.value, mask)
            live.key_rows = live.key_rows.written(key, live.tokens)
            live.value_rows = live.value_rows.written(value, live.value_rows.exact.shape[2])
            self.assert_attended(attended, query, live, mask)

    @rule(live=caches, tokens=st.integers(17, 40), kind=mask_kinds, seed=seeds)
    def prefill_chunk(self, live, tokens, kind, seed):
        query, key, value = self.new_tokens(live.batch, tokens, seed)
        mask = self.mask(kind, live.batch, tokens, live.tokens + tokens, seed)
        past = live.key_rows.dense(), live.value_rows.dense()
        attended, live.key, live.value = self.chunk(query, key, value, live.key, live.value, mask)
        seen = [torch.cat(both, 2) for both in zip(past, (key, value), strict=True)]
        expected = reference_attention(query, *seen, 0, 0, 1, mask)
        torch.testing.assert_close(attended, expected, rtol=TOLERANCE[key.dtype], atol=TOLERANCE[key.dtype])
        live.key_rows, live.value_rows = live.key_rows.recompressed(key), live.value_rows.recompressed(value)

    @rule(target=caches, live=caches, how=st.sampled_from(COPIES))
    def branch(self, live, how):
        return self.add(replace(live, key=how(live.key), value=how(live.value)))

    @rule(live=caches)
    def reset(self, live):
        live.key.zero_()
        live.value.zero_()
        live.key_rows = live.key_rows.mapped(torch.zeros_like)
        live.value_rows = live.value_rows.mapped(torch.zeros_like)

    @invariant()
    def caches_hold_what_plain_rows_hold(self):
        for live in self.live:
            live.check()


TestGrowingCaches = GrowingCaches.TestCase
TestGrowingCaches.settings = settings(stateful_step_count=20)
