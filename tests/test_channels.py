"""Values that are pruned by channel, in blocks of 32 tokens: the ops, models, and what users do with such caches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cases import (
    Cache,
    Case,
    TokenByToken,
    assert_close,
    assert_same_rows,
    attention,
    compressed,
    decompressed,
    make_mask,
    query_counts,
    randn,
    seeds,
)
from channels import Blocks, summed_over_heads
from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import explain
from mustafar_compile.lowering import ops
from mustafar_compile.lowering.format import CACHE_DTYPES, CODES, Format
from nightly import at_night
from ranked import ranked_generation
from reference import reference_weights

WINDOW, NEW_TOKENS, SPARSITY = 4, 40, 0.5
BATCH, HEADS, GROUP, KEY_DIM, VALUE_DIM = 2, 2, 2, 16, 8
STRATEGIES = ("channel-magnitude", "channel-output-aware")
WINDOWS = (1, 4, 20, 32, 40)


def value_cache(dense, tokens, strategy, window, capacity, sparsity=0.5, code="none", weights=None):
    """A compressed cache of values."""
    format = Format.of(dense.shape[3], sparsity, window, "rows", code, strategy)
    written = torch.tensor([tokens])
    return Cache(ops.compress(dense, written, format.encode(), capacity, attention=weights), format)


class Layer:
    """K and V of a layer beside their oracles."""

    def __init__(self, strategy, window, seed, dtype=torch.float32, code="none", prompt=0, room=600):
        self.strategy, self.window, self.seed, self.dtype, self.code = strategy, window, seed, dtype, code
        self.tokens = 0
        query, *rows = self.new(max(prompt, 1))
        self.keys, mask = TokenByToken(8, window), torch.ones(prompt, prompt, dtype=torch.bool).tril()
        self.values = Blocks.of_prompt(strategy, 16, code, window, rows[1][:, :, :0])
        weights = ops.latest_weights(query, rows[0], None, None, True, 0.3) if prompt else None
        self.caches = (
            compressed(rows[0], prompt, 8, window, room, order="rows"),
            value_cache(rows[1], prompt, strategy, window, room, code=code, weights=weights),
        )
        if prompt:
            self.keys.write(rows[0], 0)
            attended = summed_over_heads(reference_weights(query, rows[0], mask, 0.3), HEADS)
            self.values = Blocks.of_prompt(strategy, 16, code, window, rows[1], attended, self.actual(prompt))
            self.tokens = prompt

    def new(self, count):
        """Query, K and V of more tokens."""
        self.seed += 3
        sizes = (HEADS * GROUP, KEY_DIM), (HEADS, KEY_DIM), (HEADS, VALUE_DIM)
        return [randn(BATCH, h, count, d, seed=self.seed + i, dtype=self.dtype) for i, (h, d) in enumerate(sizes)]

    def actual(self, tokens):
        return decompressed(self.caches[1], tokens)

    def step(self, count, back=0, mask=None, sinks=None):
        """More tokens, ``back`` behind the last: attention and the cache of V are those of the oracle."""
        at = max(self.tokens - back, 0)
        query, *new = self.new(count)
        given_mask = None if mask is None else make_mask("bool", (BATCH, 1, count, at + count), mask).tril(at)
        out = attention(query, *new, *self.caches, torch.tensor([at]), given_mask, sinks, 0.3)
        self.tokens = at + count
        for i in range(count):
            q, k, v = (x[:, :, i : i + 1] for x in (query, *new))
            (keys,) = self.keys.write(k, at + i)
            row = None if given_mask is None else given_mask[:, :, i : i + 1, : at + i + 1]
            weights = summed_over_heads(reference_weights(q, keys, row, 0.3, sinks=sinks), HEADS).squeeze(2)
            values = self.values.write(v, at + i, weights, self.actual(self.tokens))
            case = Case(q, keys, values, 0.0, 0.0, scale=0.3, mask=row, sinks=sinks)
            assert_close(out[:, :, i : i + 1], case, rounds_weights=True)
        self.check()

    def check(self):
        assert self.caches[1].counts.tolist() == BATCH * [[self.tokens, self.values.held, 0]]
        assert_same_rows(self.actual(self.tokens), self.values.dense(self.values.rows), self.code)


moves = st.lists(st.tuples(query_counts, st.sampled_from([0, 0, 0, 1, 7, 16, 17, 40, 90])), min_size=4, max_size=16)


@given(
    moves, st.sampled_from(STRATEGIES), st.sampled_from(WINDOWS), st.sampled_from([0, 0, 20, 70, 101]), seeds,
    st.sampled_from(CACHE_DTYPES), st.sampled_from(CODES),
)  # fmt: skip
@example([(16, 0)] * 4 + [(1, 40), (16, 0), (16, 0)], "channel-output-aware", 1, 0, 0, torch.float32, "none")
@example([(16, 0)] * 6 + [(16, 78)] + [(16, 0)] * 4, "channel-magnitude", 1, 0, 14, torch.float32, "none")
@example([(1, 0)] * 34, "channel-output-aware", 32, 33, 1, torch.bfloat16, "none")
@example([(16, 0)] * 9, "channel-output-aware", 32, 0, 1, torch.float16, "int4")
def test_steps_and_rewinds_equal_tokens_one_by_one(moves, strategy, window, prompt, seed, dtype, code):
    layer = Layer(strategy, window, seed, dtype, code, prompt)
    layer.check()
    for count, back in moves:
        layer.step(count, back)


# ------------------------------------------------------------------------------------------------------------- models


def options(keys, values, **others):
    sparsities = {"key_sparsity": SPARSITY, "value_sparsity": SPARSITY}
    return {"key_strategy": keys, "value_strategy": values, "window": WINDOW, **sparsities, **others}


def generate(model, inputs, **how):
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **how)


WAYS = [
    ("magnitude", "channel-magnitude", "dynamic", "none"),
    ("output-aware", "channel-output-aware", "static", "none"),
    *at_night(
        [("think", "channel-output-aware", "dynamic", "int8"), ("magnitude", "channel-magnitude", "static", "int4")]
    ),
]


@pytest.mark.parametrize(("keys", "values", "cache", "code"), WAYS)
def test_tokens_are_those_of_the_oracle(keys, values, cache, code):
    model, inputs = hf_model("llama", num_hidden_layers=1), prompt(padded=True, length=40)
    with ranked_generation((keys, values), SPARSITY, WINDOW, ("none", code)) as layers:
        tokens = generate(model, inputs).sequences
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options=options(keys, values, value_code=code))
        result = generate(model, inputs, cache_implementation=cache)
    assert torch.equal(result.sequences, tokens)
    assert [entry.kernels for entry in report.matched] == ["PyTorch"]
    assert not report.notices
    layer, rows = result.past_key_values.layers[0], layers[0].stored(*layers[0].latest)
    assert (layer.keys.format.strategy, layer.values.format.strategy) == (keys, values)
    assert layers[0].blocks.packed.shape[2] == 64
    for kv, x in zip((layer.keys, layer.values), rows, strict=True):
        dense = kv.dense()[:, :, : x.shape[2]]
        assert torch.equal(dense != 0, x != 0)
        torch.testing.assert_close(dense, x)
