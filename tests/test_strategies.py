"""Strategies: what rows rank by, in models whose caches are pruned by them, and what users do with such caches."""

from __future__ import annotations

import pytest
import torch

from cases import randn
from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import CompressedKV, explain
from mustafar_compile.lowering import ops
from ranked import Packed, ranked_generation

WINDOW, NEW_TOKENS, SPARSITY = 4, 40, 0.5
WAYS = [("output-aware", "magnitude"), ("output-aware", "think"), ("think", "magnitude"), ("magnitude", "think")]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def options(keys, values, **others):
    sparsities = {"key_sparsity": SPARSITY, "value_sparsity": SPARSITY}
    return {"key_strategy": keys, "value_strategy": values, "window": WINDOW, **sparsities, **others}


def generate(model, inputs, **how):
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **how)


def expected(model, inputs, strategies, codes=("none", "none")):
    """Tokens of the oracle, and K and V of the first layer at the end."""
    with ranked_generation(strategies, SPARSITY, WINDOW, codes) as layers:
        tokens = generate(model, inputs).sequences
    return tokens, layers[0].stored(*layers[0].latest)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("strategies", WAYS)
def test_tokens_are_those_of_the_oracle(strategies, cache):
    model, inputs = hf_model("llama", num_hidden_layers=1), prompt(padded=True, length=14)
    tokens, rows = expected(model, inputs, strategies)
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options=options(*strategies))
        result = generate(model, inputs, cache_implementation=cache)
    assert torch.equal(result.sequences, tokens)
    assert len(report.matched) == 1
    assert not report.notices
    layer = result.past_key_values.layers[0]
    assert (layer.keys.format.strategy, layer.values.format.strategy) == strategies
    for kv, x in zip((layer.keys, layer.values), rows, strict=True):
        dense = kv.dense()[:, :, : x.shape[2]]
        assert torch.equal(dense != 0, x != 0)
        torch.testing.assert_close(dense, x)


STEPS = (1, 0), (3, 0), (16, 0), (1, 16), (5, 2), (1, 0), (16, 9), (16, 0)
"""Tokens of each, and by how many the cache is rewound before it."""


@pytest.mark.parametrize("strategy", ["output-aware", "think"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 5, 60])
def test_which_queries_count(strategy, dtype, first):
    """Each query stands out or is nothing beside others, so one too many or too few changes what is kept."""
    window, known = 1, min(first, 50)

    def tokens(count, seed):
        scales = 8.0 ** torch.randint(-2, 3, (2, 1, count, 1), generator=torch.Generator().manual_seed(seed))
        return [x.to(dtype) for x in (randn(2, 6, count, 24, seed=seed) * scales, randn(2, 2, count, 24, seed=-seed))]

    query, rows = tokens(first, 1)
    queries = query[:, :, first - known :] if known else None
    room = torch.nn.functional.pad(rows, (0, 0, 0, 80))
    kv = CompressedKV.from_dense(room, SPARSITY, window, first, strategy=strategy, queries=queries)
    other = CompressedKV.from_dense(room, SPARSITY, window, first)
    packed = Packed.of_prompt(strategy, kv.format.kept, "none", window, rows, queries)
    held, formats = max(first - window - 16, 0), (kv.format.encode(), other.format.encode())
    for seed, (count, back) in enumerate(STEPS, 2):
        at = max(rows.shape[2] - back, 0)
        query, new = tokens(count, seed)
        place = torch.tensor([at])
        ops.decode_attention(query, new, new, kv.buffers, other.buffers, *formats, place, None, None, 0.1)
        for i in range(count):
            rows = torch.cat([rows[:, :, : at + i], new[:, :, i : i + 1]], dim=2)
            packed.append(rows, query[:, :, i : i + 1], min(held, at + i))
            held = max(min(held, at + i), at + i + 1 - window - 16)
        assert torch.equal(kv.dense()[:, :, : at + count - window], packed.rows[:, :, :-window])
