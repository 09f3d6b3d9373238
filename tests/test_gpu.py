"""On a CUDA device: the same graphs through Inductor's Triton code, memory from the allocator, CUDA graphs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from models import hf_model, prompt
from mustafar_compile import cache_stats, explain
from mustafar_compile.lowering import kernels
from mustafar_compile.lowering.layout import Layout, grown_capacity
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


KERNEL_SHAPE = {"head_dim": 64, "max_position_embeddings": 4096}  # head_dim 16 has no tuned kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_the_tuned_kernels_generate_what_dense_attention_does(how, dtype, monkeypatch):
    """Nothing is pruned, so only rounding differs; it is compared where the model is sure of its next token."""
    launched = set()
    tuned = kernels.Step.tuned
    monkeypatch.setattr(kernels.Step, "tuned", lambda step: launched.add(tuned(step) is not None) or tuned(step))
    model, inputs = hf_model(**KERNEL_SHAPE).cuda().to(dtype), on_gpu(prompt(length=100, padded=True))
    call = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    dense = model.generate(**inputs, **call)
    model.compile(backend="mustafar", options={"key_sparsity": 0.0, "value_sparsity": 0.0, "window": WINDOW})
    ours = model.generate(**inputs, **call, **how)
    assert launched == {True}
    scale = torch.stack(dense.logits).float().std()
    for step, (mine, other) in enumerate(zip(ours.logits, dense.logits, strict=True)):
        if not torch.equal(ours.sequences[:, : 100 + step], dense.sequences[:, : 100 + step]):
            break
        assert (mine.float() - other.float()).abs().max() < 0.1 * scale
    assert step >= 2


def test_one_cuda_graph_serves_all_generate_calls(monkeypatch):
    """The decode step over a static cache is recorded once: nothing is skipped, and a new cache takes no new graph."""
    counters.clear()
    model, inputs = hf_model(**KERNEL_SHAPE).cuda().to(torch.bfloat16), on_gpu(prompt(length=40))
    call = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**inputs, **call)
    options = {"key_sparsity": 0.0, "value_sparsity": 0.0, "window": WINDOW, "triton.cudagraphs": True}
    model.compile(backend="mustafar", options=options)
    first = [model.generate(**inputs, **call) for _ in range(4)]
    assert all(torch.equal(tokens, first[0]) for tokens in first)
    assert (first[0] == expected).float().mean() > 0.9
    assert counters["inductor"]["cudagraph_skips"] == 0, "nothing that a recorded step writes may move"
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    model.generate(**inputs, **call)
    assert len(replays) == call["max_new_tokens"] - 1
    assert len(set(replays)) == 1


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_the_allocator_holds_what_cache_stats_and_the_formula_say(how):
    model = hf_model(**KERNEL_SHAPE, num_hidden_layers=4).cuda().to(torch.bfloat16)
    inputs = on_gpu(prompt(length=4000))
    call = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    model.compile(backend="mustafar", options={"key_sparsity": 0.7, "value_sparsity": 0.7})
    model.generate(**inputs, **call, **how)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = model.generate(**inputs, **call, **how).past_key_values
    torch.cuda.synchronize()
    added, stats = torch.cuda.memory_allocated() - before, cache_stats(cache)
    assert stats.compressed_tensors == 8
    assert stats.ratio < 0.52
    capacity = grown_capacity(4000) if how == {} else 4003
    formula = 8 * Layout.of(64, 0.7, 32).stored_bytes(2, 2, capacity, 2)
    assert stats.stored_bytes == formula
    assert formula <= added <= formula * 1.03


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_prefill_never_holds_the_dense_cache_of_all_layers(how):
    """What a layer more adds to the peak is its compressed cache."""
    inputs = on_gpu(prompt(length=4000))
    call = {"max_new_tokens": 2, "do_sample": False, "logits_to_keep": 1}
    peaks = {}
    for layers in (4, 12):
        torch._dynamo.reset()
        model = hf_model(**KERNEL_SHAPE, num_hidden_layers=layers).cuda().to(torch.bfloat16)
        model.compile(backend="mustafar", options={"key_sparsity": 0.7, "value_sparsity": 0.7})
        model.generate(**inputs, **call, **how)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.generate(**inputs, **call, **how)
        peaks[layers] = torch.cuda.max_memory_allocated() - before
    tokens = grown_capacity(4000) if how == {} else 4001
    compressed = 8 * 2 * Layout.of(64, 0.7, 32).stored_bytes(2, 2, tokens, 2)
    assert peaks[12] - peaks[4] <= compressed * 1.03


SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer, which comes with CUDA")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    """Each tensor is allocated on its own, so that an access past its end is one past its allocation."""
    script = Path(__file__).with_name("sanitized_kernels.py")
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "1", sys.executable, script]
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    assert "0 errors" in run.stdout + run.stderr or "0 hazards" in run.stdout + run.stderr
