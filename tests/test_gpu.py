"""On a CUDA device: the same graphs through Inductor's Triton code, memory from the allocator, CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from models import hf_model, prompt
from mustafar_compile import cache_stats, explain
from reference import pruned_generation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WINDOW = 4


@pytest.fixture(autouse=True)
def _no_grad():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_tokens_equal_the_oracle(sparsity, how, mode):
    inputs = on_gpu(prompt(padded=True))
    call = {"max_new_tokens": 14, "do_sample": False}
    with pruned_generation(sparsity, sparsity, WINDOW):
        expected = hf_model().cuda().generate(**inputs, **call)
    model = hf_model().cuda()
    options = {"key_sparsity": sparsity, "value_sparsity": sparsity, "window": WINDOW}
    if mode == "reduce-overhead":
        options["triton.cudagraphs"] = True
    with explain() as report:
        model.compile(backend="mustafar", options=options)
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **call, **how), expected)
    assert len(report.matched) == 2
    assert not report.missed


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_the_allocator_holds_what_cache_stats_says(how):
    model = hf_model(max_position_embeddings=4096).cuda().to(torch.bfloat16)
    inputs = on_gpu(prompt(length=2000))
    call = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    model.compile(backend="mustafar", options={"key_sparsity": 0.7, "value_sparsity": 0.7})
    model.generate(**inputs, **call, **how)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = model.generate(**inputs, **call, **how).past_key_values
    torch.cuda.synchronize()
    added, stats = torch.cuda.memory_allocated() - before, cache_stats(cache)
    assert stats.compressed_tensors == 4
    assert stats.ratio < 0.7
    rounding = 16 * 512  # the allocator rounds each buffer up to 512 bytes
    assert added <= stats.stored_bytes * 1.03 + rounding
