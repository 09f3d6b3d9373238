"""What is lost, or costs more than it should, is said: one warning, and a line in the report."""

from __future__ import annotations

import functools
import threading
import time
import warnings

import pytest
import torch
import torch.nn.functional as F

from models import TupleModel, run_steps
from mustafar_compile import CompressedKV, _compat, explain
from mustafar_compile.reporting import notices
from mustafar_compile.reporting.explain import record_call
from mustafar_compile.reporting.report import Report, verdict
from test_own_loops import assert_close, embeddings, options, oracle

pytestmark = pytest.mark.usefixtures("new_notices", "no_grad", "uncompiled")


class BrokenModel(TupleModel):
    """A graph break between the update of the cache and its attention."""

    def step(self, x, past):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
        torch._dynamo.graph_break()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, enable_gqa=True)
        return self.merge(y), (k, v)


def run(model, step, inputs, past=None):
    """Outputs of all steps, and the past."""
    outputs = []
    for x in inputs:
        out, past = step(x, past)
        outputs.append(out)
    return outputs, past


def noticed(report, caught, text):
    """The one notice with ``text``, which is one warning and one line."""
    warned = [str(w.message) for w in caught if text in str(w.message)]
    assert len(warned) == 1
    (line,) = (notice for notice in report.notices if text in notice)
    assert warned == [f"mustafar: {line}"]
    assert f"note: {line}" in str(report)
    return line


def past_the_recompile_limit():
    """Outputs, reports of a first and a second sequence, warnings."""
    torch.manual_seed(0)
    model, inputs = TupleModel(), embeddings(steps=6)
    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = torch.compile(model.step, backend="mustafar", options=options(0.0))
        with explain() as report:
            outputs, _ = run(model, step, inputs)
        with explain() as later:
            run(model, step, inputs)
    assert_close(outputs, oracle(model, inputs, 0.0))
    return report, later, caught


def test_the_recompile_limit():
    report, later, caught = past_the_recompile_limit()
    assert "models.py" in noticed(report, caught, "Dynamo's recompile limit is reached in 'step' (")
    assert any("recompile limit" in notice for notice in later.notices), "a warning comes once, a line in each report"
    (entry,) = report.missed
    assert entry.phases == ("prefill",)
    assert entry.stored_bytes > 0
    assert verdict(entry).startswith("prefill; else no: Dynamo's recompile limit is reached")


def test_the_recompile_limit_where_dynamo_logs_nothing(caplog):
    with caplog.at_level("ERROR", "torch._dynamo"):
        report, _, caught = past_the_recompile_limit()
    noticed(report, caught, "Dynamo's recompile limit is reached in a compiled function")


def run_prompts(step, *batches):
    for batch in batches:
        step(torch.randn(batch, 8, 32), None)


def test_a_block_after_the_recompile_limit_says_why_nothing_ran():
    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = torch.compile(TupleModel().step, backend="mustafar", options=options(0.0))
        run_prompts(step, 2, 3)
        with explain() as later:
            run_prompts(step, 3)
    assert not later.calls
    assert "note: Dynamo's recompile limit is reached in 'step' (" in str(later)


def decorated(forward):
    """Wrapped, so that all models have the code of the wrapper."""

    @functools.wraps(forward)
    def wrapper(*args):
        return forward(*args)

    return wrapper


class Decorated(TupleModel):
    forward = decorated(TupleModel.step)


class AlsoDecorated(TupleModel):
    forward = decorated(TupleModel.step)


def test_models_that_share_a_wrapper_do_not_use_up_the_recompile_limit_together():
    models = [torch.compile(model(), backend="mustafar", options=options(0.0)) for model in (Decorated, AlsoDecorated)]
    with torch._dynamo.config.patch(recompile_limit=2), explain() as report:
        for batch in (2, 3):
            for model in models:
                run_prompts(model, batch)
        assert torch._dynamo.config.recompile_limit == 2
    assert report.graphs == 4
    assert not report.given_up


def test_a_graph_break_between_cache_and_attention():
    torch.manual_seed(0)
    model, inputs = BrokenModel(), embeddings(steps=6)
    past = tuple(CompressedKV.from_dense(torch.randn(2, 2, 7, 16), 0.5, 4) for _ in range(2))
    with warnings.catch_warnings(record=True) as caught, explain() as report:
        warnings.simplefilter("always")
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        run(model, step, inputs[1:], past)
    noticed(report, caught, "decompresses the KV cache each time it runs: a graph break lies between its update")


def test_a_step_that_cannot_use_the_compressed_cache():
    torch.manual_seed(0)
    layers, inputs = [TupleModel(), TupleModel()], embeddings(steps=3)

    def step(x, past):
        x, first = layers[0].step(x, past and past[0])
        x, second = layers[1].step(x, past and past[1])
        return x, (first, second)

    _, past = run(None, torch.compile(step, backend="mustafar", options=options(0.5)), inputs)
    with warnings.catch_warnings(record=True) as caught, explain() as report:
        warnings.simplefilter("always")
        other = torch.compile(step, backend="mustafar", options=options(0.5) | {"skip_layers": [0]})
        torch._dynamo.reset()
        run(None, other, inputs[1:], past)
    noticed(report, caught, "decompresses the KV cache each time it runs: layer 0 is listed in skip_layers")


@pytest.mark.parametrize("tokens", [3, 20])
def test_a_short_step_that_is_not_taken_token_by_token(tokens):
    """Its mask is the same for all its queries. A prompt is decompressed for in silence."""
    model, inputs = TupleModel(), embeddings(steps=3)
    _, past = run(model, torch.compile(model.step, backend="mustafar", options=options(0.5)), inputs)

    def step(x, past):
        q, k, v = (t.transpose(1, 2) for t in model.project(x))
        k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
        mask = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool)
        return model.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)), (k, v)

    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught, explain() as report:
        warnings.simplefilter("always")
        torch.compile(step, backend="mustafar", options=options(0.5))(torch.randn(2, tokens, 32), past)
    assert [entry.phases for entry in report.matched] == [("prefill",)]
    if tokens == 3:
        noticed(report, caught, "decompresses the KV cache each time it runs: several tokens are taken one by one only")
    else:
        assert report.notices == []


def test_a_short_prompt_on_a_static_cache():
    """It looks like a step of drafts, and who sends one wants to know what it costs."""
    past = tuple(CompressedKV.from_dense(torch.randn(2, 2, 40, 16), 0.5, 4, tokens=9) for _ in range(2))

    def step(q, k, v, start, past):
        position = start + torch.arange(q.shape[2])
        for cache, new in zip(past, (k, v), strict=True):
            cache.index_copy_(2, position, new)
        return F.scaled_dot_product_attention(q, *past, attn_mask=torch.arange(40) <= position.unsqueeze(1))

    inputs = *torch.randn(3, 2, 2, 8, 16), torch.tensor([9])
    expected = step(*inputs, [x.dense() for x in past])
    with warnings.catch_warnings(record=True) as caught, explain() as report:
        warnings.simplefilter("always")
        out = torch.compile(step, backend="mustafar")(*inputs, past)
    torch.testing.assert_close(out, expected)
    line = noticed(report, caught, "on a static cache 8 tokens are taken for a prompt, since its window is 4")
    assert "For a prompt that is as it should be; steps of drafts need a window of at least 8" in line


def test_layers_that_stay_dense():
    model, inputs = TupleModel(head_dim=12), embeddings(steps=3)
    with warnings.catch_warnings(record=True) as caught, explain() as report:
        warnings.simplefilter("always")
        run_steps(model, inputs, torch.compile(model.step, backend="mustafar", options=options(0.5)))
    assert report.graphs > 1
    noticed(report, caught, "1 of 1 attention layers of a graph run dense: head_dim 12 is not a multiple of 8")


def test_where_nothing_is_lost_nothing_is_said():
    """The first layer is to stay dense, the second has no cache."""
    model = TupleModel()

    def step(x):
        x, past = model.step(x, None)
        return F.scaled_dot_product_attention(*[x.view(2, 2, 7, 16)] * 3), past

    with warnings.catch_warnings(), explain() as report:
        warnings.simplefilter("error")
        torch.compile(step, backend="mustafar", options={"skip_layers": [0]})(*embeddings(steps=0))
    assert len(report.missed) == 2
    assert report.notices == []


def test_ordinary_generation_says_nothing():
    model, inputs = TupleModel(), embeddings(steps=6)
    with warnings.catch_warnings(), explain() as report:
        warnings.simplefilter("error")
        run_steps(model, inputs, torch.compile(model.step, backend="mustafar", options=options(0.5)))
    assert report.notices == []


def test_a_report_of_what_was_compiled_before_and_did_not_match():
    step = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="mustafar")
    with explain() as report:
        step(torch.ones(1, 1, 4, 8))
    assert (report.graphs, len(report.missed)) == (1, 1)
    with pytest.warns(UserWarning, match="What was compiled before is in the report"), explain() as later:
        step(torch.ones(1, 1, 4, 8))
    assert "what did not match then runs as it is" in str(later)


def test_nested_reports_close_in_any_order():
    """Reports in which nothing happened look alike."""
    outer, inner = explain(), explain()
    first, second = outer.__enter__(), inner.__enter__()
    with pytest.warns(UserWarning, match="nothing was compiled"):
        outer.__exit__(None, None, None)
    with pytest.warns(UserWarning, match="mustafar: a notice"):
        notices.notify("a notice")
    assert (first.notices, second.notices) == ([], ["a notice"])
    with pytest.warns(UserWarning, match="nothing was compiled"):
        inner.__exit__(None, None, None)
    assert notices.open_reports == []


class SlowReport(Report):
    """Another thread gets its turn between reading the number of calls and writing it."""

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name == "calls":
            time.sleep(1e-3)
        return value


def test_calls_of_all_threads_are_counted(monkeypatch):
    report = SlowReport()
    monkeypatch.setattr("mustafar_compile.reporting.explain.open_reports", [report])
    threads = [threading.Thread(target=lambda: [record_call() for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert report.calls == 80


def derivative(x):
    return torch.func.grad(lambda x: x.square().sum())(x)


class DerivedPrompt(TupleModel):
    """Of a prompt a derivative is taken, which cannot be traced again; a decode step is as ever."""

    def step(self, x, past):
        out, past = super().step(x, past)
        return derivative(out) if x.shape[1] > 1 else out, past


def test_a_layer_that_is_compressed_in_some_graphs_only():
    torch.manual_seed(0)
    model, inputs = DerivedPrompt(), embeddings(steps=3)
    with explain() as report:
        run(model, torch.compile(model.step, backend="mustafar", options=options(0.5)), inputs)
    (entry,) = report.missed
    assert entry.phases == ("decode",)
    assert entry.stored_bytes > 0
    assert "decode; else no: the graph could not be traced" in " ".join(str(report).split())


class SpelledOutPrompt(DerivedPrompt):
    def step(self, x, past):
        if past is not None:
            return super().step(x, past)
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        weights = (q @ k.repeat_interleave(2, 1).mT).softmax(-1)
        out = self.merge(weights @ v.repeat_interleave(2, 1))
        return derivative(out), (k, v)


def test_a_graph_with_attention_spelled_out_that_cannot_be_traced():
    torch.manual_seed(0)
    model, inputs = SpelledOutPrompt(), embeddings(steps=0)
    with warnings.catch_warnings(record=True) as caught, explain() as report:
        warnings.simplefilter("always")
        run(model, torch.compile(model.step, backend="mustafar", options=options(0.5)), inputs)
    noticed(report, caught, "a graph runs as it is: the graph could not be traced")
    assert len(report.missed) == 1


def test_dynamo_may_count_while_its_counts_are_read(monkeypatch):
    """It compiles what is called from a graph break, ours too."""

    class Reason(str):
        def startswith(self, *given):
            counts[f"a break in {len(counts)}"] = 1
            return super().startswith(*given)

    counts = {Reason("Dynamo recompile limit exceeded in f"): 2, Reason("another"): 1}
    monkeypatch.setitem(_compat.dynamo._counters, "unimplemented", counts)
    assert _compat.dynamo.recompile_limit_hits() == 2
