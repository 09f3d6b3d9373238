"""Caches in [B, S, H, D], as models for flash attention keep them: growing ones, and static ones that a graph makes."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F

from models import TokensFirstModel, pruned_steps, run_from
from mustafar_compile import CompressedKV, StaleCacheError, cache_stats, explain
from reference import pruned_cache, reference_attention
from test_fuzz_cache import saved_and_loaded
from test_own_loops import assert_close

pytestmark = pytest.mark.usefixtures("new_notices", "seeded", "no_grad", "uncompiled")
WINDOW, SLOTS = 4, 40
OPTIONS = {"key_sparsity": 0.5, "value_sparsity": 0.5, "window": WINDOW}
ATTENTION = functools.partial(reference_attention, **OPTIONS)


def embeddings(*counts, batch=2):
    return [torch.randn(batch, count, 32) for count in counts]


def compiled(model):
    return torch.compile(model.step, backend="mustafar", options=OPTIONS)


class RoomModel(TokensFirstModel):
    """The first step makes a buffer for all tokens, later ones write into it."""

    def step(self, x, past, start=0):
        q, k, v = self.project(x)
        if past is None:
            past = tuple(new.new_zeros(new.shape[0], SLOTS, *new.shape[2:]) for new in (k, v))
        for cache, new in zip(past, (k, v), strict=True):
            cache[:, start : start + x.shape[1]] = new
        q, k, v = (t.transpose(1, 2) for t in (q, *past))
        mask = torch.arange(SLOTS) <= torch.arange(start, start + x.shape[1]).unsqueeze(1)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)), past


@pytest.mark.parametrize(("prefill", "batch", "kv_heads"), [(7, 1, 1), (1, 2, 2)])
def test_a_growing_cache(prefill, batch, kv_heads):
    model, inputs = TokensFirstModel(kv_heads=kv_heads), embeddings(prefill, *[1] * 4, batch=batch)
    with explain() as report:
        outputs, past = run_from(compiled(model), inputs)
    assert_close(outputs, pruned_steps(model, inputs, ATTENTION))
    assert [(entry.form, entry.phases) for entry in report.matched] == [("dynamic (cat)", ("prefill", "decode"))]
    assert not report.missed
    assert all(isinstance(x, CompressedKV) and x.shape == (batch, prefill + 4, kv_heads, 16) for x in past)
    assert cache_stats(past).tokens == prefill + 4


def test_one_token_of_one_head_tells_no_order():
    """So the second step finds tokens where it took heads to be: right, but dense once."""
    model, inputs = TokensFirstModel(kv_heads=1), embeddings(1, 1, 1)
    with pytest.warns(UserWarning, match="along a dimension that is not that of its tokens"), explain() as report:
        outputs, past = run_from(compiled(model), inputs)
    assert_close(outputs, pruned_steps(model, inputs, ATTENTION))
    assert report.graphs == 3
    assert past[0].shape == (2, 3, 1, 16)
    assert past[0].tokens_dim == 1


def test_a_dense_past_and_a_longer_prompt_on_top():
    """What an eager prompt left is compressed by the first step, and a second prompt compresses it again."""
    model, inputs = TokensFirstModel(), embeddings(7, 1, 20)
    step = compiled(model)

    def masked(x, past):
        """A longer prompt, which has to know what it may attend to."""
        q, k, v = model.project(x)
        k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        mask = torch.ones(x.shape[1], k.shape[1], dtype=torch.bool).tril(past[0].shape[1])
        q, *cached = (t.transpose(1, 2) for t in (q, k, v))
        return model.merge(F.scaled_dot_product_attention(q, *cached, attn_mask=mask, enable_gqa=True)), (k, v)

    _, past = model.step(inputs[0], None)
    _, past = run_from(step, inputs[1:2], past)
    seen = [x.dense() for x in past]
    out, past = torch.compile(masked, backend="mustafar", options=OPTIONS)(inputs[2], past)
    torch.testing.assert_close(out, masked(inputs[2], seen)[0], rtol=1e-5, atol=1e-6)
    assert all(isinstance(x, CompressedKV) and x.shape == (2, 28, 2, 16) for x in past)


def test_a_static_cache_that_the_graph_makes():
    model, inputs = RoomModel(), embeddings(7, *[1] * 6)
    step, outputs, past = compiled(model), [], None
    with explain() as report:
        for start, x in zip((0, *range(7, 13)), inputs, strict=True):
            out, past = step(x, past, start)
            outputs.append(out)
    assert_close(outputs, pruned_steps(model, inputs, ATTENTION))
    assert [(entry.form, entry.phases) for entry in report.matched] == [("static (slice write)", ("prefill", "decode"))]
    assert all(isinstance(x, CompressedKV) and x.shape == (2, SLOTS, 2, 16) for x in past)
    assert (past[0].counts[:, 0] == 13).all()


def test_copies_and_crops_go_on():
    model, inputs, others = TokensFirstModel(), embeddings(7, 1, 1, 1), embeddings(1, 1)
    step = compiled(model)
    outputs, past = run_from(step, inputs)
    expected = pruned_steps(model, inputs[:2] + others, ATTENTION)
    for one in (copy.deepcopy(past), past):
        more, _ = run_from(step, others, [x[:, :-2] for x in one])
        assert_close(outputs[:2] + more, expected)
    with pytest.raises(StaleCacheError, match="of 10 tokens was cropped to 8"):
        step(others[0], past)


def cache(grows=True):
    """A cache of 11 tokens, with room for 11 where it is static, and what it stands for."""
    rows = torch.randn(2, 3, 11, 16)
    kv = CompressedKV.from_dense(rows, 0.5, WINDOW, None if grows else 11)
    kv = CompressedKV.from_buffers(kv.format, kv.buffers, 11, grows, tokens_dim=1)
    return kv, pruned_cache(rows, 0.5, WINDOW).transpose(1, 2).contiguous()


COMPRESSED = {
    "clone": torch.clone,
    "saved and loaded": saved_and_loaded,
    "rows": lambda x: x[1:],
    "a crop": lambda x: x[:, :5],
    "index_select": lambda x: x.index_select(0, torch.tensor([1, 0])),
    "repeat": lambda x: x.repeat_interleave(2, 0),
    "cat": lambda x: torch.cat([x, x]),
}
DENSE = {
    "transpose": lambda x: x.transpose(1, 2),
    "heads": lambda x: x[:, :, :2],
    "cat": lambda x: torch.cat([x, x], 1),
}


@pytest.mark.parametrize("change", COMPRESSED.values(), ids=COMPRESSED)
def test_what_acts_on_the_compressed_form(change):
    kv, expected = cache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = change(kv)
    expected = change(expected)
    assert isinstance(result, CompressedKV)
    assert (result.shape, result.stride()) == (expected.shape, expected.contiguous().stride())
    if result.tokens == 11:
        assert torch.equal(result.dense(), expected)


@pytest.mark.parametrize("change", DENSE.values(), ids=DENSE)
def test_what_decompresses(change):
    kv, expected = cache()
    assert (kv.shape, kv.stride()) == (expected.shape, expected.stride())
    with pytest.warns(UserWarning, match="decompresses"):
        result = change(kv)
    assert not isinstance(result, CompressedKV)
    assert torch.equal(result + 0, change(expected))


@pytest.mark.filterwarnings("ignore:mustafar")
def test_a_write_into_a_static_cache():
    kv, expected = cache(grows=False)
    rows, position = torch.randn(2, 2, 3, 16), torch.tensor([9, 10])
    kv.index_copy_(1, position, rows)
    exact = expected.index_copy(1, position, rows).transpose(1, 2)
    assert torch.equal(kv.dense(), pruned_cache(exact, 0.5, WINDOW).transpose(1, 2))


def test_heads_that_join_a_cache_are_no_tokens():
    """A cache in [B, H, S, D] and new heads along dimension 1."""
    past = CompressedKV.from_dense(torch.randn(2, 2, 11, 16), 0.5, WINDOW)

    def step(q, k, past):
        keys = torch.cat([past, k], 1)
        return F.scaled_dot_product_attention(q, keys.transpose(1, 2), keys.transpose(1, 2)), keys

    inputs = torch.randn(2, 11, 1, 16), torch.randn(2, 1, 11, 16)
    expected = step(*inputs, past.dense())
    with explain() as report, pytest.warns(UserWarning, match="decompresses"):
        actual = torch.compile(step, backend="mustafar", options=OPTIONS)(*inputs, past)
    assert [entry.reason for entry in report.missed] == [
        "new tokens join the compressed cache along a dimension that is not that of its tokens"
    ]
    for mine, other in zip(actual, expected, strict=True):
        assert not isinstance(mine, CompressedKV)
        torch.testing.assert_close(mine, other)
