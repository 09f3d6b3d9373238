"""Random hand-written models with caches of their own: every step equals the pruned oracle."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import seeds
from compilers import without_compiler
from conftest import SHARDS, sharded
from models import BufferModel, SliceModel, TokensFirstModel, TupleModel, WhereModel, pruned_steps, run_steps
from mustafar_compile import explain
from ragged_models import FORMS, RaggedModel, pruned, run, steps_at
from reference import reference_attention

UNIFORM = [BufferModel, SliceModel, TupleModel, TokensFirstModel, WhereModel]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@st.composite
def cases(draw):
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "form": draw(st.sampled_from([*UNIFORM, *FORMS.values()])),
        "sizes": {
            "kv_heads": kv_heads,
            "heads": kv_heads * draw(st.sampled_from([1, 2, 3, 5])),
            "head_dim": draw(st.sampled_from([8, 16, 24, 40])),
            "value_dim": draw(st.sampled_from([8, 16, 32])),
        },
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "batch": draw(st.integers(1, 3)),
        "prefill": draw(st.integers(2, 40)),
        "steps": draw(st.integers(1, 7)),
        "options": {
            "key_sparsity": draw(st.sampled_from([0.0, 0.5, 0.7])),
            "value_sparsity": draw(st.sampled_from([0.0, 0.5, 0.9])),
            "window": draw(st.integers(1, 12)),
        },
        "seed": draw(seeds),
    }


@st.composite
def places(draw, batch: int, prefill: int, steps: int):
    """Where each row of the batch writes at each step: it goes on or is rewound to where it likes."""
    written, found = [prefill] * batch, []
    for _ in range(steps):
        found.append([draw(st.sampled_from([n, max(n - 2, 0), 0]) | st.integers(0, n)) for n in written])
        written = [at + 1 for at in found[-1]]
    return found


@pytest.mark.parametrize("shard", range(SHARDS))
@settings(max_examples=sharded(settings().max_examples // 4), suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), data=st.data())
def test_every_step_equals_the_oracle(shard, case, data):
    torch.manual_seed(case["seed"])
    form, dtype, batch = case["form"], case["dtype"], case["batch"]
    buffers = {} if form in (TupleModel, TokensFirstModel) else {"batch": batch, "dtype": dtype}
    model = form(**buffers, **case["sizes"]).to(dtype)
    with torch.no_grad(), without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=case["options"])
        if issubclass(form, RaggedModel):
            at = data.draw(places(batch, case["prefill"], case["steps"]))
            steps = steps_at(at, case["prefill"], case["seed"], dtype)
            expected, actual = pruned(model, steps, case["options"]), run(step, steps)
        else:
            inputs = [torch.randn(batch, n, 32, dtype=dtype) for n in (case["prefill"], *[1] * case["steps"])]
            expected = pruned_steps(model, inputs, functools.partial(reference_attention, **case["options"]))
            actual = run_steps(model, inputs, step)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(torch.cat(actual, 1), torch.cat(expected, 1), rtol=tolerance, atol=tolerance)
    assert len(report.matched) == 1, str(report)
