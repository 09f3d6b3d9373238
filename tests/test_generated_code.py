"""What Inductor makes of a model: the right values, and decode steps that read and update the cache where it lies."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import get_code, run_and_get_code

from compilers import allocations
from models import BufferModel, TupleModel, run_steps
from mustafar_compile.lowering import builds
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


class JoinedModel(BufferModel):
    """Whose queries, keys and values come from one product."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = self.heads, self.kv_heads, self.kv_heads
        self.qkv = nn.Linear(32, sum(self.joined) * self.head_dim)

    def project(self, x):
        return self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.joined, dim=2)


STEP = re.compile(r"decode_attention_kernel\.default\((.*?), \[.*?\], \[.*?\], '[^']*', '[^']*', (\w+),")


@pytest.mark.native
@pytest.mark.filterwarnings("ignore:mustafar. a C.. kernel could not be built")  # nor is one wanted
def test_layers_take_parts_of_a_product_as_they_are_and_one_position():
    torch._dynamo.reset()
    layers = nn.Sequential(JoinedModel(), JoinedModel())

    def step(x, positions):
        return layers[1].step(layers[0].step(x, positions), positions)

    nowhere = torch._inductor.config.patch(fx_graph_cache=False)  # for it is not compiled any further
    with (
        torch.no_grad(),
        builds.building_nothing(),
        nowhere,
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        compiled = torch.compile(step, backend="mustafar", fullgraph=True, options=options(0.5))
        code, *_ = get_code(compiled, torch.randn(2, 1, 32), torch.tensor([9]))
    (first, position), (second, same) = STEP.findall(code)
    assert position == same
    for rows in (first, second):
        parts = re.findall(r"reinterpret_tensor\((\w+), \(2, \d, 1, 16\), \(128, 16, 128, 1\), (\d+)\)", rows)
        assert [int(offset) for _, offset in parts] == [0, 64, 96], rows
        assert len({buffer for buffer, _ in parts}) == 1
