"""Models whose caches keep their elements in a code, and what users do with such caches."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import mustafar_compile
from cases import randn
from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import CompressedKV, SavedCacheError, Settings, cache_stats, explain
from mustafar_compile.lowering.format import CODES
from mustafar_compile.settings import PRESETS
from nightly import mostly_at_night
from pairwise import pairwise
from reference import pruned_generation, quantized

pytestmark = pytest.mark.usefixtures("no_grad")
WINDOW, NEW_TOKENS = 4, 12
CODED = [code for code in CODES if code != "none"]
WAYS = {
    **PRESETS,
    "mixed": {"key_sparsity": 0.5, "value_sparsity": 0.0, "key_code": "int4", "value_code": "none"},
    "values only": {"key_sparsity": 0.0, "value_sparsity": 0.7, "key_code": "none", "value_code": "int8"},
}


CASES = [("balanced", "dynamic"), ("small", "static"), ("safe", "dynamic"), *pairwise([*WAYS], ("dynamic", "static"))]


@pytest.mark.parametrize(("way", "cache"), mostly_at_night(list(dict.fromkeys(CASES)), 2))
def test_tokens_are_those_of_the_oracle(way, cache):
    model, inputs = hf_model("llama", num_hidden_layers=1), prompt(padded=True)
    settings = Settings(**WAYS[way], window=WINDOW)
    how = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    sparsities, codes = ([settings.at(f"{role}_{what}") for role in ("key", "value")] for what in ("sparsity", "code"))
    with pruned_generation(*sparsities, WINDOW, codes=tuple(codes)):
        expected = model.generate(**inputs, **how)
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options={**WAYS[way], "window": WINDOW})
        result = model.generate(**inputs, **how, cache_implementation=cache, return_dict_in_generate=True)
    assert torch.equal(result.sequences, expected)
    assert len(report.matched) == model.config.num_hidden_layers
    layer = result.past_key_values.layers[0]
    assert [layer.keys.format.code, layer.values.format.code] == codes


@pytest.mark.parametrize("code", CODED)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_what_users_do_with_a_cache(code, sparsity):
    dense = randn(3, 2, 90, 40, seed=5, dtype=torch.bfloat16)
    kv = CompressedKV.from_dense(dense, sparsity, WINDOW, code=code)
    rows = quantized(dense[:, :, :86], kv.format.kept, code).to(dense.dtype)
    assert torch.equal(kv.dense()[:, :, :86], rows)
    assert torch.equal(kv.dense()[:, :, 86:], dense[:, :, 86:])
    assert repr(kv).endswith(f"kept in {code})")
    assert torch.equal(kv[[2, 0]].dense(), kv.dense()[[2, 0]])
    assert torch.equal(kv.repeat_interleave(2, 0).dense(), kv.dense().repeat_interleave(2, 0))
    shorter = CompressedKV.from_dense(dense[:, :, :80], sparsity, WINDOW, code=code)
    assert torch.equal(kv[:, :, :80].dense(), shorter.dense())
    assert torch.equal(copy.deepcopy(kv).dense(), kv.dense())
    there_and_back = kv.ordered("blocks").ordered("rows")
    assert all(torch.equal(a, b) for a, b in zip(there_and_back.buffers, kv.buffers, strict=True))
    assert cache_stats([(kv, kv)]).stored_bytes == kv.stored_bytes


@pytest.mark.parametrize("code", CODED)
def test_a_cache_is_saved_and_loaded(code):
    kv = CompressedKV.from_dense(randn(1, 2, 70, 32, seed=6), 0.5, WINDOW, code=code)
    file = io.BytesIO()
    torch.save(kv, file)
    file.seek(0)
    with torch.serialization.safe_globals(mustafar_compile.safe_globals()):
        loaded = torch.load(file)
    assert loaded.format is kv.format
    assert torch.equal(loaded.dense(), kv.dense())


def test_a_floor_that_no_row_has_is_refused():
    kv = CompressedKV.from_dense(randn(1, 2, 70, 32, seed=7), 0.5, WINDOW, code="int4")
    restore, parts = kv.__reduce_ex__(4)
    parts[1][kv.format.place("floors")][0, 0, 0, 3] = 128
    with pytest.raises(SavedCacheError, match="a floor of some row is above 127"):
        restore(*parts)


@pytest.mark.nightly  # tests of kernels rewind as well
@pytest.mark.parametrize("code", CODED)
def test_a_cache_goes_on_after_a_crop(code):
    """Speculative decoding takes tokens back: what comes then is as if they had never been there."""
    from transformers import DynamicCache

    model, inputs = hf_model("llama", num_hidden_layers=1), prompt()
    options = {"key_code": code, "value_code": code, "window": WINDOW}
    with without_compiler():
        step = torch.compile(model, backend="mustafar", options=options)
        logits = []
        for drafts in (0, 3):
            cache = DynamicCache(config=model.config)
            past = step(**inputs, past_key_values=cache).past_key_values
            if drafts:
                past = step(torch.full((2, drafts), 7), past_key_values=past).past_key_values
                past.crop(-drafts)
            logits.append(step(torch.full((2, 1), 5), past_key_values=past).logits)
    torch.testing.assert_close(*logits)
