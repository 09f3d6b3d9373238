"""Several query tokens over a compressed cache: a step that equals one by one, or a longer one that is dense."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models import BufferModel, TupleModel, hf_model, prompt
from mustafar_compile import CompressedKV, explain
from nightly import at_night
from reference import pruned_cache, pruned_generation, reference_attention

pytestmark = pytest.mark.usefixtures("no_grad", "uncompiled")
WINDOW = 4
OPTIONS = {"key_sparsity": 0.5, "value_sparsity": 0.5, "window": WINDOW}


class Growing(TupleModel):
    """A tuple that grows, under a causal mask."""

    def step(self, x, past, start):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mask = torch.arange(k.shape[2]) <= torch.arange(x.shape[1]).unsqueeze(1) + start
        return self.merge(self.attend(q, k, v, mask)), (k, v)

    def attend(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Shared(Growing):
    """The same, and a second attention reads what grows."""

    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) + super().attend(q.flip(-1), k, v, mask)


class Static(BufferModel):
    """A buffer of the caller, written at positions that stand side by side."""

    def step(self, x, past, start):
        return super().step(x, torch.arange(x.shape[1]) + start), None


class Scattered(BufferModel):
    """The same, but nothing in the graph says that the positions stand side by side."""

    def step(self, x, past, start):
        return super().step(x, past), None


def feed(step, x, counts):
    """Outputs of ``step`` for the tokens of x [B, T, E], ``counts`` at a time."""
    outputs, past, start = [], None, torch.tensor([0])
    for part in x.split(counts, dim=1):
        out, past = step(part, past, start)
        outputs.append(out)
        start = start + part.shape[1]
    return torch.cat(outputs, 1), past


def compiled(model):
    return torch.compile(model.step, backend="mustafar", options=OPTIONS)


@pytest.mark.parametrize("form", [Static, *at_night([Growing, Shared])])
def test_a_step_of_several_tokens_equals_one_by_one(form):
    torch.manual_seed(0)
    model, x = form(), torch.randn(2, 26, 32)
    one_by_one, _ = feed(compiled(model), x, [9] + [1] * 17)
    torch._dynamo.reset()
    with explain() as report:
        together, _ = feed(compiled(model), x, [9, 1, 3, 4, 2, 4, 1, 2])
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")] * (2 if form is Shared else 1)
    assert report.graphs <= 4


def test_more_tokens_than_a_step_takes_are_attended_densely_and_compressed():
    torch.manual_seed(0)
    model, x = Growing(), torch.randn(2, 34, 32)
    expected, _ = feed(compiled(model), x, [9, 1, 3, 20, 1])
    torch._dynamo.reset()
    step = compiled(model)
    feed(step, x[:, :19], [9, 1, 3, 4, 2])  # a graph for any number of tokens
    with explain() as report:
        actual, past = feed(step, x, [9, 1, 3, 20, 1])
    assert report.graphs >= 1, "20 tokens ran in the graph for at most 16"
    torch.testing.assert_close(actual, expected)
    assert isinstance(past[0], CompressedKV)


def test_positions_that_may_stand_anywhere_are_attended_densely():
    torch.manual_seed(0)
    model, x = Scattered(), torch.randn(2, 12, 32)
    step = compiled(model)
    step(x[:, :8], torch.arange(8), None)
    step(x[:, 8:9], torch.tensor([8]), None)
    with explain() as report:
        out, _ = step(x[:, 9:11], torch.tensor([11, 9]), None)
    expected, _ = model.step(x[:, 9:11], torch.tensor([11, 9]), None)
    torch.testing.assert_close(out, expected)
    assert [entry.phases for entry in report.matched] == [("prefill",)]


def lookup(model, inputs):
    return model.generate(**inputs, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=3)


def assisted(model, inputs):
    return model.generate(**inputs, max_new_tokens=16, do_sample=False, assistant_model=hf_model(seed=3))


@pytest.mark.parametrize("speculate", [lookup, *at_night([assisted])])
def test_speculative_decoding_gives_the_tokens_of_greedy_decoding(speculate):
    inputs = prompt(batch=1)
    with pruned_generation(0.5, 0.5, WINDOW):
        expected = hf_model(num_hidden_layers=1).generate(**inputs, max_new_tokens=16, do_sample=False)
    model = hf_model(num_hidden_layers=1)
    model.compile(backend="mustafar", options=OPTIONS)
    with explain() as report:
        assert torch.equal(speculate(model, inputs), expected)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")]


class Masked(TupleModel):
    """A tuple that grows, under the caller's mask [L, S]."""

    def step(self, x, past, mask):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)), (k, v)


class MaskedBuffer(BufferModel):
    """A buffer of the caller, under the caller's mask [L, S]."""

    def step(self, x, start, mask):
        self.causal = mask  # with a row for each position
        return super().step(x, torch.arange(x.shape[1]) + start)


PAST = 9
TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]])  # two drafts for the second token
PREFIX = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])  # three that see each other


def seen_by(rows):
    """A mask [L, S]: the first tokens are hidden from the second query, all else of the past is seen."""
    past = torch.ones(len(rows), PAST, dtype=torch.bool)
    past[1, :3] = False
    return torch.cat([past, rows.bool()], 1)


def under_mask(model, x, mask):
    """The oracle: each token sees what ``mask`` says, of a cache pruned as if it were the last."""
    q, k, v = (t.transpose(1, 2) for t in model.project(x))
    outputs = []
    for i, row in enumerate(mask):
        window = WINDOW + len(mask) - 1 - i
        outputs.append(reference_attention(q[:, :, PAST + i : PAST + i + 1], k, v, 0.5, 0.5, window, row[None]))
    return model.merge(torch.cat(outputs, 2))


@pytest.mark.parametrize("rows", [TREE, PREFIX], ids=["tree", "prefix"])
@pytest.mark.parametrize("form", [Masked, MaskedBuffer])
def test_the_mask_says_which_of_the_new_tokens_a_token_sees(form, rows):
    torch.manual_seed(0)
    model, x, mask = form(), torch.randn(2, PAST + 4, 32), seen_by(rows)
    k, v = (t[:, :PAST].transpose(1, 2) for t in model.project(x)[1:])
    if form is Masked:
        inputs = x[:, PAST:], (k.clone(), v.clone()), mask
    else:
        model.k_cache[:, :, :PAST], model.v_cache[:, :, :PAST] = k, v
        slots = model.k_cache.shape[2]
        inputs = x[:, PAST:], torch.tensor([PAST]), F.pad(mask, (0, slots - PAST - 4, PAST, slots - PAST - 4))
    with explain() as report:
        out = compiled(model)(*inputs)
    assert [entry.phases for entry in report.matched] == [("decode",)]
    torch.testing.assert_close(out[0] if form is Masked else out, under_mask(model, x, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [7, 10])
def test_a_long_step_reads_exactly_what_comes_back_to_the_window(tokens):
    """Found by fuzzing: behind a rewind of a static cache, it read the latest tokens pruned."""
    torch.manual_seed(0)
    room, start, count = 48, 7, 20
    past, new = (torch.randn(2, 1, 2, n, 16) for n in (room, count))
    query = torch.randn(1, 2, count, 16)
    visible = torch.arange(room) < torch.arange(start + 1, start + count + 1).unsqueeze(1)

    def step(query, new, key, value, position):
        key.index_copy_(2, position, new[0])
        value.index_copy_(2, position, new[1])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)

    caches = [CompressedKV.from_dense(x, 0.5, WINDOW, tokens) for x in past]
    result = torch.compile(step, backend="mustafar", options=OPTIONS)(
        query, new, *caches, torch.arange(start, start + count)
    )
    seen = [torch.cat([pruned_cache(x[:, :, :start], 0.5, WINDOW), y], 2) for x, y in zip(past, new, strict=True)]
    expected = reference_attention(query, *seen, 0, 0, 1, visible[:, : start + count])
    torch.testing.assert_close(result, expected)
