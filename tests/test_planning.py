"""What is said of a model from its config alone: it must be what the model does once it has its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from architectures import CAUSAL, build
from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import cache_stats
from mustafar_compile.planning.alike import leave_out_alike
from mustafar_compile.planning.fake import forward, without_memory
from mustafar_compile.planning.footprint import BATCH, CONTEXT, CacheTensor, Footprint, measure
from mustafar_compile.planning.layers import explain_config
from mustafar_compile.planning.live_bytes import LiveBytes
from mustafar_compile.planning.memory import OUTSIDE, Plan, compressed_plan, dense_plan
from nightly import at_night, mostly_at_night

SLIDING = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 6,
}


SIZES = {"num_hidden_layers": 2, "intermediate_size": 2048}


@pytest.fixture(scope="module")
def footprint() -> Footprint:
    return measure(hf_model(**SIZES).config, torch.float32)


@pytest.fixture(scope="module")
def plans(footprint) -> list[Plan]:
    return [dense_plan(footprint, 100), compressed_plan(footprint, {"key_sparsity": 0.7}, 1000)]


def test_what_is_alive_is_counted():
    with without_memory():
        old = torch.empty(100, dtype=torch.uint8)
        with LiveBytes() as meter:
            first = old + 1
            second = first[10:].view(-1)  # no memory of its own, and it keeps that of the first
            del first
            third = torch.cat([second, old.view(-1)])
            assert (meter.live, meter.peak) == (290, 290)
            del second
            assert (meter.live, meter.peak) == (190, 290)
            del third
            assert (meter.live, meter.peak) == (0, 290)


def numbers_left_out(model, policy_of=lambda layer: None, **given) -> list[int]:
    return [layer.number for layer in leave_out_alike(model, lambda: forward(model, 1, 2), policy_of, **given)]


def test_layers_are_left_out_only_if_nothing_tells_them_apart():
    def other_attribute(model):
        model.model.layers[2].self_attn.scaling = 2.0

    def other_shape(model):
        model.model.layers[2].mlp.up_proj = torch.nn.Linear(64, 64, bias=True)

    def other_class(model):
        model.model.layers[2].mlp = type("Mlp", (torch.nn.Identity,), {})()

    def other_place(model):
        model.config.of_each_layer = [1, 1, 2, 1]

    assert numbers_left_out(hf_model(num_hidden_layers=4)) == [1, 2, 3]
    assert numbers_left_out(hf_model(num_hidden_layers=4), kept=3) == [3]
    for change in (other_attribute, other_shape, other_class, other_place):
        model = hf_model(num_hidden_layers=4)
        change(model)
        assert numbers_left_out(model) == [1, 3], change
    assert numbers_left_out(hf_model(num_hidden_layers=4), lambda layer: layer > 1) == [1, 3]


# Of mamba2's cache, which has no attention, transformers cannot tell the length.
@pytest.mark.parametrize("name", at_night(name for name in CAUSAL if name != "mamba2"))
def test_layers_that_are_alike_are_as_if_they_were_traced(name):
    config = hf_model(name, **SLIDING).config if name == "gemma3_text" else build(name, "eager").config
    given = {"context": 48, "dtype": torch.bfloat16}
    options = {"key_sparsity": 0.7, "skip_layers": [0]}
    quick, _ = explain_config(config, options, **given)
    every, _ = explain_config(config, options, **given, every_layer=True)
    assert quick == every
    if name == "gemma3_text":
        assert [bool(entry.reason) for entry in quick] == [True, False, False]


def test_no_setting_is_asked_of_a_model_that_is_none():
    from transformers import T5Config

    with pytest.raises(ValueError, match="T5"):
        explain_config(T5Config(), {})
    with pytest.raises(ValueError, match="sparsity"):
        explain_config(hf_model().config, {"sparsity": 0.5})


def activations(model, tokens: int) -> int:
    """Of a prompt of two rows."""
    with torch.no_grad(), LiveBytes() as meter:
        cache = forward(model, 2, tokens, masked=False).past_key_values
    return meter.peak - cache_stats(cache).stored_bytes


@pytest.mark.parametrize("tokens", [100, 1500])
def test_activations_are_those_of_the_model_with_its_weights(footprint, tokens):
    expected = activations(hf_model(**SIZES), tokens)
    assert footprint.prompt.subs({BATCH: 2, CONTEXT: tokens}) == pytest.approx(expected, rel=0.02)


def test_a_layer_that_slides_is_masked_in_prompts_as_long_as_its_window():
    model = hf_model("mistral", num_hidden_layers=1, sliding_window=1100)
    prompt = measure(model.config, torch.float32).prompt
    for tokens in (200, 1099, 1100, 1500):
        expected = activations(model, tokens)
        assert prompt.subs({BATCH: 2, CONTEXT: tokens}) == pytest.approx(expected, rel=0.02), tokens


def allocated(call: Callable[[], object], folder: Path) -> int:
    """The most bytes that stand at one time in a call, on a CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    del kept
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    live = most = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        most = max(most, live)
    return most


def test_a_compiled_prompt_allocates_what_is_foretold(footprint, tmp_path):
    """Layers are wide: attention has small buffers of its own on a CPU, which a plan for GPUs does not count."""
    model, batch, tokens = hf_model(**SIZES), 2, 512
    model.compile(backend="mustafar")
    with torch.no_grad():
        stored = cache_stats(forward(model, batch, tokens).past_key_values).stored_bytes
        most = allocated(lambda: forward(model, batch, tokens), tmp_path) - stored
    planned = footprint.compiled_prompt.subs({BATCH: batch, CONTEXT: tokens})
    assert 0.98 < planned / most < 1.2
    assert footprint.prompt.subs({BATCH: batch, CONTEXT: tokens}) / most > 1.2


def degrees(footprint: Footprint) -> list[int]:
    return [degree(x.subs(BATCH, 1)) for x in (footprint.prompt, footprint.compiled_prompt)]


def degree(x: sympy.Expr) -> int:
    return max(map(degree, x.args)) if isinstance(x, sympy.Max) else sympy.degree(x, CONTEXT)


def test_a_compiled_prompt_makes_nothing_of_its_square(footprint):
    assert degrees(footprint)[1] == 1


@pytest.mark.parametrize(
    ("family", "attention", "expected"), at_night([("gemma3_text", "sdpa", [2, 1]), ("llama", "eager", [2, 2])])
)
def test_only_what_its_graph_shows_has_the_square_of_a_compiled_prompt(family, attention, expected):
    """Masks of layers that slide are made where the prompt is not compiled; scores that are spelled out always are."""
    config = hf_model(family, attention=attention, num_hidden_layers=2).config
    assert degrees(measure(config, torch.float32)) == expected


@pytest.mark.parametrize("options", mostly_at_night([{"preset": "small", "window": 4, "skip_layers": [0]}, {}], 1))
def test_caches_are_those_of_a_generation(footprint, options):
    model, inputs = hf_model(**SIZES, max_position_embeddings=512), prompt(batch=2, length=60)
    with without_compiler():
        model.compile(backend="mustafar", options=options)
        out = model.generate(**inputs, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    plan = compressed_plan(footprint, options, new_tokens=8)  # the last token is not in the cache
    assert plan.parts(2, 60)["steps"]["cache"] == cache_stats(out.past_key_values).stored_bytes


def test_a_dense_cache_has_each_token_and_of_a_sliding_layer_its_window():
    full = CacheTensor(0, "key", 2, 8, torch.float16, None, True)
    sliding = CacheTensor(1, "key", 2, 8, torch.float16, 64, False)
    plan = dense_plan(Footprint(0, (full, sliding), *[sympy.Integer(0)] * 3, None, 2), 10)
    assert plan.parts(3, 90)["prompt"]["cache"] == 3 * 2 * 8 * 2 * (100 + 64)
    assert plan.parts(3, 20)["prompt"]["cache"] == 3 * 2 * 8 * 2 * (30 + 30)


@given(st.integers(1, 64), st.integers(1, 10**5), st.integers(1, 2**37))
@example(batch=1, context=1, memory=1)
def test_what_is_largest_fits_and_one_more_does_not(plans, batch, context, memory):
    for plan in plans:
        rows, tokens = plan.largest_batch(context, memory), plan.largest_context(batch, memory)
        assert rows == 0 or plan.peak(rows, context) + OUTSIDE <= memory
        assert plan.peak(rows + 1, context) + OUTSIDE > memory
        assert tokens == 0 or plan.peak(batch, tokens) + OUTSIDE <= memory
        assert plan.peak(batch, tokens + 1) + OUTSIDE > memory
        assert plan.largest_context(batch, memory, most=7) == min(tokens, 7)
        assert plan.peak(batch, context) == max(sum(x.values()) for x in plan.parts(batch, context).values())
