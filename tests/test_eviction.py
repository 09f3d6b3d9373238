"""Tokens are evicted after the prompt, then what is left of the cache is compressed: against eager eviction."""

from __future__ import annotations

import pytest
import torch

from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import CompressedKV, explain
from nightly import at_night
from presses import SmallestKeys
from reference import pruned_generation

pytestmark = pytest.mark.usefixtures("no_grad")
WINDOW, PROMPT, KEPT, NEW_TOKENS = 4, 40, 8, 8


def generate(model, press=None):
    inputs = prompt(batch=1, length=PROMPT)
    how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    if press is None:
        return model.generate(**inputs, **how)
    with press(model):
        return model.generate(**inputs, **how)


def expected(press=None, sparsity: float = 0.0, **changes):
    with pruned_generation(sparsity, sparsity, WINDOW):
        return generate(hf_model(**changes), press).sequences


@pytest.mark.parametrize(("sparsity", "breaks"), [(0.7, False), *at_night([(0.0, False), (0.7, True), (0.0, True)])])
def test_a_press_comes_before_ours_and_is_heeded_whenever_it_is_there(sparsity, breaks):
    """A prompt with hooks is another graph, though Dynamo by default guards on hooks only where there are some."""
    press = SmallestKeys(KEPT, breaks)
    tokens = {
        pressed: expected(press if pressed else None, sparsity, num_hidden_layers=1, seed=1)
        for pressed in (False, True)
    }
    assert not torch.equal(tokens[False], tokens[True])
    model = hf_model(num_hidden_layers=1, seed=1)
    with without_compiler():
        model.compile(
            backend="mustafar", options={"key_sparsity": sparsity, "value_sparsity": sparsity, "window": WINDOW}
        )
        for pressed in (False, True, False, True):
            with explain() as report:
                result = generate(model, press if pressed else None)
            assert torch.equal(result.sequences, tokens[pressed])
            assert report.calls
            assert not report.notices
            assert not report.graphs or len(report.matched) == 1
            for layer in result.past_key_values.layers:
                assert isinstance(layer.keys, CompressedKV)
                assert layer.keys.shape[2] == (KEPT if pressed else PROMPT) + NEW_TOKENS - 1


def test_a_pressed_prompt_waits_for_its_next_step():
    model = hf_model(num_hidden_layers=1, seed=1)
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options={"window": WINDOW})
        with SmallestKeys(KEPT)(model):
            model(**prompt(batch=1, length=PROMPT))
    assert [entry.reason for entry in report.missed] == [
        "a hook on its module is given the cache of the prompt, which the next step compresses"
    ]
    assert not report.notices
