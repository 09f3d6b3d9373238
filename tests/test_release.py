"""``release_dense``: buffers of the caller whose dense memory is given back. On a CPU it is refused.

So here the memory is not freed but filled with NaN, which any read would show and any write would change. What only a
CUDA device can show is in ``test_gpu.py``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CompileConfig

from compilers import without_compiler
from models import BufferModel, SliceModel, hf_model, prompt, run_steps
from mustafar_compile import ReleaseError, backend, cache_stats, explain
from mustafar_compile.cache import attached, stats
from mustafar_compile.patterns.rewriting.plan import Argument, AttachedBuffer
from nightly import at_night
from reference import pruned_cache, pruned_generation
from test_own_loops import WINDOW, assert_close, embeddings, options, oracle

pytestmark = pytest.mark.usefixtures("no_grad")
RELEASE = {"release_dense": True}
FORMS = {"[B, H, S, D]": BufferModel, "[B, S, H, D]": SliceModel}


@pytest.fixture
def poisoned(monkeypatch):
    """Released caches, in the order in which they were: tensors full of NaN."""
    released = []

    def is_released(dense):
        return any(dense is x for x in released)

    def release(dense):
        assert not is_released(dense)
        dense.fill_(float("nan"))
        released.append(dense)

    monkeypatch.setattr(attached, "release", release)
    monkeypatch.setattr(attached, "is_released", is_released)
    monkeypatch.setattr(stats, "is_released", is_released)
    monkeypatch.setattr(backend, "check_releasable", lambda dense: None)
    return released


@pytest.fixture
def plans(monkeypatch):
    """Plans of the graphs that are compiled."""
    made = []
    run = backend.Rewriter.run
    monkeypatch.setattr(backend.Rewriter, "run", lambda self, matches: made.append(run(self, matches)) or made[-1])
    return made


def caches(model):
    return [model.k_cache, model.v_cache]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_no_graph_touches_a_released_cache(form, poisoned, plans):
    torch.manual_seed(0)
    model = form()
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(0.5) | RELEASE)
        for seed in (0, 1):  # the second sequence begins anew in released caches
            inputs = embeddings(seed=seed)
            assert_close(run_steps(model, inputs, step), oracle(model, inputs, 0.5))
    assert [id(x) for x in poisoned] == [id(x) for x in caches(model)]
    assert all(x.isnan().all() for x in poisoned)
    assert not report.missed
    (entry,) = report.matched
    assert cache_stats(model).stored_bytes == entry.stored_bytes
    assert len(plans) == report.graphs
    for plan in plans:
        assert {a.releases for a in plan.attached} == {True}
        own = {source.index for source in plan.inputs if isinstance(source, AttachedBuffer)}
        assert len(own) == 2
        assert not own & {source.index for source in plan.inputs if isinstance(source, Argument)}


def test_a_cache_filled_before_the_first_compiled_step(poisoned):
    """As after an eager prefill: what the dense cache holds is compressed once, and then given up."""
    torch.manual_seed(0)
    model, inputs = BufferModel(), embeddings()
    expected = oracle(model, inputs, 0.5)
    with without_compiler():
        step = torch.compile(model.step, backend="mustafar", options=options(0.5) | RELEASE)
        eager, start, outputs = model.step, 0, []
        for i, x in enumerate(inputs):
            outputs.append((step if i else eager)(x, torch.arange(start, start + x.shape[1])))
            start += x.shape[1]
    assert_close(outputs, expected)
    assert all(x.isnan().all() for x in poisoned)


def test_a_prompt_in_chunks_goes_on_from_the_pruned_tokens(poisoned):
    torch.manual_seed(0)
    model = BufferModel()
    twin, (first, second) = copy.deepcopy(model), torch.randn(2, 2, 18, 32)
    with without_compiler():
        step = torch.compile(model.step, backend="mustafar", options=options(0.5) | RELEASE)
        step(first, torch.arange(18))
        outputs = step(second, torch.arange(18, 36))
    twin.step(first, torch.arange(18))
    for cache in caches(twin):
        cache[:, :, :18] = pruned_cache(cache[:, :, :18], 0.5, WINDOW)
    assert_close([outputs], [twin.step(second, torch.arange(18, 36))])


@pytest.mark.nightly
@pytest.mark.native
def test_caches_of_any_length_through_inductor(poisoned):
    """Inductor must find the length among the inputs: the buffers have numbers of blocks, which follow from it."""
    torch._dynamo.reset()
    model, inputs = hf_model(num_hidden_layers=1), prompt(batch=1, length=40)
    compiled = CompileConfig(backend="mustafar", mode=None, fullgraph=False, options=options(0.5) | RELEASE)
    compiled._compile_all_devices = True
    how = {"cache_implementation": "static", "compile_config": compiled, "do_sample": False}
    for new_tokens in (4, 8, 2):
        with pruned_generation(0.5, 0.5, WINDOW):
            expected = hf_model(num_hidden_layers=1).generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=new_tokens, **how), expected)
    assert len(poisoned) == 3 * 2


def test_a_static_cache_of_transformers(poisoned):
    from transformers import StaticCache

    model, inputs = hf_model(num_hidden_layers=1), prompt(padded=True)
    with pruned_generation(0.5, 0.5, WINDOW):
        expected = hf_model(num_hidden_layers=1).generate(**inputs, max_new_tokens=8, do_sample=False)
    cache = StaticCache(config=model.config, max_cache_len=32)
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=16, dtype=torch.float32, device="cpu")
    with without_compiler():
        model.compile(backend="mustafar", options=options(0.5) | RELEASE)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert torch.equal(tokens, expected)
    assert len(poisoned) == 2
    assert all(x.isnan().all() for x in poisoned)


def test_other_settings_cannot_use_a_released_cache(poisoned):
    torch.manual_seed(0)
    model, x, position = BufferModel(), torch.randn(2, 1, 32), torch.tensor([3])
    with without_compiler():
        torch.compile(model.step, backend="mustafar", options=options(0.5) | RELEASE)(x, position)
        for other in (options(0.0) | RELEASE, options(0.5) | RELEASE | {"window": 8}, options(0.5)):
            torch._dynamo.reset()
            step = torch.compile(model.step, backend="mustafar", options=other)
            with pytest.raises(ReleaseError, match="accepted are the tensor and the settings"):
                step(x, position)


def test_a_cache_on_a_cpu_is_refused_before_anything_is_lost():
    torch.manual_seed(0)
    model = BufferModel()
    with without_compiler():
        step = torch.compile(model.step, backend="mustafar", options=options(0.5) | RELEASE)
        with pytest.raises(Exception, match="release_dense frees CUDA memory only, and a KV cache is on cpu") as caught:
            step(torch.randn(2, 1, 32), torch.tensor([0]))
    assert ReleaseError.__name__ in str(caught.value)
    assert all(x.untyped_storage().nbytes() and not x.any() for x in caches(model))


@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, *at_night([{}])], ids=["static", "dynamic"])
def test_caches_of_the_backend_itself_need_no_release(how):
    model, inputs = hf_model(num_hidden_layers=1), prompt()
    with without_compiler():
        model.compile(backend="mustafar", options=options(0.5) | RELEASE)
        model.generate(**inputs, max_new_tokens=3, do_sample=False, **how)


class Bidirectional(SliceModel):
    """Every token of the prompt sees every other."""

    def step(self, x, start, mask):
        return super().step(x, start, None)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: SliceModel(batch=5), "only a part of the batch of the cache is used"),
        (Bidirectional, "its attention is not causal"),
    ],
)
def test_what_cannot_be_kept_compressed_alone_stays_dense_and_says_why(model, reason, poisoned):
    torch.manual_seed(0)
    model, inputs = model(), embeddings(steps=0)
    expected = run_steps(copy.deepcopy(model), inputs)
    with without_compiler(), explain() as report:
        assert_close(run_steps(model, inputs, torch.compile(model.step, backend="mustafar", options=RELEASE)), expected)
    assert [entry.reason for entry in report.missed] == [reason]
    assert not poisoned
