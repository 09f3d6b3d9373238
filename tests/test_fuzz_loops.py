"""Random hand-written models whose buffers are written by slices: every step equals the pruned oracle."""

from __future__ import annotations

import functools

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compilers import without_inductor
from models import SliceModel, pruned_steps, run_steps
from mustafar_compile import explain
from reference import reference_attention


@st.composite
def cases(draw):
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "sizes": {
            "kv_heads": kv_heads,
            "heads": kv_heads * draw(st.sampled_from([1, 2, 3, 5])),
            "head_dim": draw(st.sampled_from([8, 16, 24, 40])),
        },
        "batch": draw(st.integers(1, 3)),
        "prefill": draw(st.integers(2, 40)),
        "steps": draw(st.integers(1, 7)),
        "options": {
            "key_sparsity": draw(st.sampled_from([0.0, 0.5, 0.7])),
            "value_sparsity": draw(st.sampled_from([0.0, 0.5, 0.9])),
            "window": draw(st.integers(1, 12)),
        },
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=settings().max_examples // 4, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_every_step_equals_the_oracle(case):
    torch.manual_seed(case["seed"])
    model = SliceModel(batch=case["batch"], **case["sizes"])
    inputs = [torch.randn(case["batch"], tokens, 32) for tokens in (case["prefill"], *[1] * case["steps"])]
    with torch.no_grad(), without_inductor(), explain() as report:
        expected = pruned_steps(model, inputs, functools.partial(reference_attention, **case["options"]))
        step = torch.compile(model.step, backend="mustafar", options=case["options"])
        actual = run_steps(model, inputs, step)
    torch.testing.assert_close(torch.cat(actual, 1), torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
    assert len(report.matched) == 1, str(report)
