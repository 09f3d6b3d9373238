"""Decode steps as CUDA graphs: right, their own results, few recordings, nothing kept alive. Most need a GPU."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from compilers import without_compiler
from models import BufferModel, hf_model, prompt
from mustafar_compile import cache_stats, explain, prepare, release_recordings
from mustafar_compile.calling import cuda_graphs
from mustafar_compile.calling.cuda_graphs import KEPT, CudaGraphs, NotRecordableError
from mustafar_compile.calling.recordable import Places
from mustafar_compile.reporting.explain import record_call
from reference import pruned_generation
from stand_in_graphs import record_on_a_cpu

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WINDOW = 4
HOW = {"max_new_tokens": 14, "do_sample": False}
AS_GRAPHS = "decode steps run as CUDA graphs"


@pytest.fixture
def captured(monkeypatch):
    """A list with an item for each recording."""
    made, capture = [], cuda_graphs.capture

    def noted(*given):
        made.append(1)
        return capture(*given)

    monkeypatch.setattr(cuda_graphs, "capture", noted)
    return made


def on_gpu(seed=1, **how):
    return {name: x.cuda() for name, x in prompt(seed=seed, **how).items()}


def expected_tokens(inputs, **how):
    with pruned_generation(0.5, 0.5, WINDOW):
        return hf_model().cuda().generate(**inputs, **HOW | how)


# ---------------------------------------------------------------------------------------------------------- any machine


def test_a_call_is_known_by_addresses_numbers_and_sizes():
    weight, small, cache = nn.Parameter(torch.ones(2)), torch.ones(3), torch.ones(2, 5)
    places = Places(bound=[0, 2], copied=[1], sizes=[(3, None), (2, 1)])
    given = [weight, small, cache, 7]
    bound, form = places.addresses(given), places.form(given)
    assert (places.addresses([weight, small.clone(), cache, 7]), places.form(given)) == (bound, form)
    assert places.addresses([weight, small, cache.clone(), 7]) != bound
    for changed in ([weight, small, cache, 8], [weight, small, cache[:, :4], 7]):
        assert places.form(changed) != form


def test_a_step_that_waits_for_other_ranks_knows_memory_by_its_life():
    """Where new memory comes to lie is not the same on all ranks."""
    memory = bytearray(8)
    old, new = (torch.frombuffer(memory, dtype=torch.uint8) for _ in range(2))
    by_address, by_life = Places(bound=[0]), Places(bound=[0], waits=True)
    assert by_address.addresses([old]) == by_address.addresses([new])
    assert by_life.addresses([old]) == by_life.addresses([old.view(2, 4)])
    assert by_life.addresses([old]) != by_life.addresses([new])
    assert by_life.addresses([old[:4]]) != by_life.addresses([old[4:]])


def test_memory_that_is_gone_is_not_taken_for_memory_that_comes_to_lie_where_it_was():
    memory, places = bytearray(8), Places(bound=[0], waits=True)
    for _ in range(4):
        old = torch.frombuffer(memory, dtype=torch.uint8)
        address, marks = places.addresses([old]), places.marks([old])
        del old
        assert places.addresses([torch.frombuffer(memory, dtype=torch.uint8)]) != address
        del marks


def test_a_recording_and_the_latest_call_mark_their_memory(monkeypatch):
    step = Step(monkeypatch, waits=True)
    cache, other = torch.zeros(3), torch.zeros(3)
    for given in (cache, cache, other):
        step.call(given, torch.ones(3), torch.tensor(0.0), 1)
    (recording,) = step.graphs.recordings.values()
    marked = [[mark.cdata for mark in marks] for marks in (recording.marks, step.graphs.marks)]
    assert marked == [[x.untyped_storage()._cdata, MASK.untyped_storage()._cdata] for x in (cache, other)]


MASK = torch.ones(3)


class Step:
    """A step that adds its token to a cache and counts, and ``CudaGraphs`` of it."""

    def __init__(self, monkeypatch, function=None, waits=False):
        self.ran = 0
        self.captured = record_on_a_cpu(monkeypatch)
        # The cache and a mask; the token and the length, which is written
        places = Places([0, 4], frozenset([4]), copied=[1, 2], written=[1], sizes=[(3, None)], waits=waits)
        self.graphs = CudaGraphs(function or self.step, places, torch.device("cpu", 0))

    def call(self, cache, token, length, factor, mask=MASK):
        return self.graphs(cache, token, length, factor, mask)

    def step(self, cache, token, length, factor, mask):
        self.ran += 1
        cache.add_(token * factor * mask)
        length.add_(1)
        return cache.sum() + length, cache, length, factor, None


def test_calls_replayed_equal_calls_that_are_not(monkeypatch):
    plain, step = Step(monkeypatch), Step(monkeypatch)  # the later one captures
    mine, other, kept = [torch.zeros(3), torch.tensor(0.0)], [torch.zeros(3), torch.tensor(0.0)], []
    for i in range(6):
        token = torch.full((3,), float(i))
        out, expected = step.call(mine[0], token, mine[1], 2), plain.step(other[0], token, other[1], 2, MASK)
        assert out[1] is mine[0], "an input that is returned stays what it is"
        assert out[2] is mine[1]
        assert list(out[3:]) == [2, None]
        kept.append((out[0], expected[0].clone()))
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert all(torch.equal(a, b) for a, b in kept), "no result was overwritten"
    assert len(step.captured) == 1


def test_a_step_whose_recordings_are_released_is_recorded_again(monkeypatch):
    step, cache, length = Step(monkeypatch), torch.zeros(3), torch.tensor(0.0)
    for released in range(2):
        for _ in range(3):
            step.call(cache, torch.ones(3), length, 1)
        assert len(step.captured) == released + 1
        (recording,) = map(weakref.ref, step.graphs.recordings.values())
        release_recordings()
        assert recording() is None
    assert torch.equal(cache, torch.full((3,), 6.0))


def test_an_input_that_is_expanded_is_copied_once(monkeypatch):
    """As position_ids of a batch are. Torch refuses to write an element of memory that stands for several."""
    step, cache, length = Step(monkeypatch), torch.zeros(2, 3), torch.tensor(0.0)
    for i in range(4):
        step.call(cache, torch.tensor([1.0, 2.0, float(i)]).expand(2, 3), length, 1)
    assert len(step.captured) == 1
    assert not step.graphs.refused
    assert torch.equal(cache, torch.tensor([4.0, 8.0, 6.0]).expand(2, 3))


def test_a_mask_that_each_call_makes_anew_is_copied(monkeypatch):
    plain, step = Step(monkeypatch), Step(monkeypatch)
    cache, other, masks = torch.zeros(3), torch.zeros(3), torch.rand(8, 3)  # rows of it lie elsewhere each
    for i, mask in enumerate(masks):
        out = step.call(cache, torch.ones(3), torch.tensor(0.0), 2, mask)
        expected = plain.step(other, torch.ones(3), torch.tensor(0.0), 2, mask)
        assert torch.equal(out[0], expected[0])
        assert len(step.captured) == (i >= 2), "at the second move"
    assert torch.equal(cache, other)


def test_a_step_that_cannot_be_recorded_goes_on_unless_other_ranks_wait_for_it(monkeypatch):
    def call_twice(step):
        cache = torch.zeros(3)
        for _ in range(2):
            step.call(cache, torch.ones(3), torch.tensor(0.0), 2)

    def fail(*given):
        raise RuntimeError("no such luck")

    alone, waiting = Step(monkeypatch), Step(monkeypatch, waits=True)
    monkeypatch.setattr(cuda_graphs, "capture", fail)
    with pytest.warns(UserWarning, match="could not be recorded: no such luck"):
        call_twice(alone)
    with pytest.raises(NotRecordableError, match=r"other ranks go on with theirs: no such luck.*triton\.cudagraphs"):
        call_twice(waiting)


def test_what_moves_once_or_together_with_a_cache_is_not_copied(monkeypatch):
    step, caches, masks = Step(monkeypatch), torch.zeros(4, 3), torch.ones(4, 3)
    for cache, mask in zip(caches, masks, strict=True):
        step.call(cache, torch.ones(3), torch.tensor(0.0), 2, mask)
    for mask in masks:
        for _ in range(2):
            step.call(caches[0], torch.ones(3), torch.tensor(0.0), 2, mask)
    assert step.graphs.places.copied == [1, 2]
    assert len(step.captured) == len(masks)


def test_a_new_number_is_recorded_at_its_second_call_and_a_new_cache_at_its_first(monkeypatch):
    step, length = Step(monkeypatch), torch.tensor(0.0)
    caches = [torch.zeros(3) for _ in range(KEPT + 2)]
    for i, cache in enumerate(caches):
        for call in range(3):
            step.call(cache, torch.ones(3), length, 2)
            assert len(step.captured) == (i + 1 if i or call else 0), "the very first call compiles"
        assert len(step.graphs.recordings) == min(i + 1, KEPT)
    for calls in (0, 1, 1):
        step.call(caches[-1], torch.ones(3), length, 3)
        assert len(step.captured) == len(caches) + calls
    step.call(caches[-2], torch.ones(3), length, 2)
    assert len(step.captured) == len(caches) + 1, "one of the latest"
    assert length == 3 * len(caches) + 4


def test_caches_that_are_used_once_are_not_recorded(monkeypatch):
    step = Step(monkeypatch)
    for _ in range(2):
        step.call(cache := torch.zeros(3), torch.ones(3), torch.tensor(0.0), 2)
    first = [cache]
    for _ in range(5):
        first.append(torch.zeros(3))
        step.call(first[-1], torch.ones(3), torch.tensor(0.0), 2)
    assert not step.captured
    for _ in range(2):
        step.call(cache, torch.ones(3), torch.tensor(0.0), 2)
    for _ in range(5):
        first.append(torch.zeros(3))
        step.call(first[-1], torch.ones(3), torch.tensor(0.0), 2)
    assert len(step.captured) == 1, "a recording that served one call does not speak for others"


def test_a_guess_that_cannot_be_recorded_is_tried_again(monkeypatch):
    step, capture = Step(monkeypatch), cuda_graphs.capture
    caches = [torch.zeros(3) for _ in range(2)]
    for _ in range(3):
        step.call(caches[0], torch.ones(3), torch.tensor(0.0), 2)

    def fail(*given):
        raise RuntimeError("a kernel was compiled")

    monkeypatch.setattr(cuda_graphs, "capture", fail)
    step.call(caches[1], torch.ones(3), torch.tensor(0.0), 2)
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    for _ in range(2):
        step.call(caches[1], torch.ones(3), torch.tensor(0.0), 2)
    assert not step.graphs.refused
    assert len(step.captured) == 2
    assert torch.equal(caches[0], caches[1])


def test_recordings_hold_nothing_that_they_are_bound_to(monkeypatch):
    step, cache = Step(monkeypatch), torch.zeros(3)
    monkeypatch.setattr(cuda_graphs, "capture", lambda function, *_: (function()[:1], lambda: None))
    for _ in range(3):
        step.call(cache, torch.ones(3), torch.tensor(0.0), 2)
    assert len(step.graphs.recordings) == 1
    alive = weakref.ref(cache)
    del cache
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("of", ["cache", "token"])
def test_a_step_that_returns_a_view_of_an_input_is_not_recorded(of, monkeypatch):
    step = Step(monkeypatch, lambda cache, token, length, factor, mask: [{"cache": cache, "token": token}[of][:2]])
    cache, token = torch.zeros(3), torch.ones(3)
    with explain() as report:
        for _ in range(4):
            (out,) = step.call(cache, token, torch.tensor(0.0), 2)
            assert out.data_ptr() == {"cache": cache, "token": token}[of].data_ptr()
        record_call()  # the report warns of a block in which nothing ran
    assert len(step.captured) == 1
    assert [notice.split(": ")[1] for notice in report.notices] == ["it returns a view of an input"]


def test_preparing_a_model_on_a_cpu_compiles_it():
    model, inputs = hf_model(num_hidden_layers=1), prompt(padded=True)
    with pruned_generation(0.7, 0.5, WINDOW):
        expected = hf_model(num_hidden_layers=1).generate(**inputs, **HOW)
    with without_compiler(), explain() as report:
        assert prepare(model, key_sparsity=0.7, window=WINDOW, mode="default") is model
        assert torch.equal(model.generate(**inputs, **HOW), expected)
    assert len(report.matched) == 1
    assert report.launching == [], "there is nothing to say on a CPU"


def test_preparing_a_model_in_a_wrapper_prepares_the_one_inside():
    """As PEFT's: generate() of the wrapper calls that of the base model, past any compiled call of the wrapper."""
    wrapper, base = nn.Module(), hf_model(num_hidden_layers=1)
    wrapper.get_base_model = lambda: base
    assert prepare(wrapper) is wrapper
    assert base._compiled_call_impl is not None


@pytest.mark.parametrize("what", [nn.Linear(2, 2), torch.compile(nn.Linear(2, 2)), BufferModel()])
def test_only_models_that_generate_can_be_prepared(what):
    with pytest.raises(TypeError, match="prepare takes a model of transformers that generates; given is "):
        prepare(what)


def test_settings_are_checked_when_a_model_is_prepared():
    with pytest.raises(ValueError, match="prepare: unknown setting sparsity; accepted are key_sparsity"):
        prepare(hf_model(), sparsity=0.5)
    with pytest.raises(ValueError, match="window=0 is not accepted"):
        prepare(hf_model(), window=0)
    with pytest.raises(ValueError, match="two modes are given"):
        prepare(hf_model(), mode="default", options={"mode": "max-autotune"})


# ------------------------------------------------------------------------------------------------------------- on a GPU


@needs_gpu
def test_a_prepared_model_generates_what_the_oracle_does(captured):
    model = prepare(hf_model().cuda(), window=WINDOW)
    with explain() as report:
        for seed in range(5):
            inputs = on_gpu(seed, padded=True)
            assert torch.equal(model.generate(**inputs, **HOW), expected_tokens(inputs))
    assert len(report.matched) == 2
    assert report.launching == [AS_GRAPHS]
    assert not report.notices
    assert 1 <= len(captured) <= 5


@needs_gpu
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_every_way_of_generating_is_right(how):
    model = hf_model().cuda()
    model.compile(backend="mustafar", options={"window": WINDOW})
    with explain() as report:
        for seed in range(3):
            inputs = on_gpu(seed)
            assert torch.equal(model.generate(**inputs, **HOW, **how), expected_tokens(inputs))
    assert len(report.matched) == 2
    assert report.launching == [AS_GRAPHS]


def steps_of(model, step, inputs):
    return [step(x.cuda(), torch.arange(at, at + x.shape[1], device="cuda")) for at, x in inputs]


def embedded(seed=0, steps=8):
    generator = torch.Generator().manual_seed(seed)
    lengths = (7, *[1] * steps)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [(at, torch.randn(2, n, 32, generator=generator)) for at, n in zip(starts, lengths, strict=True)]


@needs_gpu
def test_results_are_not_overwritten_by_later_steps(captured):
    inputs = embedded()
    torch.manual_seed(0)
    eager, model = BufferModel().cuda(), BufferModel().cuda()
    model.load_state_dict(eager.state_dict())
    options = {"key_sparsity": 0.0, "value_sparsity": 0.0}
    kept = steps_of(model, torch.compile(model.step, backend="mustafar", options=options), inputs)
    assert len(captured) == 1
    for mine, other in zip(kept, steps_of(eager, eager.step, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_a_recording_of_inference_mode_serves_others(captured):
    inputs, model = embedded(), BufferModel().cuda()
    step = torch.compile(model.step, backend="mustafar")
    expected = steps_of(model, step, inputs)
    for mode in (torch.inference_mode, nullcontext, torch.inference_mode):
        with mode():
            mine = steps_of(model, step, inputs)
        assert all(torch.equal(x, other) for x, other in zip(mine, expected, strict=True))


@needs_gpu
def test_they_can_be_switched_off(captured):
    model, inputs = hf_model().cuda(), on_gpu()
    prepare(model, window=WINDOW, options={"triton.cudagraphs": False})
    with explain() as report:
        assert torch.equal(model.generate(**inputs, **HOW), expected_tokens(inputs))
    assert not captured
    assert report.launching == []


@needs_gpu
def test_a_step_that_cannot_be_recorded_runs_without(monkeypatch):
    def capture(*_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    model, inputs = prepare(hf_model().cuda(), window=WINDOW), on_gpu()
    with explain() as report, pytest.warns(UserWarning, match="could not be recorded: no such luck"):
        assert torch.equal(model.generate(**inputs, **HOW), expected_tokens(inputs))
    assert len(report.matched) == 2


@needs_gpu
def test_recordings_are_few_and_keep_no_cache_alive():
    model, alive = BufferModel().cuda(), []
    step = torch.compile(model.step, backend="mustafar")
    held = []
    for call in range(2 * KEPT):
        model.k_cache, model.v_cache = (torch.zeros_like(x) for x in (model.k_cache, model.v_cache))
        alive.append(weakref.ref(model.k_cache))
        steps_of(model, step, embedded(call))
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert [ref() is not None for ref in alive] == [False] * (2 * KEPT - 1) + [True]
    assert held[-1] == held[KEPT]


@needs_gpu
def test_weights_that_move_are_followed(captured):
    inputs, model = embedded(), BufferModel().cuda()
    options = {"key_sparsity": 0.0, "value_sparsity": 0.0}
    step = torch.compile(model.step, backend="mustafar", options=options)
    steps_of(model, step, inputs)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5
    mine = steps_of(model, step, inputs)
    for x, other in zip(mine, steps_of(model, model.step, inputs), strict=True):
        torch.testing.assert_close(x, other, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_threads_and_streams_take_turns():
    model = prepare(hf_model().cuda(), window=WINDOW)
    prompts = [on_gpu(seed) for seed in range(4)]
    expected = [expected_tokens(inputs) for inputs in prompts]
    results = {}
    model.generate(**prompts[0], **HOW)  # compiles

    def work(i):
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            results[i] = model.generate(**prompts[i], **HOW)
            stream.synchronize()

    torch.cuda.synchronize()
    for i in range(4):
        thread = threading.Thread(target=work, args=(i,))
        thread.start()
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(4))


@needs_gpu
def test_the_memory_of_a_prepared_model_does_not_grow():
    model, held = prepare(hf_model().cuda(), window=WINDOW), []
    for seed in range(8):
        out = model.generate(**on_gpu(seed), **HOW, return_dict_in_generate=True)
        stats = cache_stats(out.past_key_values)
        assert stats.compressed_tensors == 4
        del out
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[KEPT + 1]
