"""A stage that fails by an error of ours: the graph runs as it is, the values are right, and users are told once."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from models import BufferModel, SliceModel, TupleModel, run_steps
from mustafar_compile import CompressedKV, CompressedWriteError, ReleaseError, backend, explain
from mustafar_compile.patterns import match
from mustafar_compile.patterns.attention import find
from mustafar_compile.patterns.graph import normalise
from nightly import mostly_at_night
from test_own_loops import assert_close, embeddings, options

pytestmark = [pytest.mark.usefixtures("new_notices", "no_grad", "uncompiled"), pytest.mark.filterwarnings("ignore")]
STAGES = {
    "traced": (backend, "normalise"),
    "matched": (backend, "find_matches"),
    "rewritten": (backend.Rewriter, "run"),
    "rewritten, at its end": (backend, "add_calling_convention"),
}


def failing_after(monkeypatch, owner, name, error=None):
    """Let a function do its work, all that it changes included, and fail then."""
    original = getattr(owner, name)

    def fail(*args, **kwargs):
        original(*args, **kwargs)
        raise error or KeyError("a bug of ours\nand more")

    monkeypatch.setattr(owner, name, fail)


@pytest.fixture(params=STAGES)
def stage(request, monkeypatch):
    """The stage that fails."""
    failing_after(monkeypatch, *STAGES[request.param])
    return request.param.split(",")[0]


FORMS = [BufferModel, SliceModel, TupleModel]
EVERY_DAY = {(stage, FORMS[i % 3]) for i, stage in enumerate(STAGES)}
CASES = sorted(itertools.product(STAGES, FORMS), key=lambda case: case not in EVERY_DAY)


@pytest.mark.parametrize(("stage", "form"), mostly_at_night(CASES, len(STAGES)), indirect=["stage"])
def test_values_are_right_and_one_warning_says_why(form, stage, caplog):
    torch.manual_seed(0)
    model, inputs = form(), embeddings(steps=4)
    expected = run_steps(model, inputs)
    with warnings.catch_warnings(record=True) as caught, explain() as report:
        warnings.simplefilter("always")
        outputs = run_steps(model, inputs, torch.compile(model.step, backend="mustafar", options=options(0.5)))
    assert_close(outputs, expected)
    reason = f"the graph could not be {stage}: KeyError: 'a bug of ours\\nand more'"
    assert [str(w.message) for w in caught if "mustafar" in str(w.message)] == [
        f"mustafar: a graph runs as it is: {reason}"
    ]
    assert report.notices == [f"a graph runs as it is: {reason}"]
    assert {entry.reason for entry in report.missed} == {reason}
    assert not report.matched
    records = [record for record in caplog.records if record.exc_info]
    assert len(records) == report.graphs
    assert all("a bug of ours" in str(record.exc_info[1].__cause__) for record in records)


def test_a_compressed_cache_goes_on_op_by_op(stage):
    torch.manual_seed(0)
    model, x = TupleModel(), torch.randn(2, 1, 32)
    past = tuple(CompressedKV.from_dense(torch.randn(2, 2, 40, 16), 0.5, 4) for _ in range(2))
    expected, grown = model.step(x, tuple(cache.dense() for cache in past))
    out, after = torch.compile(model.step, backend="mustafar")(x, past)
    torch.testing.assert_close(out, expected)
    for mine, theirs in zip(after, grown, strict=True):
        assert torch.equal(mine, theirs)


def static_cache():
    return CompressedKV.from_dense(torch.randn(2, 2, 40, 16), 0.5, 4, tokens=9)


def test_a_write_into_a_compressed_cache_is_done_or_refused_op_by_op(stage):
    """Never lost. What the stages refuse, they refuse before they fail."""
    position, new = torch.tensor([9]), torch.randn(2, 2, 1, 16)

    def copied(cache):
        return torch.softmax(cache.index_copy_(2, position, new), -1)

    def assigned(cache):
        cache[:, :, position] = new
        return torch.softmax(cache, -1)

    cache = static_cache()
    torch.compile(copied, backend="mustafar")(cache)
    torch.testing.assert_close(cache.dense()[:, :, 9:10], new)
    cache = static_cache()
    before = cache.dense()
    with pytest.raises(CompressedWriteError, match="cannot write into a compressed KV cache"):
        torch.compile(assigned, backend="mustafar")(cache)
    assert torch.equal(cache.dense(), before)


def test_under_raise_errors_it_is_raised(stage):
    step = torch.compile(TupleModel().step, backend="mustafar", options={"raise_errors": True})
    with pytest.raises(Exception, match="KeyError: 'a bug of ours"):
        step(torch.randn(2, 7, 32), None)


def test_under_strict_the_reason_is_raised(stage):
    step = torch.compile(TupleModel().step, backend="mustafar", options={"strict": True})
    with pytest.raises(Exception, match=f"NothingMatchedError: .*the graph could not be {stage}: KeyError"):
        step(torch.randn(2, 7, 32), None)


@pytest.mark.parametrize(("owner", "name"), STAGES.values())
def test_errors_for_users_are_raised(owner, name, monkeypatch):
    failing_after(monkeypatch, owner, name, ReleaseError("cannot be released"))
    with pytest.raises(Exception, match="ReleaseError: cannot be released"):
        torch.compile(TupleModel().step, backend="mustafar")(torch.randn(2, 7, 32), None)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (normalise.Interpreter, "call_function"),
        (find, "read_sdpa"),
        (match, "find_update"),
        (match, "check_cache"),
        (backend.Rewriter, "_prefill"),
    ],
)
def test_the_line_of_the_model_is_named(owner, name, monkeypatch):
    failing_after(monkeypatch, owner, name)
    with explain() as report:
        torch.compile(TupleModel().step, backend="mustafar")(torch.randn(2, 7, 32), None)
    (entry,) = report.missed
    assert "a bug of ours" in entry.reason
    if torch.__version__ >= "2.13":  # of a method that is compiled, older versions of Dynamo do not tell the line
        assert " at models.py:" in entry.reason
