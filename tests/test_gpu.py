"""On a CUDA device: the same graphs through Inductor's Triton code, memory from the allocator, CUDA graphs."""

from __future__ import annotations

import copy
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from architectures import build
from models import BufferModel, hf_model, prompt
from mustafar_compile import CompressedKV, ReleaseError, cache_stats, explain, prepare
from mustafar_compile.cache.release import is_released, release
from mustafar_compile.lowering import kernels
from mustafar_compile.lowering.checks import OUT_OF_PLACE, UNWRITTEN
from mustafar_compile.lowering.format import Format, grown_capacity
from ranked import ranked_generation
from reference import pruned_generation

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("fresh_dynamo"),
]

WINDOW = 4
STRATEGIES = "key_strategy", "value_strategy"


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
@pytest.mark.parametrize("strategies", [("output-aware", "magnitude"), ("think", "think")])
def test_strategies_keep_what_the_oracle_does(strategies, how):
    inputs, call = on_gpu(prompt(padded=True, length=14)), {"max_new_tokens": 40, "do_sample": False}
    with ranked_generation(strategies, 0.5, WINDOW):
        expected = hf_model().cuda().generate(**inputs, **call)
    with explain() as report:
        model = prepare(hf_model().cuda(), window=WINDOW, **dict(zip(STRATEGIES, strategies, strict=True)))
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **call, **how), expected)
    assert len(report.matched) == 2
    assert not report.notices


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_layers_that_share_a_cache(how):
    inputs, call = on_gpu(prompt(padded=True)), {"max_new_tokens": 8, "do_sample": False}
    with pruned_generation(0.5, 0.5, WINDOW):
        expected = build("gemma3n_text", "sdpa").cuda().generate(**inputs, **call)
    model = build("gemma3n_text", "sdpa").cuda()
    with explain() as report:
        model.compile(backend="mustafar", options={"window": WINDOW})
        assert torch.equal(model.generate(**inputs, **call, **how), expected)
    assert [entry.layer for entry in report.matched] == [1, 3]


KERNEL_SHAPE = {"head_dim": 64, "max_position_embeddings": 4096}  # head_dim 16 has no tuned kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_the_tuned_kernels_generate_what_dense_attention_does(how, dtype, monkeypatch):
    """Nothing is pruned, so only rounding differs; it is compared where the model is sure of its next token."""
    launched = set()
    tuned = kernels.Step.tuned
    monkeypatch.setattr(kernels.Step, "tuned", lambda *of: launched.add(tuned(*of) is not None) or tuned(*of))
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
    formula = 8 * Format.of(64, 0.7, 32).stored_bytes(2, 2, capacity, 2)
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
    compressed = 8 * 2 * Format.of(64, 0.7, 32).stored_bytes(2, 2, tokens, 2)
    assert peaks[12] - peaks[4] <= compressed * 1.03


def static_cache(model, slots, batch=2):
    """A static cache that belongs to the caller: allocated, dense, before anything is compiled."""
    from transformers import StaticCache

    cache, config = StaticCache(config=model.config, max_cache_len=slots), model.config
    sizes = {"num_heads": config.num_key_value_heads, "head_dim": config.head_dim}
    cache.early_initialization(batch_size=batch, **sizes, dtype=model.dtype, device=model.device)
    return cache


@pytest.mark.parametrize("cudagraphs", [False, True])
def test_release_generates_what_the_oracle_does_in_two_turns(cudagraphs):
    """The second turn is a prompt over released caches."""
    from transformers import DynamicCache

    def generate(model, cache):
        call = {"max_new_tokens": 10, "do_sample": False, "past_key_values": cache}
        first = model.generate(**on_gpu(prompt()), **call)
        more = torch.cat([first, prompt(length=20, seed=2)["input_ids"].cuda()], 1)
        return model.generate(input_ids=more, attention_mask=torch.ones_like(more), **call)

    with pruned_generation(0.5, 0.5, WINDOW):
        expected = generate(hf_model().cuda(), DynamicCache())
    model = hf_model().cuda()
    cache = static_cache(model, slots=64)
    options = {"window": WINDOW, "release_dense": True, "triton.cudagraphs": cudagraphs}
    model.compile(backend="mustafar", options=options)
    assert torch.equal(generate(model, cache), expected)
    assert cache_stats(cache).stored_bytes == 4 * Format.of(16, 0.5, WINDOW).stored_bytes(2, 2, 64, 4)
    with pytest.raises(RuntimeError, match="release_dense=True"):
        cache.reset()


def test_release_gives_the_memory_back_to_the_allocator():
    """The prefill is eager and fills the cache densely; the first decode step compresses it."""
    from transformers import CompileConfig

    model = hf_model(**KERNEL_SHAPE, num_hidden_layers=4).cuda().to(torch.bfloat16)
    options = {"key_sparsity": 0.7, "value_sparsity": 0.7, "release_dense": True}
    call = {
        "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "cache_implementation": "static",
        "compile_config": CompileConfig(backend="mustafar", mode=None, options=options),
    }  # fmt: skip
    inputs = on_gpu(prompt(length=4000))
    model.generate(**inputs, **call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = model.generate(**inputs, **call).past_key_values
    torch.cuda.synchronize()
    added, formula = torch.cuda.memory_allocated() - before, 8 * Format.of(64, 0.7, 32).stored_bytes(2, 2, 4003, 2)
    assert cache_stats(cache).stored_bytes == formula
    assert formula <= added <= formula * 1.03


TOUCHES = {
    "read": lambda cache, view: cache.sum(),
    "read by attention": lambda cache, view: F.scaled_dot_product_attention(cache, cache, cache),
    "write": lambda cache, view: cache.zero_(),
    "write rows": lambda cache, view: cache.index_copy_(2, torch.tensor([1]).cuda(), torch.ones(2, 2, 1, 16).cuda()),
    "write many": lambda cache, view: torch._foreach_add_([cache], 1.0),
    "old view": lambda cache, view: view + 1,
    "write through an old view": lambda cache, view: view.fill_(1),
    "new view": lambda cache, view: cache[:, :, 2:4].clone(),
    "print": lambda cache, view: print(cache),
    "move": lambda cache, view: cache.cpu(),
    "copy": lambda cache, view: torch.empty_like(cache).copy_(cache),
    "deepcopy": lambda cache, view: copy.deepcopy(cache),
    "deepcopy of an old view": lambda cache, view: copy.deepcopy([view]),
    "save": lambda cache, view: torch.save(cache, io.BytesIO()),
    "address": lambda cache, view: cache.data_ptr(),
    "storage": lambda cache, view: cache.untyped_storage().cpu(),
    "grow the storage": lambda cache, view: [cache.untyped_storage().resize_(1 << 16), cache.sum()],
    "compiled": lambda cache, view: torch.compile(lambda x: x * 2)(cache),
    "compiled write": lambda cache, view: torch.compile(lambda x: x.mul_(2))(cache),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_release_lets_a_later_touch_raise_and_the_context_live(touch):
    cache = torch.ones(2, 2, 48, 16, device="cuda")
    view = cache.transpose(1, 2)[:, 3:]
    release(cache)
    with pytest.raises(RuntimeError, match="release_dense=True"):
        touch(cache, view)
    assert (torch.ones(1000, device="cuda") * 2).sum().item() == 2000


def test_release_ends_a_recorded_cuda_graph_that_reads_the_cache():
    cache = torch.ones(2, 2, 48, 16, device="cuda")
    read = torch.compile(lambda x: x * 2, mode="reduce-overhead")
    for _ in range(3):
        read(cache)
    release(cache)
    with pytest.raises(RuntimeError, match="release_dense=True"):
        read(cache)
    assert (torch.ones(1000, device="cuda") * 2).sum().item() == 2000


def test_release_of_caches_that_share_memory_is_refused():
    torch.manual_seed(0)
    model = BufferModel().cuda()
    model.k_cache, model.v_cache = torch.ones(2, *model.k_cache.shape, device="cuda")
    step = torch.compile(model.step, backend="mustafar", options={"window": WINDOW, "release_dense": True})
    with pytest.raises(Exception, match="alone in their memory") as caught:
        step(torch.randn(2, 1, 32, device="cuda"), torch.tensor([3], device="cuda"))
    assert ReleaseError.__name__ in str(caught.value)
    assert (model.k_cache == 1).all()
    assert (model.v_cache == 1).all()


def test_release_again_after_the_caller_gives_new_memory():
    torch.manual_seed(0)
    model = BufferModel().cuda()
    options = {"key_sparsity": 0.0, "value_sparsity": 0.0, "window": WINDOW}
    step = torch.compile(model.step, backend="mustafar", options=options | {"release_dense": True})
    x, position = torch.randn(2, 1, 32, device="cuda"), torch.tensor([3], device="cuda")
    step(x, position)
    for cache in (model.k_cache, model.v_cache):
        cache.data = torch.randn(cache.shape, device="cuda")
    twin = copy.deepcopy(model)
    torch.testing.assert_close(step(x, position), twin.step(x, position), rtol=1e-4, atol=1e-5)
    assert is_released(model.k_cache)
    assert is_released(model.v_cache)


def test_positions_may_be_of_the_host():
    """As in eager code, where an indexed assignment takes an index of the host into a buffer of the GPU."""
    torch.manual_seed(0)
    model = BufferModel(heads=4, kv_heads=2, head_dim=64).cuda()
    inputs = [torch.randn(2, tokens, 32, device="cuda") for tokens in (30, 1, 1)]
    starts = [torch.arange(30), torch.tensor([30]), torch.tensor([31])]
    expected = [model.step(x, at) for x, at in zip(inputs, starts, strict=True)]
    model.k_cache.zero_(), model.v_cache.zero_()
    step = torch.compile(model.step, backend="mustafar", options={"key_sparsity": 0.0, "value_sparsity": 0.0})
    with explain() as report:
        for x, at, out in zip(inputs, starts, expected, strict=True):
            torch.testing.assert_close(step(x, at), out, rtol=1e-4, atol=1e-4)
    assert len(report.matched) == 1
    assert report.launching == ["decode steps run without CUDA graphs: its inputs are on cpu and cuda:0"]


@pytest.mark.parametrize(("what", "message"), [("nothing", ""), ("position", OUT_OF_PLACE), ("mask", UNWRITTEN)])
def test_a_step_fails_on_the_device_where_something_is_bad(what, message):
    """In a process of its own, whose CUDA context a failed assertion ends."""
    script = Path(__file__).with_name("failing_steps.py")
    run = subprocess.run([sys.executable, script, what], capture_output=True, text=True, check=False)
    assert (run.returncode != 0) == bool(message), run.stderr[-4000:]
    assert message in run.stderr


SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer, which comes with CUDA")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    """Each tensor is allocated on its own, so that an access past its end is one past its allocation."""
    script = Path(__file__).with_name("sanitized_kernels.py")
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "1", sys.executable, script, tool]
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    assert "0 errors" in run.stdout + run.stderr or "0 hazards" in run.stdout + run.stderr


def test_a_cache_that_moves_stands_as_the_kernels_there_want_it():
    on_cpu = CompressedKV.from_dense(torch.randn(2, 2, 75, 40), 0.5, 8)
    on_gpu = on_cpu.cuda()
    assert (on_cpu.format.order, on_gpu.format.order, on_gpu.cpu().format.order) == ("rows", "blocks", "rows")
    for moved in (on_gpu, on_gpu.cpu()):
        assert torch.equal(moved.dense().cpu(), on_cpu.dense())
    aside = on_gpu.to("cpu", non_blocking=True)  # as a cache that is offloaded
    torch.cuda.synchronize()
    assert aside.format.order == "blocks"
    assert torch.equal(aside.dense(), on_cpu.dense())
