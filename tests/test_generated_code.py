"""What Inductor makes of a decode step: the cache is read and updated where it lies."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from compilers import allocations
from models import BufferModel, TupleModel
from mustafar_compile.lowering.format import blocks_for, grown_capacity

SLOTS, HEADS, HEAD_DIM, KEPT = 1000, 2, 32, 16


@pytest.mark.parametrize("form", [TupleModel, BufferModel])
def test_a_decode_step_copies_no_cache(form):
    torch.manual_seed(0)
    torch._dynamo.reset()
    sizes = {"heads": 4, "kv_heads": HEADS, "head_dim": HEAD_DIM}
    model = form(**sizes) if form is TupleModel else form(slots=SLOTS, **sizes)
    prompt, token = torch.randn(2, SLOTS - 100, 32), torch.randn(2, 1, 32)
    with torch.no_grad():
        step = torch.compile(model.step, backend="mustafar", options={"key_sparsity": 0.5, "value_sparsity": 0.5})
        if form is TupleModel:
            _, past = step(prompt, None)
            _, (code,) = run_and_get_code(step, token, past)
        else:
            step(prompt, torch.arange(SLOTS - 100))
            _, (code,) = run_and_get_code(step, token, torch.tensor([SLOTS - 100]))
    rows = 2 * HEADS * (SLOTS - 100)
    sizes = allocations(code, blocks_for(grown_capacity(SLOTS)))
    assert sizes, "the pattern finds no allocation at all"
    assert max(sizes) < rows * KEPT * 4, "a buffer as large as the packed values, or larger"
    assert "aten.clone" not in code
