"""Attention of compiled prompts: what dense attention gives, without a mask of the square of their length."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode

from models import hf_model, prompt
from mustafar_compile import _compat
from mustafar_compile.backend import mustafar
from mustafar_compile.lowering import band, ops
from mustafar_compile.patterns.attention.band import read_band
from mustafar_compile.planning.live_bytes import LiveBytes
from nightly import at_night

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

TOKENS = 41  # no other size of a model
aten = torch.ops.aten


@dataclass(frozen=True)
class Band:
    """A band, and the sizes of what is attended under it. columns: a kind of them."""

    batch: int = 2
    queries: int = 9
    keys: int = 9
    last: int = 0
    first: int | None = None
    columns: str = "all"

    def columns_by(self, generator):
        return {
            "none": None,
            "all": torch.ones(self.batch, 1, 1, self.keys, dtype=torch.bool),
            "some": torch.rand(self.batch, 1, 1, self.keys, generator=generator) < 0.7,
            "one for all": torch.rand(1, 1, 1, 1, generator=generator) < 0.5,
        }[self.columns]


BANDS = st.builds(
    Band,
    batch=st.integers(1, 2),
    queries=st.integers(2, 20),
    keys=st.integers(2, 20),
    last=st.integers(-3, 12),
    first=st.none() | st.integers(-9, 3),
    columns=st.sampled_from(["none", "all", "some", "one for all"]),
)


def whole_mask(shape, columns):
    """The mask that is never made."""
    distance = torch.arange(shape.keys) - torch.arange(shape.queries).unsqueeze(1)
    admitted = distance <= shape.last
    if shape.first is not None:
        admitted &= distance > shape.first
    return admitted if columns is None else admitted & columns


@given(shape=BANDS, kv_heads=st.sampled_from([1, 2, 4]), rows=st.sampled_from([1, 4, 64]), seed=st.integers(0, 99))
@example(shape=Band(), kv_heads=2, rows=64, seed=0)  # causal
@example(shape=Band(keys=14), kv_heads=2, rows=64, seed=0)  # a static cache: the last keys are no one's
@example(shape=Band(keys=14, last=5), kv_heads=2, rows=4, seed=0)  # on top of a cache
@example(shape=Band(keys=12, last=5), kv_heads=2, rows=4, seed=0)  # the last queries could see more keys than there are
@example(shape=Band(keys=5), kv_heads=2, rows=4, seed=0)
@example(shape=Band(first=-3), kv_heads=4, rows=4, seed=0)  # a sliding window
@example(shape=Band(columns="some"), kv_heads=4, rows=4, seed=0)  # padding
@pytest.mark.parametrize("dtype", [torch.float32, *at_night([torch.bfloat16])])
def test_a_band_is_attended_as_its_mask_says(device, dtype, shape, kv_heads, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(shape.batch, 4, shape.queries, 16, generator=generator).to(device, dtype)
    key, value = torch.randn(2, shape.batch, kv_heads, shape.keys, 16, generator=generator).to(device, dtype)
    columns = shape.columns_by(generator)
    mask = whole_mask(shape, columns).to(device)
    repeated = (x.repeat_interleave(4 // kv_heads, 1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, mask, scale=0.3).transpose(1, 2)
    columns = None if columns is None else columns.to(device)
    edges = (None if x is None else torch.tensor(x, device=device) for x in (shape.last, shape.first))
    limits = ops.band_limits(*edges, columns)
    assert limits.device.type == "cpu"
    with mock.patch.object(band, "_MOST_ROWS", rows):
        actual = ops.band_attention(query, key, value, columns, limits, 0.3)
    rounding = {} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(actual, expected, **rounding)


def test_what_all_see_takes_the_kernel_for_causal_attention():
    x = torch.randn(1, 2, 9, 16)
    columns = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    columns[..., 9:] = False  # what a static cache has room for besides
    limits = ops.band_limits(torch.tensor(0), None, columns)
    keys = F.pad(x, (0, 0, 0, 3), value=torch.nan)
    with mock.patch.object(band, "_by_blocks", side_effect=AssertionError("by blocks")):
        actual = ops.band_attention(x, keys, keys, columns, limits, 0.25)
    assert torch.equal(actual.transpose(1, 2), F.scaled_dot_product_attention(x, x, x, is_causal=True))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_padded_prompt_takes_no_memory_of_its_square(kv_heads):
    tokens = 3000
    query, key = torch.randn(1, 2, tokens, 8), torch.randn(1, kv_heads, tokens, 8)
    columns = torch.arange(tokens).view(1, 1, 1, -1) > 10
    limits = ops.band_limits(torch.tensor(0), None, columns)
    with LiveBytes() as meter:
        band.band_attention(query, key, key, columns, limits, 0.3)  # not the op, which is one to the meter
    assert meter.peak < tokens**2 / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("past", [0, 4096])
@pytest.mark.parametrize("padded", [False, True])
def test_no_mask_on_a_gpu(past, padded):
    tokens = 16384
    query = torch.randn(2, 8, tokens, 64, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(2, 2, tokens + past, 64, device="cuda", dtype=torch.bfloat16)
    columns = torch.arange(tokens + past, device="cuda").view(1, 1, 1, -1) >= padded
    limits = ops.band_limits(torch.tensor(past, device="cuda"), None, columns)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.band_attention(query, key, key, columns, limits, 0.3)
    assert torch.cuda.max_memory_allocated() - before < tokens**2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_prompt_on_a_gpu_has_no_code_for_the_cpu():
    """Before its first C++ Inductor tries out what the processor has, which takes half a minute."""
    model = hf_model(num_hidden_layers=1).cuda()
    compiled = torch.compile(model, backend="mustafar", fullgraph=True, dynamic=True)
    inputs = {name: tensor.cuda() for name, tensor in padded(9, 0).items()}
    _, codes = run_and_get_code(lambda: compiled(**inputs, use_cache=True))
    assert not any("async_compile.cpp" in code for code in codes)


def read(mask_of, queries=7, keys=9):
    """What is read of the mask that a function of positions and padding makes, once it is traced."""

    def attend(padding, offset):
        q, k = torch.arange(queries), torch.arange(keys)
        return (mask_of(q, k, padding, offset),)

    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(torch.ones(2, keys, dtype=torch.bool)), mode.from_tensor(torch.tensor(5))
    with _compat.tracing.tracing_functionally(mode):
        traced, _ = _compat.tracing.make_functional_fx(attend, fakes)
    return read_band(traced.graph.output_node().args[0][0], queries)


READ = {  # of positions and padding; whether it begins at key 0, whether it slides, and how many columns it has
    "causal": (lambda q, k, p, o: k <= q[:, None], (True, False, 0)),
    "swapped": (lambda q, k, p, o: q[:, None] >= k[None], (True, False, 0)),
    "less": (lambda q, k, p, o: k < q[:, None] + 1, (True, False, 0)),
    "swapped less": (lambda q, k, p, o: q[:, None] > k - 1, (True, False, 0)),
    "broadcast": (lambda q, k, p, o: (k <= q[:, None])[None, None].expand(2, 1, -1, -1), (True, False, 0)),
    "padding": (lambda q, k, p, o: (k <= q[:, None])[None, None] & p[:, None, None], (True, False, 1)),
    "looked up": (lambda q, k, p, o: (k <= q.view(1, 1, -1, 1)) & p[:, k][:, None, None], (True, False, 1)),
    "moved": (lambda q, k, p, o: k <= q[:, None] + 2, (False, False, 0)),
    "from an input": (lambda q, k, p, o: k <= (q + o)[:, None], (False, False, 0)),
    "from two inputs": (lambda q, k, p, o: k <= (q + o + o)[:, None], (False, False, 0)),
    "sliding": (lambda q, k, p, o: (k <= q[:, None]) & (k > q[:, None] - 3), (False, True, 0)),
    "sliding ends": (lambda q, k, p, o: (q[:, None] >= k) & (q[:, None] - 3 <= k), (False, True, 0)),
}
OTHERS = {
    "a triangle": lambda q, k, p, o: torch.ones(7, 9, dtype=torch.bool).tril(),
    "or": lambda q, k, p, o: (k <= q[:, None]) | p[:, None, None],
    "of chunks": lambda q, k, p, o: (k <= q[:, None]) & (k // 4 == q[:, None] // 4),
    "of rows": lambda q, k, p, o: (k <= q[:, None]) & (q[:, None] > 3),
    "by twos": lambda q, k, p, o: k * 2 <= q[:, None],
    "moved each": lambda q, k, p, o: k <= q[:, None] + p[0].to(torch.int64).cumsum(0)[:7, None],
    "columns alone": lambda q, k, p, o: p[:, None, None].expand(2, 1, 7, 9),
    "a window alone": lambda q, k, p, o: k > q[:, None] - 3,
    "additive": lambda q, k, p, o: torch.where(k <= q[:, None], 0.0, -torch.inf),
    "rows made a batch": lambda q, k, p, o: ((k[:7] <= q[:, None]) & p[:, None, :7]).unsqueeze(1).unsqueeze(1),
    "moved in more dimensions": lambda q, k, p, o: k <= (q + o.view(1, 1)).mT,
    "not": lambda q, k, p, o: ~(k > q[:, None]),
}


@pytest.mark.parametrize("name", READ)
def test_what_a_band_is_read_as(name):
    mask_of, expected = READ[name]
    found = read(mask_of)
    assert (found.begins, found.first is not None, len(found.columns)) == expected


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_band(name):
    assert read(OTHERS[name]) is None


def nodes_of(model, prompts, **options):
    """The results of a compiled model, and every node of the graphs that Inductor would get, with its fake value."""
    nodes = []

    def look(graph, _):
        nodes.extend(graph.graph.nodes)
        return graph.forward

    inner = functools.partial(aot_module_simplified, fw_compiler=look)
    options = {"key_sparsity": 0.0, "value_sparsity": 0.0, "raise_errors": True} | options
    backend = functools.partial(mustafar, options=options, inner=inner)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    return [compiled(**inputs, use_cache=True).logits for inputs in prompts], nodes


def holds(nodes, *sizes):
    """Whether one of ``nodes`` is a tensor whose last dimensions are ``sizes``."""
    values = (node.meta.get("val") for node in nodes)
    return any(isinstance(x, torch.Tensor) and x.shape[-len(sizes) :] == sizes for x in values)


def padded(left, right, length=TOKENS):
    inputs = prompt(length=length)
    inputs["attention_mask"][0, :left] = 0
    inputs["attention_mask"][1, length - right :] = 0
    return inputs


BY_CHANNEL = {"value_sparsity": 0.5, "value_strategy": "channel-output-aware"}


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("gemma3_text", {}), *at_night([("llama", BY_CHANNEL), ("qwen3", {}), ("gpt_neox", {})])],
)
def test_a_prompt_makes_no_mask(family, options):
    """Also of layers that slide. One graph serves prompts with padding and without."""
    prompts = padded(0, 0), padded(9, 0), padded(5, 7)
    actual, nodes = nodes_of(hf_model(family), prompts, **options)
    attending = [node for node in nodes if node.target is ops.band_attention]
    assert len(attending) == 2
    assert not holds(nodes, TOKENS, TOKENS)
    model = hf_model(family)
    kv_heads = getattr(model.config, "num_key_value_heads", 4)
    assert {node.args[1].meta["val"].shape[1] for node in attending} == {kv_heads}, "repeated for their groups"
    for inputs, logits in zip(prompts, actual, strict=True):
        torch.testing.assert_close(logits, model(**inputs).logits)


@pytest.mark.parametrize("static", [True, *at_night([False])])
def test_a_prompt_in_chunks_makes_no_mask(static):
    from transformers import DynamicCache, StaticCache

    slots, chunk = 67, 23

    def chunks(model):
        whole = padded(9, 0, 2 * chunk)
        cache = StaticCache(model.config, max_cache_len=slots) if static else DynamicCache(config=model.config)
        for start in (0, chunk):
            ids, mask = whole["input_ids"][:, start : start + chunk], whole["attention_mask"][:, : start + chunk]
            yield {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}

    model = hf_model(num_hidden_layers=1)
    actual, nodes = nodes_of(model, chunks(model))
    assert sum(node.target is ops.band_attention for node in nodes) == 2
    assert not holds(nodes, chunk, slots)
    assert not holds(nodes, chunk, chunk)
    assert not any(node.target is aten.le.Tensor for node in nodes)
    torch.testing.assert_close(actual, [model(**inputs, use_cache=True).logits for inputs in chunks(model)])


def test_a_mask_that_is_no_band_stays():
    inputs = prompt(length=TOKENS)
    whole = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]
    model = hf_model(num_hidden_layers=1)
    (actual,), nodes = nodes_of(model, [inputs | {"attention_mask": whole}])
    assert not any(node.target is ops.band_attention for node in nodes)
    torch.testing.assert_close(actual, model(**inputs).logits)


@pytest.mark.native
def test_what_inductor_makes_of_it():
    """One graph of any length, whose code allocates nothing of its square."""
    model = hf_model(num_hidden_layers=1)
    compiled = torch.compile(model, backend="mustafar", fullgraph=True, dynamic=True)
    _, (code,) = run_and_get_code(lambda: compiled(**padded(9, 0), use_cache=True))
    assert "band_limits" in code
    assert "band_attention" in code
    for inputs in (padded(0, 0, 50), padded(3, 0, 60)):
        torch.testing.assert_close(compiled(**inputs, use_cache=True).logits, model(**inputs).logits)
