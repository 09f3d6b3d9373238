"""What users do with a live cache between compiled steps, and where they run them."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F

from models import TupleModel, hf_model, prompt, run_from
from mustafar_compile import CompressedKV, StaleCacheError, explain
from nightly import at_night
from reference import pruned_generation
from test_fuzz_cache import saved_and_loaded
from test_own_loops import WINDOW, assert_close, embeddings, options, oracle

pytestmark = [
    pytest.mark.usefixtures("new_notices", "no_grad", "uncompiled"),
    pytest.mark.filterwarnings("error:mustafar"),
]


def tuple_model(sparsity=0.5, seed=0):
    """A model and its compiled step."""
    torch.manual_seed(seed)
    model = TupleModel()
    return model, torch.compile(model.step, backend="mustafar", options=options(sparsity))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded, lambda past: [x.clone() for x in past]])
def test_one_past_continued_in_two_ways(duplicate):
    model, step = tuple_model()
    inputs, others = embeddings(steps=8), embeddings(steps=8, seed=1)
    outputs, past = run_from(step, inputs[:4])
    fork = duplicate(past)
    one, _ = run_from(step, inputs[4:], past)
    two, _ = run_from(step, others[4:], fork)
    assert_close(outputs + one, oracle(model, inputs, 0.5))
    assert_close(outputs + two, oracle(model, inputs[:4] + others[4:], 0.5))


@pytest.mark.parametrize("crop", [lambda x: x[:, :, :-3], lambda x: x.narrow(2, 0, x.shape[2] - 3)])
def test_a_past_cropped_and_continued(crop):
    """The ring still holds what comes back into the window."""
    model, step = tuple_model()
    inputs, others = embeddings(steps=8), embeddings(steps=8, seed=1)
    outputs, past = run_from(step, inputs[:6])
    more, _ = run_from(step, others[3:], [crop(x) for x in past])
    assert_close(outputs[:3] + more, oracle(model, inputs[:3] + others[3:], 0.5))
    with pytest.raises(StaleCacheError, match="was cropped to"):
        step(inputs[6], past)


def test_a_past_cropped_to_nothing_begins_anew():
    """Without a warning that it decompresses each time."""
    model, step = tuple_model()
    _, past = run_from(step, embeddings(steps=3))
    inputs = embeddings(steps=8, seed=1)
    outputs, _ = run_from(step, inputs, [x[:, :, :0] for x in past])
    assert_close(outputs, oracle(model, inputs, 0.5))


@pytest.mark.native
@pytest.mark.parametrize("rows", [[1, 0, 0], *at_night([[1]])], ids=["beams", "one ends early"])
def test_rows_of_a_batch_selected(rows):
    model, step = tuple_model()
    inputs = embeddings(steps=8)
    outputs, past = run_from(step, inputs[:5])
    chosen = [x[torch.tensor(rows)] for x in past]
    more, _ = run_from(step, [x[rows] for x in inputs[5:]], chosen)
    assert_close([x[rows] for x in outputs] + more, [x[rows] for x in oracle(model, inputs, 0.5)])


def test_two_models_take_turns():
    (first, one), (second, two) = tuple_model(seed=0), tuple_model(seed=1)
    inputs, pasts, outputs = embeddings(steps=8), [None, None], [[], []]
    for x in inputs:
        for i, step in enumerate((one, two)):
            out, pasts[i] = step(x, pasts[i])
            outputs[i].append(out)
    assert_close(outputs[0], oracle(first, inputs, 0.5))
    assert_close(outputs[1], oracle(second, inputs, 0.5))


class CausalPrompt(TupleModel):
    """Whether it is causal does not hang on a size.

    Dynamo's guards keep state while they look for aliases. Where threads meet there, one of them compiles the prompt
    again, with sizes left open: TupleModel's graph breaks then, and its prompt is not compressed.
    """

    def step(self, x, past):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=True)), (k, v)


def test_two_threads_with_one_compiled_model():
    torch.manual_seed(0)
    model = CausalPrompt()
    step = torch.compile(model.step, backend="mustafar", options=options(0.5))
    run_from(step, embeddings(steps=3))
    inputs, results = [embeddings(steps=20, seed=seed) for seed in (0, 1)], {}

    def generate(i):
        with torch.no_grad():
            results[i] = run_from(step, inputs[i])[0]

    threads = [threading.Thread(target=generate, args=(i,)) for i in (0, 1)]
    with explain() as report:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert report.calls == 2 * 21, "a report counts the calls of all threads"
    for i in (0, 1):
        assert_close(results[i], oracle(model, inputs[i], 0.5))


def test_inference_mode():
    model, step = tuple_model()
    inputs = embeddings(steps=8)
    expected = oracle(model, inputs, 0.5)
    with torch.inference_mode():
        outputs, past = run_from(step, inputs)
    assert_close(outputs, expected)
    assert type(past[0]) is CompressedKV


def test_a_cache_of_inference_mode_goes_on_outside_of_it():
    model, step = tuple_model()
    inputs = embeddings(steps=8)
    with torch.inference_mode():
        first, past = run_from(step, inputs[:5])
    with torch.no_grad():
        later, past = run_from(step, inputs[5:], past)
    assert_close(first + later, oracle(model, inputs, 0.5))
    assert not past[0].buffers[0].is_inference()


def test_autocast():
    model, step = tuple_model()
    inputs = embeddings(steps=8)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, past = run_from(step, inputs)
        expected = oracle(model, inputs, 0.5)
    assert (type(past[0]), past[0].dtype) == (CompressedKV, torch.bfloat16)
    torch.testing.assert_close(torch.cat(outputs, 1), torch.cat(expected, 1), rtol=0.05, atol=0.02)


# ------------------------------------------------------------------------------------------------- transformers


@pytest.mark.native
def test_beam_search():
    how = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    with pruned_generation(0.5, 0.5, WINDOW):
        expected = hf_model(num_hidden_layers=1).generate(**prompt(padded=True), **how)
    model = hf_model(num_hidden_layers=1)
    model.compile(backend="mustafar", options=options(0.5))
    with explain() as report:
        result = model.generate(**prompt(padded=True), **how, return_dict_in_generate=True)
    assert torch.equal(result.sequences, expected)
    assert len(report.matched) == 1
    assert isinstance(result.past_key_values.layers[0].keys, CompressedKV)


@pytest.mark.native
def test_sequences_that_end_early():
    """The first token that a row generates ends it; the other row goes on."""
    inputs, how = prompt(), {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    with pruned_generation(0.5, 0.5, WINDOW):
        ends = hf_model(num_hidden_layers=1).generate(**inputs, **how)[0, -7].item()
        expected = hf_model(num_hidden_layers=1).generate(**inputs, **how, eos_token_id=ends)
    assert (expected == 0).any()
    model = hf_model(num_hidden_layers=1)
    model.compile(backend="mustafar", options=options(0.5))
    assert torch.equal(model.generate(**inputs, **how, eos_token_id=ends), expected)
