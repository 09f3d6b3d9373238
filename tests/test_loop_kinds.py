"""``compile_loop`` around functions that run in parts: generators and coroutines."""

from __future__ import annotations

import asyncio

import pytest
import torch

from compilers import without_compiler
from models import TupleModel
from mustafar_compile import compile_loop, explain
from test_own_loops import embeddings, options

INPUTS = embeddings(prefill=9, steps=4)


def outputs_of(model):
    """What a loop yields, one step after the other."""
    past = None
    for x in INPUTS:
        with torch.no_grad():
            out, past = model.step(x, past)
        yield out


async def awaited(model):
    outputs = []
    for out in outputs_of(model):
        await asyncio.sleep(0)
        outputs.append(out)
    return outputs


async def streamed(model):
    for out in outputs_of(model):
        await asyncio.sleep(0)
        yield out


async def collected(stream):
    return [out async for out in stream]


def model():
    torch.manual_seed(0)
    return TupleModel()


KINDS = {
    "generator": (outputs_of, list),
    "decorated generator": (torch.no_grad()(outputs_of), list),
    "coroutine": (awaited, asyncio.run),
    "asynchronous generator": (streamed, lambda stream: asyncio.run(collected(stream))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_runs_compiled(kind):
    function, result_of = KINDS[kind]
    expected = list(outputs_of(model()))
    with without_compiler(), explain() as report:
        actual = result_of(compile_loop(**options(0.0))(function)(model()))
    torch.testing.assert_close(actual, expected)
    assert (report.calls, report.graphs) == (len(INPUTS), 2)


def test_a_generator_is_sent_to_thrown_at_and_closed():
    seen = []

    @compile_loop
    def echo():
        try:
            seen.append((yield 1))
            yield 2
        except KeyError:
            yield 3
        finally:
            seen.append("closed")

    parts = echo()
    assert [next(parts), parts.send("sent"), parts.throw(KeyError())] == [1, 2, 3]
    parts.close()
    assert seen == ["sent", "closed"]
