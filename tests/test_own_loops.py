"""Models with caches of their own, and generate loops of one's own."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from compilers import without_compiler, without_inductor
from models import (
    BufferModel,
    OneHotModel,
    SliceModel,
    TupleModel,
    WhereModel,
    WhereNotModel,
    hf_model,
    prompt,
    pruned_steps,
    run_steps,
)
from mustafar_compile import StaleCacheError, cache_stats, compile_loop, explain
from nightly import at_night, mostly_at_night
from pairwise import pairwise
from reference import pruned_generation, reference_attention

pytestmark = pytest.mark.usefixtures("no_grad")
WINDOW = 4
FORMS = {"index_put buffer": BufferModel, "slice buffer": SliceModel, "tuple": TupleModel}
MASKED_WRITES = [WhereModel, WhereNotModel, OneHotModel]


def options(sparsity: float) -> dict:
    return {"key_sparsity": sparsity, "value_sparsity": sparsity, "window": WINDOW}


def oracle(model, inputs, sparsity):
    attention = functools.partial(reference_attention, key_sparsity=sparsity, value_sparsity=sparsity, window=WINDOW)
    return pruned_steps(model, inputs, attention)


def embeddings(prefill: int = 7, steps: int = 12, batch: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, 32, generator=generator) for n in (prefill, *[1] * steps)]


def assert_close(actual, expected):
    torch.testing.assert_close(torch.cat(actual, 1), torch.cat(expected, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("form", "sparsity"), mostly_at_night(pairwise(list(FORMS), (0.5, 0.7, 0.0)), 4))
def test_outputs_equal_the_oracle(form, sparsity):
    torch.manual_seed(0)
    model = FORMS[form]()
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(sparsity))
        for seed in (0, 1):  # the second sequence writes over the buffers of the first
            inputs = embeddings(seed=seed)
            assert_close(run_steps(model, inputs, step), oracle(model, inputs, sparsity))
        assert len(report.matched) == 1
        assert not report.missed
        assert report.graphs <= 3


@pytest.mark.parametrize("form", MASKED_WRITES)
def test_a_write_spelled_as_a_choice_over_the_buffer(form):
    torch.manual_seed(0)
    model, inputs = form(), embeddings()
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        assert_close(run_steps(model, inputs, step), oracle(model, inputs, 0.5))
    assert [entry.form for entry in report.matched] == ["static (masked write)"]


@pytest.mark.parametrize(
    "sizes", [{"kv_heads": 4, "head_dim": 24}, *at_night([{"kv_heads": 1}, {"heads": 6, "kv_heads": 2}])]
)
@pytest.mark.parametrize("form", FORMS)
def test_head_counts_and_sizes(form, sizes):
    torch.manual_seed(0)
    model, inputs = FORMS[form](**sizes), embeddings(steps=6)
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        assert_close(run_steps(model, inputs, step), oracle(model, inputs, 0.5))
    assert len(report.matched) == 1


@pytest.mark.parametrize("kv_heads", [1, *at_night([2])])
@pytest.mark.parametrize("form", [*FORMS.values(), *MASKED_WRITES])
def test_a_batch_of_one(form, kv_heads):
    """Indexed assignment hands leading dimensions of size 1 on as dropped."""
    torch.manual_seed(0)
    model = form(kv_heads=kv_heads, **({} if form is TupleModel else {"batch": 1}))
    inputs = embeddings(batch=1, steps=6)
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        assert_close(run_steps(model, inputs, step), oracle(model, inputs, 0.5))
    assert len(report.matched) == 1, str(report)


def test_a_batch_smaller_than_the_buffer():
    torch.manual_seed(0)
    model = SliceModel(batch=5)
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        for batch in (2, 3, 2):
            inputs = embeddings(batch=batch, seed=batch)
            assert_close(run_steps(model, inputs, step), oracle(model, inputs, 0.5))
    assert len(report.matched) == 1


class RowsInUse(BufferModel):
    """litgpt: the rows in use are sliced off, written, and what the write returns is read."""

    def step(self, x, positions):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        keys = self.k_cache[: len(x)].index_copy_(2, positions, k)
        values = self.v_cache[: len(x)].index_copy_(2, positions, v)
        mask = self.causal[None, None, positions]
        return self.merge(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True))


@pytest.mark.parametrize("spare", [0, 1])
def test_rows_in_use_may_be_all_of_the_buffer(spare):
    torch.manual_seed(0)
    model, inputs = RowsInUse(batch=2 + spare), embeddings(steps=6)
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        assert_close(run_steps(model, inputs, step), oracle(model, inputs, 0.5))
    assert len(report.matched) == 1, str(report)


WRITES = {
    "index_put": lambda cache, new, at: cache.__setitem__((slice(None), torch.arange(new.shape[1]) + at), new),
    "slice": lambda cache, new, at: cache.__setitem__((slice(None), slice(at, at + new.shape[1])), new),
}


SIZES = (2, 7, 48), (3, 20, 80), (4, 41, 113)
"""Batch, tokens of the prompt, slots: the second of each may become a symbol, the third shows what it is not for."""


@pytest.mark.parametrize("dynamic", at_night([None, True]))
def test_a_growing_cache_whose_sizes_all_change(dynamic):
    torch.manual_seed(0)
    model = TupleModel()
    with without_inductor(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(0.5), dynamic=dynamic)
        for batch, prompt, _ in SIZES:
            inputs = embeddings(prompt, batch=batch, steps=3)
            assert_close(run_steps(model, inputs, step), oracle(model, inputs, 0.5))
    assert len(report.matched) == 1, str(report)


@pytest.mark.parametrize("dynamic", [None, *at_night([True])])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_buffers_whose_sizes_all_change(write, dynamic):
    """Where the batch is a symbol, tracing keeps the ``:`` of ``cache[:, at]`` as an op.

    With dynamic=True (of torch 2.11 at least) the number of KV heads is a symbol, too.
    """
    torch.manual_seed(0)
    model = TupleModel()

    def step(x, caches, at):
        q, *new = model.project(x)
        for cache, rows in zip(caches, new, strict=True):
            write(cache, rows, at)
        mask = torch.arange(caches[0].shape[1]) <= torch.arange(x.shape[1]).unsqueeze(1) + at
        q, k, v = (t.transpose(1, 2) for t in (q, *caches))
        return model.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))

    with without_compiler(), explain() as report:
        compiled = torch.compile(step, backend="mustafar", options=options(0.5), dynamic=dynamic)
        for batch, prompt, slots in SIZES:
            inputs = embeddings(prompt, batch=batch, steps=3)
            caches = [torch.zeros(batch, slots, 2, 16) for _ in range(2)]
            places = 0, prompt, prompt + 1, prompt + 2
            outputs = [compiled(x, caches, at) for x, at in zip(inputs, places, strict=True)]
            assert_close(outputs, oracle(model, inputs, 0.5))
    assert len(report.matched) == 1, str(report)


class ScaledModel(TupleModel):
    """A scale that is a number of the module."""

    scale = 0.5

    def step(self, x, past):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        how = {"is_causal": x.shape[1] > 1, "enable_gqa": True, "scale": self.scale}
        return self.merge(F.scaled_dot_product_attention(q, k, v, **how)), (k, v)


def test_a_scale_when_all_is_symbolic():
    """With dynamic=True, Dynamo makes floats symbolic, too."""
    torch.manual_seed(0)
    model, inputs = ScaledModel(), embeddings(steps=3)
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(0.0), dynamic=True)
        for model.scale in (0.5, 0.1):
            assert_close(run_steps(model, inputs, step), run_steps(model, inputs))
    assert len(report.matched) == 1, str(report)


class PositionsApart(BufferModel):
    """Where K and V go is computed for each."""

    def write(self, cache, new, positions):
        super().write(cache, new, positions + 0)


def test_positions_computed_for_keys_and_values_apart():
    torch.manual_seed(0)
    model, inputs = PositionsApart(), embeddings(steps=3)
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        assert_close(run_steps(model, inputs, step), oracle(model, inputs, 0.5))
    assert len(report.matched) == 1, str(report)


FOREIGN_WRITES = {
    "whole": lambda cache: cache.mul_(2),
    "item": lambda cache: cache.__setitem__((slice(None), slice(None), 3), 1.0),
    "view": lambda cache: cache.transpose(1, 2)[:, 2:5].zero_(),
    "flat view": lambda cache: cache.view(-1)[:40].fill_(1.0),
    "detached": lambda cache: cache.detach().add_(1),
    "out=": lambda cache: torch.mul(cache, 2, out=cache),
    "foreach": lambda cache: torch._foreach_mul_([cache], 2.0),
}


@pytest.mark.parametrize("write", FOREIGN_WRITES.values(), ids=FOREIGN_WRITES)
def test_a_foreign_write_into_a_dense_cache_is_noticed(write):
    torch.manual_seed(0)
    model, inputs = BufferModel(), embeddings(steps=6)
    with without_compiler():
        step = torch.compile(model.step, backend="mustafar", options=options(0.0))
        run_steps(model, inputs, step)
        write(model.v_cache)
        twin = copy.deepcopy(model)
        x, position = torch.randn(2, 1, 32), torch.tensor([13])
        torch.testing.assert_close(step(x, position), twin.step(x, position), rtol=1e-5, atol=1e-6)


def test_the_dense_buffer_of_the_caller_stays_right():
    torch.manual_seed(0)
    model, inputs = BufferModel(), embeddings()
    twin = copy.deepcopy(model)
    with without_compiler():
        run_steps(model, inputs, torch.compile(model.step, backend="mustafar", options=options(0.5)))
    run_steps(twin, inputs)
    torch.testing.assert_close(model.k_cache, twin.k_cache)
    stats = cache_stats(model)
    assert stats.tokens == 19
    assert stats.stored_bytes > stats.dense_bytes


def test_rewinding_a_static_cache():
    """Going back to an earlier position forgets what came after it, as it does for a dense buffer."""
    torch.manual_seed(0)
    model, inputs = BufferModel(), embeddings(steps=6)
    with without_compiler():
        step = torch.compile(model.step, backend="mustafar", options=options(0.0))
        run_steps(model, inputs, step)
        twin = copy.deepcopy(model)
        for position in (8, 9, 10):
            x, at = torch.randn(2, 1, 32), torch.tensor([position])
            torch.testing.assert_close(step(x, at), twin.step(x, at), rtol=1e-5, atol=1e-6)


def test_one_past_continued_twice_raises_unless_copied():
    torch.manual_seed(0)
    model, inputs = TupleModel(), embeddings(steps=8)
    with without_compiler():
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        past = None
        for x in inputs[:-1]:
            _, past = step(x, past)
        branch = copy.deepcopy(past)
        first, _ = step(inputs[-1], past)
        with pytest.raises(StaleCacheError, match="already extended to 15"):
            step(inputs[-1], past)
        second, _ = step(inputs[-1], branch)
    assert torch.equal(first, second)


def test_cache_stats_of_a_tuple():
    torch.manual_seed(0)
    model, inputs = TupleModel(head_dim=32), embeddings(prefill=700, steps=1)
    with without_compiler():
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        past = None
        for x in inputs:
            _, past = step(x, past)
    stats = cache_stats(past)
    assert (stats.tokens, stats.tensors, stats.compressed_tensors) == (701, 2, 2)
    assert stats.stored_bytes == sum(b.untyped_storage().nbytes() for t in past for b in t.buffers)
    assert stats.ratio < 0.67


def greedy(model, ids, steps, eos=None):
    """A generate loop as users write it."""
    cache, token = None, ids
    for _ in range(steps):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if eos is not None and token[0].item() == eos:
            break
    return ids


@pytest.mark.parametrize("wrap", [torch.no_grad(), *at_night([lambda f: f])])
def test_compile_loop(wrap):
    model, ids = hf_model(num_hidden_layers=1), prompt()["input_ids"]
    with pruned_generation(0.5, 0.5, WINDOW):
        expected = greedy(hf_model(num_hidden_layers=1), ids, 20)
    with without_compiler():
        loop = compile_loop(**options(0.5))(wrap(greedy))
        with explain() as report:
            assert torch.equal(loop(model, ids, 12), expected[:, :21])
        assert len(report.matched) == 1
        assert report.graphs <= 3
        with explain() as report:
            assert torch.equal(loop(model, ids, 20), expected)
        assert report.graphs == 0, "a longer loop must not compile anew"
        stop = expected[0, 14].item()
        stopped = loop(model, ids, 20, stop)
    first = expected[0, 9:].tolist().index(stop)
    assert torch.equal(stopped, expected[:, : 9 + first + 1])


@pytest.mark.nightly  # Dynamo takes half a minute to go through transformers' loop
def test_compile_loop_around_hf_generate():
    model, inputs = hf_model(), prompt()
    with pruned_generation(0.5, 0.5, WINDOW):
        expected = hf_model().generate(**inputs, max_new_tokens=8, do_sample=False)
    with without_compiler(), explain() as report:

        @compile_loop(**options(0.5))
        def run(model, **how):
            return model.generate(**how)

        assert torch.equal(run(model, **inputs, max_new_tokens=8, do_sample=False), expected)
    assert len(report.matched) == 2


def test_compile_loop_bare_and_with_bad_settings():
    assert compile_loop(greedy).__name__ == "greedy"
    with pytest.raises(ValueError, match=r"unknown setting sparsity; accepted are key_sparsity"):
        compile_loop(sparsity=0.5)(greedy)
    with pytest.raises(ValueError, match=r"key_sparsity=1.5 is not accepted"):
        compile_loop(key_sparsity=1.5)(greedy)
    with pytest.raises(TypeError, match="compile_loop takes a function; given is 'greedy'"):
        compile_loop("greedy")
    with pytest.raises(TypeError, match=r"compile_loop: options=3 is not accepted; it must be a mapping"):
        compile_loop(greedy, options=3)


class SharedCacheModel(TupleModel):
    """Two attentions read one cache, as the later layers of Gemma 3n do; the past is nested."""

    def step(self, x, past):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        if past is not None:
            k, v = (torch.cat([past["layer"][i], t], dim=2) for i, t in enumerate((k, v)))
        first, second = (
            self.merge(F.scaled_dot_product_attention(y, k, v, is_causal=x.shape[1] > 1, enable_gqa=True))
            for y in (q, q.flip(-1))
        )
        return first + second, {"layer": (k, v)}


class NestedModel(TupleModel):
    """The past is a tuple in a dict in a list."""

    def step(self, x, past):
        out, past = super().step(x, None if past is None else past[0]["kv"])
        return out, [{"kv": past}]


def flipped(model):
    """The model whose queries are those of the second attention of a ``SharedCacheModel``."""
    model, project = copy.deepcopy(model), model.project
    model.project = lambda x: (project(x)[0].flip(-1), *project(x)[1:])
    return model


@pytest.mark.native
@pytest.mark.parametrize(
    ("sparsity", "eager_prompt", "compiler"),
    [(0.0, False, without_compiler), (0.5, True, without_compiler), (0.5, False, without_inductor)],
    ids=["exact", "dense past", "AOTAutograd"],
)
def test_a_cache_that_several_attentions_read(sparsity, eager_prompt, compiler):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, inputs = SharedCacheModel(), embeddings(steps=6)
    with compiler(), explain() as report:
        compiled = torch.compile(model.step, backend="mustafar", options=options(sparsity))
        step = functools.partial(_step_by_length, model.step if eager_prompt else compiled, compiled)
        outputs = run_steps(model, inputs, step)
    both = (oracle(m, inputs, sparsity) for m in (model, flipped(model)))
    assert_close(outputs, [first + second for first, second in zip(*both, strict=True)])
    first, second = report.matched
    assert min(first.dense_bytes, first.stored_bytes) > 0
    assert (second.dense_bytes, second.stored_bytes) == (0, 0), "its bytes are in the first layer's entry"
    assert not report.missed


def _step_by_length(prompt, token, x, past):
    return (prompt if x.shape[1] > 1 else token)(x, past)


class LastTokensModel(TupleModel):
    """Of a prompt, the second attention to the cache has one query only, as the later layers of Gemma 4."""

    def step(self, x, past):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        if past is not None:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(past, (k, v), strict=True))
        first = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, enable_gqa=True)
        last = F.scaled_dot_product_attention(q[:, :, -1:].flip(-1), k, v, enable_gqa=True)
        return self.merge(torch.cat([first, last], dim=2)), (k, v)


def test_a_cache_that_is_read_with_fewer_queries_in_a_prompt():
    torch.manual_seed(0)
    model, inputs = LastTokensModel(), embeddings(steps=6)
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        outputs = run_steps(model, inputs, step)
    first, last = (oracle(m, inputs, 0.5) for m in (model, flipped(model)))
    assert_close(outputs, [torch.cat([x, y[:, -1:]], 1) for x, y in zip(first, last, strict=True)])
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")] * 2


def test_a_nested_past():
    torch.manual_seed(0)
    model, inputs = NestedModel(), embeddings(steps=4)
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        assert_close(run_steps(model, inputs, step), oracle(model, inputs, 0.5))
    assert len(report.matched) == 1


class GrowingBuffers(TupleModel):
    """The past is two buffers of the module, None before the first token."""

    def __init__(self, **sizes) -> None:
        super().__init__(**sizes)
        self.register_buffer("keys", None, persistent=False)
        self.register_buffer("values", None, persistent=False)

    def forward(self, x):
        out, (self.keys, self.values) = self.step(x, None if self.keys is None else (self.keys, self.values))
        return out


class History:
    def __init__(self) -> None:
        self.past = None


class GrowingInObject(TupleModel):
    """The past is an attribute of an object that is one of the module."""

    def __init__(self, **sizes) -> None:
        super().__init__(**sizes)
        self.history = History()

    def forward(self, x):
        out, self.history.past = self.step(x, self.history.past)
        return out


@pytest.mark.parametrize("form", [GrowingBuffers, *at_night([GrowingInObject])])
def test_a_growing_cache_that_a_module_holds(form):
    """Dynamo takes the shapes of buffers for fixed, and would compile each step anew until it gives up."""
    torch.manual_seed(0)
    model, inputs = form(), embeddings(steps=6)
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options=options(0.5))
        assert_close([model(x) for x in inputs], oracle(model, inputs, 0.5))
        model.keys = model.values = None
        model.history = History()
        assert_close([model(x) for x in inputs], oracle(model, inputs, 0.5))
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")], str(report)
    assert (report.graphs, report.calls) == (2, 14)
    assert torch._dynamo.config.force_parameter_static_shapes
