"""What Inductor makes of a model: the right values, and decode steps that read and update the cache where it lies."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from compilers import allocations
from models import BufferModel, TupleModel, run_steps
from mustafar_compile.lowering.buffers import blocks_for
from mustafar_compile.lowering.format import grown_capacity
from test_own_loops import assert_close, embeddings, options, oracle

SLOTS, HEADS, HEAD_DIM, KEPT = 1000, 2, 32, 16


@pytest.mark.nightly  # by day test_native.py shows as much of C++ kernels, and test_inductor_ops.py of this code
@pytest.mark.parametrize("form", [BufferModel, TupleModel])
def test_a_decode_step_gives_the_same_and_copies_no_cache(form):
    torch.manual_seed(0)
    torch._dynamo.reset()
    sizes = {"heads": 4, "kv_heads": HEADS, "head_dim": HEAD_DIM}
    model = form(**sizes) if form is TupleModel else form(slots=SLOTS, **sizes)
    inputs = embeddings(SLOTS - 100, steps=3)
    with torch.no_grad():
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        outputs, (_, *codes) = run_and_get_code(run_steps, model, inputs, step)
        assert_close(outputs, oracle(model, inputs, 0.5))
    rows = 2 * HEADS * (SLOTS - 100)
    for code in codes:
        sizes = allocations(code, blocks_for(grown_capacity(SLOTS)))
        assert sizes, "the pattern finds no allocation at all"
        assert max(sizes) < rows * KEPT * 4, "a buffer as large as the packed values, or larger"
