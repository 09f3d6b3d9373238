"""Compiled code is found again in torch's caches on disk, and never what other settings or other code of ours made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from models import BufferModel, run_steps
from mustafar_compile import _compat, backend
from mustafar_compile.digest import code_digest
from test_own_loops import embeddings


def looked_up():
    """(hits, misses) in AOTAutograd's cache."""
    found = counters["aot_autograd"]
    return found["autograd_cache_hit"], found["autograd_cache_miss"]


def compiled_step(**options):
    """A decode step is compiled now. What was looked up for it."""
    torch.manual_seed(0)
    model = BufferModel(slots=16)
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        inputs = embeddings(steps=1)
        run_steps(model, inputs[:1])
        step = torch.compile(model.step, backend="mustafar", options=options)
        step(inputs[1], torch.arange(7, 8))
    return looked_up()


@pytest.fixture
def _empty():
    with fresh_cache():
        yield


@pytest.mark.nightly
@pytest.mark.usefixtures("_empty")
def test_a_step_compiled_again_is_found(monkeypatch):
    assert compiled_step(window=4) == (0, 1)
    assert compiled_step(window=4) == (1, 0)
    assert compiled_step(window=5) == (0, 1), "another setting"
    monkeypatch.setattr(backend, "code_digest", lambda: "of another version")
    assert compiled_step(window=4) == (0, 1), "other code of ours"


@pytest.mark.usefixtures("_empty")
def test_our_code_is_part_of_the_key():
    for digest, expected in (("a", (0, 1)), ("a", (1, 0)), ("b", (0, 1))):
        torch._dynamo.reset()
        counters.clear()
        with _compat.inductor.configured({}, digest):
            torch.compile(torch.mm)(torch.ones(1, 1), torch.ones(1, 1))  # needs no C++
        assert looked_up() == expected


@pytest.mark.parametrize("name", ["portable.py", "append.py.jinja", "backend.py", "rewriter.py"])
def test_the_digest_is_of_all_code(name, monkeypatch):
    before, read = code_digest(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == name))
    assert code_digest.__wrapped__() != before
