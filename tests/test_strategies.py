"""Strategies: what rows rank by, in models whose caches are pruned by them, and what users do with such caches."""

from __future__ import annotations

import pytest
import torch

from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import explain
from ranked import ranked_generation

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
