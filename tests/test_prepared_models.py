"""Hugging Face models as ``prepare`` sets them up: what they generate, and what is compiled for it."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import explain, prepare
from mustafar_compile.backend import mustafar
from mustafar_compile.hugging_face import generate_over_static_caches
from mustafar_compile.lowering import ops
from reference import pruned_generation

pytestmark = pytest.mark.usefixtures("no_grad")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS, WINDOW = 23, 4


@pytest.fixture(scope="module")
def models():
    """The oracle and a prepared model; on a CPU set up as on a GPU."""
    plain = hf_model(num_hidden_layers=1).to(DEVICE)
    model = copy.deepcopy(plain)
    if DEVICE == "cuda":
        yield plain, prepare(model, window=WINDOW)
        return
    with without_compiler():
        generate_over_static_caches(model)
        model.compile(backend="mustafar", options={"window": WINDOW})
        yield plain, model


@given(left=st.lists(st.integers(0, 8), min_size=2, max_size=2), middle=st.booleans(), seed=st.integers(0, 9))
@example(left=[0, 0], middle=False, seed=0)
@example(left=[0, 0], middle=True, seed=0)
@example(left=[3, 0], middle=False, seed=0)
@settings(max_examples=12)
def test_a_prepared_model_generates_what_the_oracle_does(models, left, middle, seed):
    """With padding and without, whoever gives the mask."""
    inputs, how = prompt(seed=seed), {"max_new_tokens": 12, "do_sample": False}
    for row, count in enumerate(left):
        inputs["attention_mask"][row, :count] = 0
    inputs["attention_mask"][1, 4] = not middle
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    if inputs["attention_mask"].all() and seed % 2:
        del inputs["attention_mask"]
    plain, model = models
    with pruned_generation(0.5, 0.5, WINDOW):
        expected = plain.generate(**inputs, **how)
    assert torch.equal(model.generate(**inputs, **how), expected)


def test_a_prepared_model_compiles_prompt_and_step_and_no_more(models):
    _, model = models
    with explain() as report:
        for seed in range(3):
            model.generate(**{name: x.to(DEVICE) for name, x in prompt(seed=seed).items()}, max_new_tokens=12)
    assert report.graphs in (0, 2)  # another test may have been first
    assert report.calls


def test_a_mask_that_is_too_short_is_no_mask_of_ones(models):
    """It says nothing of the tokens behind it, which transformers then leaves out."""
    from transformers import StaticCache

    plain, model = models
    cache = StaticCache(model.config, max_cache_len=SLOTS)
    ids = torch.tensor([[5, 6, 7]], device=DEVICE)
    plain(ids, past_key_values=cache)
    for tokens, dims in ((3, 2), (4, None)):
        mask = torch.ones(1, tokens, dtype=torch.long, device=DEVICE)
        given = model.prepare_inputs_for_generation(ids[:, :1], attention_mask=mask, past_key_values=cache)
        mask = given.get("attention_mask")
        assert (None if mask is None else mask.dim()) == dims


@pytest.mark.parametrize("padded", [False, True])
def test_neither_prompt_nor_step_is_given_a_mask_of_rows(padded):
    """The prompt's would have the square of its length; a step makes one for all layers, if any is padded."""
    model, graphs = hf_model(), []

    def watch(gm, _):
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    generate_over_static_caches(model)
    model.compile(backend=functools.partial(mustafar, inner=watch))
    model.generate(**prompt(padded=padded), max_new_tokens=3)
    first, step = graphs
    sdpa = first.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    bands = first.find_nodes(op="call_function", target=ops.band_attention)
    assert len(bands) == 2 or not padded  # else transformers may see itself that attention is causal
    assert len(bands) + sum(node.args[3] is None for node in sdpa) == 2
    masks = {node.args[8] for node in step.find_nodes(op="call_function", target=ops.decode_attention)}
    assert len(masks) == 1
    assert (masks == {None}) == (not padded)


@pytest.mark.nightly
@pytest.mark.native
@pytest.mark.parametrize("layers", [1, 6])
def test_inductor_takes_caches_of_any_length(layers):
    """From the second length on there are symbols for them, of which a step without a mask has no tensor.

    Of six layers most are alike and compiled once.
    """
    torch._dynamo.reset()
    plain = hf_model(num_hidden_layers=layers)
    model = copy.deepcopy(plain)
    generate_over_static_caches(model)
    model.compile(backend="mustafar", options={"window": WINDOW})
    for length in (20, 30, 25):
        inputs, how = prompt(length=length), {"max_new_tokens": 4, "do_sample": False}
        with pruned_generation(0.5, 0.5, WINDOW):
            expected = plain.generate(**inputs, **how)
        assert torch.equal(model.generate(**inputs, **how), expected)
