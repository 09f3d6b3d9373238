"""Layers with a sliding window: dense in every way of generating, whether or not the window is ever full."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from models import hf_model
from mustafar_compile import CompressedKV, explain
from mustafar_compile.patterns.graph.layers import stated_window
from nightly import at_night
from reference import pruned_generation

pytestmark = pytest.mark.usefixtures("no_grad", "uncompiled")
FAMILIES = ("gemma2", "gemma3_text", "gpt_oss", "cohere2")
SPARSITY, WINDOW = 0.7, 2
NEVER_FULL = 64
"""A sliding window longer than what is generated: most graphs treat such a layer like any other."""


def said_by(config, layer=0):
    return stated_window(SimpleNamespace(layer_idx=layer, config=SimpleNamespace(**config)))


HYBRID = {"layer_types": ["sliding_attention", "full_attention", "chunked_attention", "hybrid_sliding"]}
BOTH = {"sliding_window": 6, "attention_chunk_size": 8}
STATED = {
    "no config": (None, {}, 0),
    "no window": (None, {"sliding_window": None}, 0),
    "of all layers": (6, {"sliding_window": 6}, 5),
    "chunks of all layers": (8, {"attention_chunk_size": 8}, 5),
    "a sliding layer": (6, HYBRID | BOTH, 0),
    "a full one beside it": (None, HYBRID | BOTH, 1),
    "chunks": (8, HYBRID | BOTH, 2),
    "a sliding one with a recurrent state": (6, HYBRID | BOTH, 3),
    "each its own": (4, {"layer_types": 2 * ["sliding_attention"],
                         "per_layer_config": [SimpleNamespace(sliding_window=n) for n in (3, 4)]}, 1),
}  # fmt: skip


@pytest.mark.parametrize(("window", "config", "layer"), STATED.values(), ids=STATED)
def test_the_window_is_what_the_config_says_of_the_layer(window, config, layer):
    assert said_by(config, layer) == window


def test_no_module_says_nothing():
    assert stated_window(None) is None
    assert stated_window(SimpleNamespace(layer_idx=0)) is None


def hybrid(family, seed=2, **changes):
    """A model of a sliding and a full layer whose tokens depend on what is pruned."""
    changes = {"attention": "eager", "tie_word_embeddings": False, "sliding_window": NEVER_FULL} | changes
    model = hf_model(family, seed=seed, **changes)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def compiled(model):
    options = {"key_sparsity": SPARSITY, "value_sparsity": SPARSITY, "window": WINDOW}
    model.compile(backend="mustafar", options=options)
    return model


def static(config):
    return StaticCache(config=config, max_cache_len=32)


def recording(config):
    """What speculative decoding takes: it keeps all tokens until rejected ones are taken back."""
    cache = DynamicCache(config=config)
    cache.activate_past_recording()
    return cache


def unbounded(config):
    """What knows nothing of the model."""
    return DynamicCache()


PROMPTS = [
    ("gemma3_text", recording, [False, True]), ("mistral", static, 2 * [False]),
    *at_night([("gemma3_text", kind, [False, True]) for kind in (static, unbounded)]),
    *at_night([("mistral", recording, 2 * [False])]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "cache", "compressed"), PROMPTS)
def test_a_prompt_shorter_than_the_window_leaves_sliding_layers_dense(family, cache, compressed):
    model = compiled(hybrid(family, attention="sdpa"))
    past = model(torch.arange(1, 10)[None], past_key_values=cache(model.config), use_cache=True).past_key_values
    assert [isinstance(layer.keys, CompressedKV) for layer in past.layers] == compressed


@pytest.mark.nightly
@pytest.mark.parametrize("part", ["layer", "self_attn"])
def test_parts_that_are_compiled_by_themselves_know_their_layer(part):
    model = hybrid("gemma3_text", attention="sdpa")
    for layer in model.model.layers:
        compiled(layer if part == "layer" else layer.self_attn)
    past = generate(model, cache_implementation="static").past_key_values
    assert [isinstance(layer.keys, CompressedKV) for layer in past.layers] == [False, True]


def generate(model, **how):
    how = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True} | how
    return model.generate(torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 11, 12, 5, 6, 7]]), **how)


def assistant(family, **changes):
    model = hybrid(family, seed=1, **changes)
    model.generation_config.num_assistant_tokens = 2
    model.generation_config.num_assistant_tokens_schedule = "constant"
    return model


MODES = {
    "greedy": lambda family: {},
    "static": lambda family: {"cache_implementation": "static"},
    "lookup": lambda family: {"prompt_lookup_num_tokens": 2},
    "assisted": lambda family: {"assistant_model": assistant(family)},
    "unbounded": lambda family: {"past_key_values": unbounded(None)},
}


@pytest.mark.nightly
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_ways_of_generating_choose_the_tokens_of_dense_sliding_layers(family, mode):
    with pruned_generation(SPARSITY, SPARSITY, WINDOW):
        expected = generate(hybrid(family)).sequences
        all_pruned = generate(hybrid(family), past_key_values=unbounded(None)).sequences
    assert not torch.equal(expected, all_pruned)
    with explain() as report:
        result = generate(compiled(hybrid(family)), **MODES[mode](family))
    assert torch.equal(result.sequences, expected)
    assert [entry.layer for entry in report.matched] == [1]
    assert [entry.reason for entry in report.missed] == [f"cache is bounded by a sliding window of {NEVER_FULL}"]


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["lookup", "assisted"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_drafts_past_the_window_take_no_more_graphs_than_other_backends_make(family, mode):
    full = {"sliding_window": 6}
    with pruned_generation(SPARSITY, SPARSITY, WINDOW):
        expected = generate(hybrid(family, **full)).sequences
    how = {"assistant_model": compiled(assistant(family, **full))} if mode == "assisted" else MODES[mode](family)
    with explain() as report:
        result = generate(compiled(hybrid(family, **full)), **how)
    assert torch.equal(result.sequences, expected)
    assert not report.notices
    if isinstance(result.past_key_values.layers[0].cumulative_length, torch.Tensor):
        pytest.skip("transformers 5.17 counts tokens in a tensor after rejected drafts: graphs of any backend break")
    assert report.graphs <= 6
