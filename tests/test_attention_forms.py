"""Attention as people spell it: every form must match, in prefill and decode, and give what it gives over a pruned
cache. The oracle is the form itself, run eagerly on caches with the pruned elements set to zero."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from architectures import measure
from compilers import without_compiler
from models import TupleModel, pruned_steps, run_steps
from mustafar_compile import CompressedKV, _compat, explain
from nightly import at_night
from reference import pruned_cache

pytestmark = pytest.mark.usefixtures("no_grad")
HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM, WINDOW = 6, 2, 24, 16, 2
GROUP = HEADS // KV_HEADS  # 3: no power of two
SCALE = 0.3
LOWEST = torch.finfo(torch.float32).min


def spread(x):
    """[B, H, S, D] -> [B, Hq, S, D]."""
    return x.repeat_interleave(HEADS // x.shape[1], dim=1)


def grouped(q):
    """[B, Hq, L, D] -> [B, H, G, L, D]."""
    return q.unflatten(1, (KV_HEADS, GROUP))


def rows(x):
    """[B, H, S, D] -> [B * Hq, S, D]."""
    return spread(x).flatten(0, 1)


def weights(scores, like):
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(like.dtype)


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE, enable_gqa=True)


def sdpa_default_scale(q, k, v, mask):
    return F.scaled_dot_product_attention(q, spread(k), spread(v), mask)


def eager(q, k, v, mask):
    scores = q @ spread(k).transpose(2, 3) * SCALE + mask
    return F.dropout(weights(scores, q), p=0.1, training=False) @ spread(v)


def scaled_query(q, k, v, mask):
    return weights(mask + (q * SCALE) @ spread(k).transpose(2, 3), q) @ spread(v)


def all_in_float32(q, k, v, mask):
    scores = (q.float() * SCALE) @ spread(k).transpose(2, 3).float()
    return (F.softmax(scores + mask, dim=-1) @ spread(v).float()).to(q.dtype)


def scores_in_float32(q, k, v, mask):
    scores = (q @ spread(k).mT).float() / math.sqrt(HEAD_DIM)
    return weights(scores + mask, q) @ spread(v)


def scale_in_a_tensor(q, k, v, mask):
    scale = torch.tensor(HEAD_DIM, dtype=torch.float32).sqrt()
    return weights((q.float() @ spread(k).float().mT) / scale + mask, q) @ spread(v)


def five_dims(q, k, v, mask):
    scores = grouped(q) @ k.unsqueeze(2).mT * SCALE
    return (weights(scores + mask.unsqueeze(2), q) @ v.unsqueeze(2)).flatten(1, 2)


def five_dims_with_a_mask_for_each_head(q, k, v, mask):
    scores = grouped(q) @ k.unsqueeze(2).mT * SCALE
    bias = grouped(mask + torch.arange(HEADS).view(-1, 1, 1) * torch.linspace(-1, 1, mask.shape[-1]))
    return (weights(scores + bias, q) @ v.unsqueeze(2)).flatten(1, 2)


def einsum(q, k, v, mask):
    scores = torch.einsum("bhgqd,bhkd->bhgqk", grouped(q), k) * SCALE + mask[:, None]
    return torch.einsum("bhgqk,bhkd->bhgqd", weights(scores, q), v).flatten(1, 2)


def einsum_of_tokens_first(q, k, v, mask):
    q, k, v = (x.transpose(1, 2) for x in (q, spread(k), spread(v)))
    scores = torch.einsum("bkhd, bqhd -> bhqk", k, q) * SCALE + mask
    return torch.einsum("bhqk, bkhd -> bqhd", weights(scores, q), v).transpose(1, 2)


def bmm(q, k, v, mask):
    scores = torch.bmm(q.flatten(0, 1), rows(k).mT) * SCALE
    scores = scores.view(q.shape[0], HEADS, *scores.shape[1:]) + mask
    return torch.bmm(weights(scores, q).flatten(0, 1), rows(v)).view(*q.shape[:3], -1)


def bmm_all_through(q, k, v, mask):
    scores = torch.bmm(q.flatten(0, 1), rows(k).mT) * SCALE + mask.expand(-1, HEADS, -1, -1).flatten(0, 1)
    return torch.bmm(weights(scores, q), rows(v)).view(*q.shape[:3], -1)


def baddbmm(q, k, v, mask):
    slopes = torch.linspace(0.1, 1, HEADS).repeat(q.shape[0]).view(-1, 1, 1)
    alibi = (slopes * torch.arange(k.shape[2])).to(q.dtype)
    scores = torch.baddbmm(alibi, q.flatten(0, 1), rows(k).mT, beta=1.0, alpha=SCALE)
    scores = scores.view(q.shape[0], HEADS, *scores.shape[1:]) + mask
    return torch.bmm(weights(scores, q).flatten(0, 1), rows(v)).view(*q.shape[:3], -1)


def bias_before_the_scale(q, k, v, mask):
    alibi = torch.linspace(0.1, 1, HEADS).view(-1, 1, 1) * torch.arange(k.shape[2])
    return weights((q @ spread(k).mT + alibi) * SCALE + mask, q) @ spread(v)


def bias_taken_away(q, k, v, mask):
    distance = torch.arange(k.shape[2] - 1, -1, -1) * torch.linspace(0.1, 1, HEADS).view(-1, 1, 1)
    return weights(q @ spread(k).mT * SCALE - distance + mask, q) @ spread(v)


def masked_fill(q, k, v, mask):
    scores = (q @ spread(k).mT * SCALE).masked_fill(mask < 0, -math.inf)
    return weights(scores, q) @ spread(v)


def masked_fill_over_a_bias(q, k, v, mask):
    scores = q @ spread(k).mT * SCALE + torch.linspace(-1, 1, k.shape[2])
    return weights(scores.masked_fill(mask < 0, LOWEST), q) @ spread(v)


def where(q, k, v, mask):
    scores = q @ spread(k).mT * SCALE
    return weights(torch.where(mask < 0, torch.full([], -1e9), scores), q) @ spread(v)


def where_with_a_number(q, k, v, mask):
    scores = q @ spread(k).mT * SCALE
    return weights(torch.where(mask == 0, scores, LOWEST), q) @ spread(v)


def where_with_a_tensor_of_a_number(q, k, v, mask):
    """GPT-Neo."""
    scores = q.float() @ spread(k).float().mT * SCALE
    return weights(torch.where(mask == 0, scores, torch.tensor(LOWEST, dtype=scores.dtype)), q) @ spread(v)


def floored(q, k, v, mask):
    """XGLM: what the mask made infinite becomes the lowest float."""
    scores = torch.bmm(q.flatten(0, 1), rows(k).mT) * SCALE
    scores = scores.view(q.shape[0], HEADS, *scores.shape[1:]) + mask * 2
    scores = torch.max(scores, torch.full((), LOWEST)).flatten(0, 1)
    return torch.bmm(weights(scores, q), rows(v)).view(*q.shape[:3], -1)


def scaled_keys(q, k, v, mask):
    """Behind the cache, on both sides of the repetition."""
    k = spread(k / 4) * 4 * SCALE
    return F.scaled_dot_product_attention(q, k, spread(v), mask, scale=1.0)


def safe_softmax(q, k, v, mask):
    scores = q @ spread(k).mT * SCALE + mask
    return torch.ops.aten._safe_softmax(scores, -1) @ spread(v)


def softcap(q, k, v, mask):
    scores = torch.tanh(q @ spread(k).mT * SCALE / 2.0) * 2.0
    return weights(scores + mask, q) @ spread(v)


def sinks(q, k, v, mask):
    scores = q @ spread(k).mT * SCALE + mask
    column = torch.linspace(-1, 3, HEADS).reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    scores = torch.cat([scores, column], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return weights(scores, q)[..., :-1] @ spread(v)


def sinks_and_softcap(q, k, v, mask):
    scores = torch.tanh(q @ spread(k).mT * SCALE / 2.0) * 2.0 + mask
    column = torch.linspace(-1, 3, HEADS)[None, :, None, None].expand(q.shape[0], HEADS, q.shape[2], 1)
    return weights(torch.cat([scores, column], dim=-1), q)[..., :-1] @ spread(v)


def bias_from_the_query(q, k, v, mask):
    return weights(q @ spread(k).mT * SCALE + q.sum(-1, keepdim=True) * torch.arange(k.shape[2]) + mask, q) @ spread(v)


FORMS = [
    sdpa, sdpa_default_scale, eager, scaled_query, all_in_float32, scores_in_float32, scale_in_a_tensor, five_dims,
    five_dims_with_a_mask_for_each_head, einsum, einsum_of_tokens_first, bmm, bmm_all_through, baddbmm,
    bias_before_the_scale, bias_taken_away, masked_fill, masked_fill_over_a_bias, where, where_with_a_number,
    where_with_a_tensor_of_a_number, floored, scaled_keys, safe_softmax, softcap, sinks, sinks_and_softcap,
    bias_from_the_query,
]  # fmt: skip


def multi_query(q, k, v, mask):
    """One KV head, broadcast by the product."""
    return weights(q @ k.mT * SCALE + mask, q) @ v


def multi_query_by_einsum(q, k, v, mask):
    scores = torch.einsum("bhqd,bkd->bhqk", q, k.squeeze(1)) * SCALE + mask
    return torch.einsum("bhqk,bkd->bhqd", weights(scores, q), v.squeeze(1))


def case(queries, past, kv_heads=KV_HEADS, batch=2, dtype=torch.float32):
    """Queries, new keys and values, the past, and a causal mask that hides the first token of the first row."""
    torch.manual_seed(queries + past)
    q = torch.randn(batch, HEADS, queries, HEAD_DIM)
    k, v = (torch.randn(batch, kv_heads, past + queries, dim) for dim in (HEAD_DIM, VALUE_DIM))
    hidden = torch.ones(queries, past + queries, dtype=torch.bool).triu(past + 1).repeat(batch, 1, 1, 1)
    hidden[0, :, past:, 0] = past > 0  # a query that may attend to nothing is another matter
    mask = torch.zeros(hidden.shape).masked_fill(hidden, LOWEST)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    past_caches = (k[:, :, :past].clone(), v[:, :, :past].clone()) if past else None
    return q, k[:, :, past:].clone(), v[:, :, past:].clone(), past_caches, mask


def step(form):
    """``form`` over a cache that grows."""

    def forward(q, k, v, past, mask):
        if past is None:
            k, v = k * 1, v * 1  # a cache is made by the graph, it is no input
        else:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return form(q, k, v, mask), (k, v)

    return forward


def compiled(forward, inputs, sparsity=0.5):
    """What ``forward`` returns when compiled, and the report."""
    options = {"key_sparsity": sparsity, "value_sparsity": sparsity, "window": WINDOW}
    with without_compiler(), explain() as report:
        return *torch.compile(forward, backend="mustafar", options=options)(*inputs), report


def check_decode(form, inputs, sparsity=0.5, **tolerance):
    q, k, v, past, mask = inputs
    k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    out, caches, report = compiled(step(form), inputs, sparsity)
    assert [entry.phases for entry in report.matched] == [("decode",)], str(report)
    assert not report.missed
    assert all(isinstance(x, CompressedKV) for x in caches)
    expected = form(q, *(pruned_cache(x, sparsity, WINDOW) for x in (k, v)), mask)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, **tolerance)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_decode_step_equals_the_form_over_a_pruned_cache(form):
    check_decode(form, case(queries=1, past=9))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_prefill_is_exact_and_leaves_a_compressed_cache(form):
    inputs = case(queries=5, past=0)
    out, caches, report = compiled(step(form), inputs)
    assert [entry.phases for entry in report.matched] == [("prefill",)], str(report)
    torch.testing.assert_close(out, form(*inputs[:3], inputs[4]))
    for cache, dense in zip(caches, inputs[1:3], strict=True):
        assert isinstance(cache, CompressedKV)
        assert torch.equal(cache.dense(), pruned_cache(dense, 0.5, WINDOW))


@pytest.mark.parametrize("form", [multi_query, multi_query_by_einsum, eager, sdpa_default_scale])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_head_of_keys_for_all_queries(form, batch):
    check_decode(form, case(queries=1, past=9, kv_heads=1, batch=batch))


def a_sink_of_one_head(q, k, v, mask):
    column = torch.tensor([1.5]).view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    return weights(torch.cat([q @ k.mT * SCALE + mask, column], dim=-1), q)[..., :-1] @ v


@pytest.mark.parametrize("batch", [1, 2])
def test_one_query_head_and_its_sink(batch):
    q, *others = case(queries=1, past=9, kv_heads=1, batch=batch)
    check_decode(a_sink_of_one_head, (q[:, :1], *others))


@pytest.mark.parametrize("form", [sdpa, eager, all_in_float32, scores_in_float32, baddbmm, einsum])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(form, dtype):
    inputs = case(queries=1, past=9, dtype=dtype)
    if form is sdpa:
        inputs = (*inputs[:4], inputs[4].to(dtype))
    step = 16 * torch.finfo(dtype).eps
    check_decode(form, inputs, rtol=step, atol=step)


def sinks_dropped_before_grouping(q, k, v, mask):
    column = torch.linspace(-1, 3, HEADS).view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    scores = torch.cat([q @ spread(k).mT * SCALE + mask, column], dim=-1)
    by_group = weights(scores, q)[..., :-1].unflatten(1, (KV_HEADS, GROUP))
    return torch.einsum("bhgls,bhsd->bhgld", by_group, v).flatten(1, 2)


def test_asking_weights_for_a_symbolic_size_is_no_use_of_them():
    q, k, v, past, mask = inputs = case(queries=1, past=9)
    for tensor, tokens in ((past[0], 2), (past[1], 2), (mask, 3)):
        torch._dynamo.mark_dynamic(tensor, tokens)
    out, _, report = compiled(step(sinks_dropped_before_grouping), inputs)
    assert [entry.phases for entry in report.matched] == [("decode",)], str(report)
    dense = (pruned_cache(torch.cat(pair, dim=2), 0.5, WINDOW) for pair in zip(past, (k, v), strict=True))
    torch.testing.assert_close(out, sinks_dropped_before_grouping(q, *dense, mask))


def test_a_query_that_was_rounded_stays_so(monkeypatch):
    """As behind a rotation in float32: the kernels take queries in the dtype of the cache."""

    def rotated(q, k, v, mask):
        return eager((q.float().roll(1, -1) * SCALE).to(q.dtype), k, v, mask)

    dtypes = []

    def noting_dtypes(gm, _):
        (decode,) = gm.graph.find_nodes(op="call_function", target=torch.ops.mustafar.decode_attention.default)
        dtypes.append(decode.args[0].meta["val"].dtype)
        return gm

    with without_compiler(), monkeypatch.context() as inner:  # undone first, or Inductor would stay replaced
        inner.setattr(_compat.inductor, "compile_fx", noting_dtypes)
        torch.compile(step(rotated), backend="mustafar")(*case(queries=1, past=9, dtype=torch.bfloat16))
    assert dtypes == [torch.bfloat16]


AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}
ROUNDING = dict.fromkeys(("rtol", "atol"), 16 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("form", [sdpa, eager, scores_in_float32, five_dims, einsum, softcap, sinks])
def test_autocast_around_the_compiled_call(form):
    with torch.autocast(**AUTOCAST):
        check_decode(form, case(queries=1, past=9), **ROUNDING)


@pytest.mark.parametrize("form", [sdpa, eager, scores_in_float32, five_dims, einsum, softcap, sinks])
def test_autocast_inside_the_graph(form):
    """Also where it is switched off again."""

    def cast(q, k, v, mask):
        with torch.autocast(**AUTOCAST):
            out = form(q, k, v, mask)
            with torch.autocast("cpu", enabled=False):
                return out, out.float() @ torch.ones(out.shape[-1], 1)

    def forward(*inputs):
        (out, total), caches = step(cast)(*inputs)
        return out, total, caches

    q, k, v, past, mask = inputs = case(queries=1, past=9)
    out, total, caches, report = compiled(forward, inputs)
    assert [entry.phases for entry in report.matched] == [("decode",)], str(report)
    dense = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))
    expected, expected_total = cast(q, *(pruned_cache(x, 0.5, WINDOW) for x in dense), mask)
    assert all(isinstance(x, CompressedKV) and x.dtype == torch.float32 for x in caches)
    assert (out.dtype, total.dtype) == (expected.dtype, expected_total.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, expected, **ROUNDING)
    torch.testing.assert_close(total, expected_total, **ROUNDING)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_model_under_autocast(sparsity):
    """Its projections give bfloat16, and so what its caches hold."""
    model = TupleModel()
    x = list(torch.randn(2, 9, 32).split([5, 1, 1, 1, 1], dim=1))
    options = {"key_sparsity": sparsity, "value_sparsity": sparsity, "window": WINDOW}

    def attention(q, k, v):
        k, v = (pruned_cache(x, sparsity, WINDOW) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    with torch.autocast(**AUTOCAST), without_compiler(), explain() as report:
        outputs = run_steps(model, x, torch.compile(model.step, backend="mustafar", options=options))
        expected = pruned_steps(model, x, attention)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")], str(report)
    for out, wanted in zip(outputs, expected, strict=True):
        assert out.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(out, wanted, **ROUNDING)


def test_one_row():
    """Sizes of 1 vanish from the description of a tensor; what is left must not be mistaken for something else."""
    for form in (eager, five_dims, bmm, einsum):
        check_decode(form, case(queries=1, past=9, batch=1))


@pytest.mark.parametrize(
    ("name", "cache", "found", "compressed"),
    at_night(
        [
            ("gemma2", "dynamic", 2, 1),  # softcap; its other layer slides
            ("gpt_oss", "static", 2, 1),  # sinks
            ("bloom", "dynamic", 2, 2),  # baddbmm on ALiBi
        ]
    ),
)
def test_models_with_a_form_of_their_own(name, cache, found, compressed):
    outcome = measure(name, "eager", cache)
    assert (outcome.found, outcome.compressed, outcome.error) == (found, compressed, "")
    assert not outcome.is_wrong
