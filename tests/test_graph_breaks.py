"""Compressed caches where Dynamo breaks a graph, and what it makes of them in code that is no attention."""

from __future__ import annotations

import pytest
import torch

from models import run_from
from mustafar_compile import CompressedKV, explain
from test_cache_uses import tuple_model
from test_own_loops import assert_close, embeddings

pytestmark = [pytest.mark.usefixtures("no_grad", "uncompiled"), pytest.mark.filterwarnings("ignore:mustafar")]


def test_frames_that_run_op_by_op_read_the_cache():
    """SDPA takes no symbolic ``is_causal``, so TupleModel breaks there once the number of new tokens changed."""
    model, step = tuple_model(0.0)
    inputs = [torch.cat(embeddings(prefill=n, steps=0, seed=n), 1) for n in (9, 1, 3, 2, 1)]
    actual, past = run_from(step, inputs)
    assert isinstance(past[0], CompressedKV)
    assert_close(actual, run_from(model.step, inputs)[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :, -6:],
        lambda x: x.transpose(1, 2).transpose(1, 2),
        lambda x: x.reshape(x.shape),
    ],
)
def test_a_view_of_a_cache_goes_on_compressed(change):
    model, step = tuple_model(0.0)
    first, *others = embeddings(prefill=9, steps=5)
    expected, past = run_from(model.step, [first, others[0]])
    expected += run_from(model.step, others[1:], [change(x) for x in past])[0]
    with explain() as report:
        actual, past = run_from(step, [first, others[0]])
        after, past = run_from(step, others[1:], [change(x) for x in past])
    assert_close(actual + after, expected)
    assert isinstance(past[0], CompressedKV)
    assert report.calls == 6


def test_a_dense_copy_is_made_in_compiled_code():
    cache = CompressedKV.from_dense(torch.randn(2, 2, 20, 16), 0.5, 4)
    double = torch.compile(lambda cache: cache.dense() * 2, backend="mustafar")
    assert torch.equal(double(cache), cache.dense() * 2)
