"""HF generate through the backend: tokens against eager (sparsity 0) and against the pruned oracle."""

from __future__ import annotations

import pytest
import torch

from compilers import without_compiler, without_inductor
from models import FAMILIES, full_attention_layers, hf_model, prompt
from mustafar_compile import CompressedKV, cache_stats, explain
from nightly import at_night, mostly_at_night
from pairwise import pairwise
from reference import pruned_generation

pytestmark = pytest.mark.usefixtures("no_grad")
WINDOW = 4
NEW_TOKENS = 14


def options(sparsity: float) -> dict:
    return {"key_sparsity": sparsity, "value_sparsity": sparsity, "window": WINDOW}


def oracle(model, inputs, sparsity: float, new_tokens: int = NEW_TOKENS):
    """Eager generation with the cache pruned by the contract; without pruning at sparsity 0."""
    if not sparsity:
        return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    with pruned_generation(sparsity, sparsity, WINDOW):
        return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)


def generate(model, inputs, new_tokens: int = NEW_TOKENS, **how):
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, **how)


def check_generation(model, inputs, sparsity, graphs, **how):
    """Generate twice; the second call must compile nothing."""
    expected = oracle(hf_like(model), inputs, sparsity)
    with explain() as report:
        first = generate(model, inputs, **how)
    assert torch.equal(first.sequences, expected)
    assert len(report.matched) == full_attention_layers(model)
    assert len(report.missed) == model.config.num_hidden_layers - full_attention_layers(model)
    assert all("sliding window" in entry.reason for entry in report.missed)
    assert report.graphs <= graphs
    with explain() as again:
        second = generate(model, inputs, **how)
    assert torch.equal(second.sequences, expected)
    assert again.graphs == 0
    assert again.calls > 0
    return first, report


def hf_like(model):
    """The same model, not compiled."""
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    twin.generation_config = model.generation_config
    return twin


def cases(cache):
    """Families and sparsities for one kind of cache; over both kinds, any two of the three meet."""
    chosen = pairwise(FAMILIES, (0.0, 0.5), ("dynamic", "static"))
    return [*((family, sparsity) for family, sparsity, kind in chosen if kind == cache), ("llama", 0.7)]


@pytest.mark.parametrize(("family", "sparsity"), mostly_at_night(cases("dynamic")[::-1], 1))
def test_dynamic_cache(family, sparsity):
    model = hf_model(family)
    with without_compiler():
        model.compile(backend="mustafar", options=options(sparsity))
        result, _ = check_generation(model, prompt(padded=sparsity == 0.5), sparsity, graphs=3)
    assert isinstance(result.past_key_values.layers[-1].keys, CompressedKV)


@pytest.mark.parametrize(("family", "sparsity"), mostly_at_night(cases("static")[::-1], 1))
def test_static_cache_with_compiled_prefill(family, sparsity):
    model = hf_model(family)
    with without_compiler():
        model.compile(backend="mustafar", options=options(sparsity))
        inputs = prompt(padded=sparsity == 0.5)
        result, _ = check_generation(model, inputs, sparsity, graphs=2, cache_implementation="static")
    assert isinstance(result.past_key_values.layers[-1].keys, CompressedKV)


@pytest.mark.parametrize(("family", "sparsity"), [("llama", 0.5), *at_night([("gpt_neox", 0.0), ("gemma3_text", 0.7)])])
def test_static_cache_with_eager_prefill_and_compiled_decode(family, sparsity):
    from transformers import CompileConfig

    model = hf_model(family)
    config = CompileConfig(backend="mustafar", options=options(sparsity), mode=None)
    config._compile_all_devices = True  # transformers compiles on GPUs only unless told
    with without_compiler():
        how = {"cache_implementation": "static", "compile_config": config}
        result, _ = check_generation(model, prompt(padded=sparsity == 0.5), sparsity, graphs=2, **how)
    stats = cache_stats(result.past_key_values)
    assert stats.stored_bytes > stats.dense_bytes, "the caller's dense cache is still there and must be counted"


@pytest.mark.nightly  # test_generated_code goes all the way, too
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_inductor_generates_the_same_tokens(cache):
    model = hf_model(num_hidden_layers=1 if cache == "static" else 6)  # of six, most are compiled as one
    torch._dynamo.reset()
    model.compile(backend="mustafar", options=options(0.5))
    how = {"cache_implementation": "static"} if cache == "static" else {}
    check_generation(model, prompt(padded=True), 0.5, graphs=3 if cache == "dynamic" else 2, **how)


def test_compiled_forward_reaches_generate():
    model = hf_model(num_hidden_layers=1)
    expected = oracle(model, prompt(), 0.5)
    with without_compiler(), explain() as report:
        model.forward = torch.compile(model.forward, backend="mustafar", options=options(0.5))
        assert torch.equal(generate(model, prompt()).sequences, expected)
    assert len(report.matched) == 1


def test_optimized_module_does_not_reach_generate_and_the_report_says_so():
    model = hf_model()
    with without_compiler(), pytest.warns(UserWarning, match="calls the original module"), explain() as report:
        torch.compile(model, backend="mustafar").generate(**prompt(), max_new_tokens=2, do_sample=False)
    assert report.graphs == 0
    assert "torch.compile(model).generate()" in str(report)


def test_prompt_of_one_token():
    model = hf_model(num_hidden_layers=1)
    inputs = prompt(length=1)
    expected = oracle(hf_model(num_hidden_layers=1), inputs, 0.5)
    with without_compiler():
        model.compile(backend="mustafar", options=options(0.5))
        assert torch.equal(generate(model, inputs).sequences, expected)


def test_a_growing_cache_compiles_once_for_all_lengths():
    model = hf_model(num_hidden_layers=1)
    expected = oracle(hf_model(num_hidden_layers=1), prompt(length=40), 0.5, new_tokens=60)
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options=options(0.5))
        result = generate(model, prompt(length=40), new_tokens=60)
    assert torch.equal(result.sequences, expected)
    assert report.graphs <= 3
    keys = result.past_key_values.layers[0].keys
    assert keys.capacity > 64, "the cache should have grown during generation"


def test_second_turn_on_a_compressed_cache():
    """A long prompt on top of a compressed cache is attended densely and stored compressed again."""
    inputs = prompt()
    follow_up = torch.randint(1, 100, (2, 17), generator=torch.Generator().manual_seed(5))

    def chat(model):
        first = generate(model, inputs)
        ids = torch.cat([first.sequences, follow_up], dim=1)
        second = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        return generate(model, second, new_tokens=8)

    with pruned_generation(0.5, 0.5, WINDOW):
        expected = chat(hf_model(num_hidden_layers=1)).sequences
    model = hf_model(num_hidden_layers=1)
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options=options(0.5))
        result = chat(model)
    assert torch.equal(result.sequences, expected)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")]
    assert cache_stats(result.past_key_values).compressed_tensors == 2


@pytest.mark.nightly
def test_static_caches_whose_sizes_all_change():
    """From the second on, Dynamo has symbols for them; the third must not be taken for the second."""
    model = hf_model()
    with without_inductor(), explain() as report:
        model.compile(backend="mustafar", options=options(0.5))
        for batch, length, new_tokens in ((2, 9, 23), (3, 20, 47), (4, 33, 70)):
            inputs = prompt(batch, length)
            result = generate(model, inputs, new_tokens, cache_implementation="static")
            assert torch.equal(result.sequences, oracle(hf_like(model), inputs, 0.5, new_tokens))
            assert cache_stats(result.past_key_values).compressed_tensors == 4
    assert len(report.matched) == 2


@pytest.mark.nightly  # by day test_release.py resets caches, and fuzzing does
def test_static_cache_used_again_after_reset():
    from transformers import StaticCache

    model = hf_model(num_hidden_layers=1)
    expected = [oracle(hf_model(num_hidden_layers=1), prompt(seed=seed), 0.5) for seed in (1, 2)]
    cache = StaticCache(config=model.config, max_cache_len=32)
    with without_compiler():
        model.compile(backend="mustafar", options=options(0.5))
        for seed, tokens in zip((1, 2), expected, strict=True):
            assert torch.equal(generate(model, prompt(seed=seed), past_key_values=cache).sequences, tokens)
            cache.reset()


def test_decode_compiled_over_a_cache_that_eager_code_filled():
    model, inputs = hf_model(num_hidden_layers=1), prompt()
    expected = oracle(hf_model(num_hidden_layers=1), inputs, 0.5)
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache)
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options=options(0.5))
        token, tokens = expected[:, 9:10], [inputs["input_ids"]]
        for _ in range(NEW_TOKENS):
            tokens.append(token)
            mask = torch.ones(2, sum(t.shape[1] for t in tokens), dtype=torch.long)
            token = model(token, past_key_values=cache, attention_mask=mask).logits[:, -1].argmax(-1, keepdim=True)
    assert torch.equal(torch.cat(tokens, 1), expected)
    assert len(report.matched) == 1
    assert isinstance(cache.layers[0].keys, CompressedKV)


@pytest.mark.parametrize("dtype", [torch.float16, *at_night([torch.bfloat16])])
def test_half_precision_models_run_compressed(dtype):
    model = hf_model(num_hidden_layers=1).to(dtype)
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options=options(0.5))
        result = generate(model, prompt())
    assert len(report.matched) == 1
    assert result.past_key_values.layers[0].keys.dtype == dtype


@pytest.mark.nightly  # by day test_layers.py skips layers
def test_skipped_layers_stay_dense():
    model = hf_model()
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options=options(0.5) | {"skip_layers": [0]})
        result = generate(model, prompt())
    layers = result.past_key_values.layers
    assert not isinstance(layers[0].keys, CompressedKV)
    assert isinstance(layers[1].keys, CompressedKV)
    assert [entry.reason for entry in report.missed] == ["layer 0 is listed in skip_layers"]


@pytest.mark.nightly  # by day presets differ so, in test_coded_models.py
def test_keys_and_values_have_sparsities_of_their_own():
    model, inputs = hf_model(num_hidden_layers=1), prompt()
    with pruned_generation(0.7, 0.0, WINDOW):
        expected = generate(hf_model(num_hidden_layers=1), inputs).sequences
    with without_compiler():
        model.compile(backend="mustafar", options={"key_sparsity": 0.7, "value_sparsity": 0.0, "window": WINDOW})
        result = generate(model, inputs)
    layer = result.past_key_values.layers[0]
    assert torch.equal(result.sequences, expected)
    assert layer.keys.format.kept == 8
    assert layer.values.format.kept == 16
