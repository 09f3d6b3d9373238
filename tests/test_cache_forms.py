"""Caches of HF models in other forms than one prompt and then token by token."""

from __future__ import annotations

import pytest
import torch

from models import encoder_decoder, hf_model, prompt
from mustafar_compile import CompressedKV, explain
from mustafar_compile.patterns.attention import find
from nightly import at_night
from reference import pruned_generation

pytestmark = pytest.mark.usefixtures("no_grad", "uncompiled")
WINDOW = 4
STATIC = {"cache_implementation": "static"}


def compiled(model, sparsity=0.5):
    model.compile(backend="mustafar", options={"key_sparsity": sparsity, "value_sparsity": sparsity, "window": WINDOW})
    return model


def generate(model, inputs, **how):
    how = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True} | how
    return model.generate(**inputs, **how)


def oracle(model, inputs, **how):
    with pruned_generation(0.5, 0.5, WINDOW):
        return generate(model, inputs, **how).sequences


def static_cache(model):
    from transformers import StaticCache

    return {"past_key_values": StaticCache(config=model.config, max_cache_len=64)}


@pytest.mark.parametrize("cache", [static_cache, *at_night([lambda _: {}])], ids=["static", "dynamic"])
def test_a_prompt_in_chunks_attends_to_what_was_kept_of_the_earlier_ones(cache):
    inputs, chunks = prompt(length=40, padded=True), {"prefill_chunk_size": 20}
    expected = oracle(hf_model(num_hidden_layers=1), inputs, **chunks)
    model = compiled(hf_model(num_hidden_layers=1))
    with explain() as report:
        result = generate(model, inputs, **chunks, **cache(model))
    assert torch.equal(result.sequences, expected)
    assert isinstance(result.past_key_values.layers[0].keys, CompressedKV)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")]


def test_a_prompt_in_chunks_over_a_dense_static_cache_is_compressed_when_decoding_begins():
    inputs = prompt(length=40)
    expected = oracle(hf_model(num_hidden_layers=1), inputs)
    with explain() as report:
        result = generate(compiled(hf_model(num_hidden_layers=1)), inputs, prefill_chunk_size=20, **STATIC)
    assert torch.equal(result.sequences, expected)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")]


@pytest.mark.parametrize("how", [STATIC, *at_night([{}])], ids=["static", "dynamic"])
def test_sliding_layers_of_a_hybrid_stay_dense_before_and_after_they_are_full(how):
    inputs, sizes = prompt(), {"sliding_window": 12}
    expected = oracle(hf_model("gemma3_text", **sizes), inputs, max_new_tokens=7)
    with explain() as report:
        result = generate(compiled(hf_model("gemma3_text", **sizes)), inputs, max_new_tokens=7, **how)
    assert torch.equal(result.sequences, expected)
    assert [entry.layer for entry in report.matched] == [1]
    assert [entry.reason for entry in report.missed] == ["cache is bounded by a sliding window of 12"]
    assert not isinstance(result.past_key_values.layers[0].keys, CompressedKV)


def test_a_static_cache_that_was_compressed_before_it_began_to_roll(monkeypatch):
    """Where all layers slide and the model does not say so, nothing tells them from others until the first is full."""
    monkeypatch.setattr(find, "stated_window", lambda module: None)
    inputs, sizes = prompt(), {"sliding_window": 12, "num_hidden_layers": 1}
    expected = generate(hf_model("mistral", **sizes), inputs, max_new_tokens=8).sequences
    with explain() as report:
        result = generate(compiled(hf_model("mistral", **sizes), sparsity=0.0), inputs, max_new_tokens=8, **STATIC)
    assert torch.equal(result.sequences, expected)
    assert [entry.reason for entry in report.missed] == ["cache is bounded by a sliding window of 12"]


@pytest.mark.parametrize("how", [{}, *at_night([STATIC])], ids=["dynamic", "static"])
def test_of_an_encoder_decoder_only_the_self_attention_of_the_decoder_is_compressed(how):
    inputs = prompt()
    expected = generate(encoder_decoder(), inputs).sequences
    with explain() as report:
        result = generate(compiled(encoder_decoder(), sparsity=0.0), inputs, **how)
    assert torch.equal(result.sequences, expected)
    assert [entry.name for entry in report.matched] == ["decoder.block.0.layer.0.SelfAttention"]
    assert [entry.name for entry in report.missed] == ["decoder.block.0.layer.1.EncDecAttention"]
    cache = result.past_key_values
    assert isinstance(cache.self_attention_cache.layers[0].keys, CompressedKV)
    assert not isinstance(cache.cross_attention_cache.layers[0].keys, CompressedKV)
