"""Strategies: what rows rank by, in models whose caches are pruned by them, and what users do with such caches."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from cases import randn
from compilers import without_compiler
from models import BufferModel, TupleModel, hf_model, prompt, pruned_steps, run_steps
from mustafar_compile import CompressedKV, Settings, explain
from mustafar_compile.integrations.teacher_forced import teacher_forced
from mustafar_compile.lowering import ops
from nightly import at_night
from pairwise import pairwise
from ranked import Layer, Packed, ranked_generation

pytestmark = pytest.mark.usefixtures("no_grad")
WINDOW, NEW_TOKENS, SPARSITY = 4, 40, 0.5
PLAIN = "none", "none"
CASES = [
    ("output-aware", "think", PLAIN, "dynamic"),
    ("output-aware", "magnitude", ("int4", "int8"), "static"),
    *at_night(
        [
            ("think", "magnitude", PLAIN, "static"),
            ("output-aware", "magnitude", PLAIN, "static"),
            ("magnitude", "think", PLAIN, "dynamic"),
            ("think", "think", ("int8", "int4"), "dynamic"),
        ]
    ),
]


def options(keys, values, **others):
    sparsities = {"key_sparsity": SPARSITY, "value_sparsity": SPARSITY}
    return {"key_strategy": keys, "value_strategy": values, "window": WINDOW, **sparsities, **others}


def name_of(strategy):
    """What a report calls it: what is usual has no name."""
    return "" if strategy == "magnitude" else strategy


def generate(model, inputs, **how):
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **how)


def expected(model, inputs, strategies, codes=("none", "none")):
    """Tokens of the oracle, and K and V of the first layer at the end."""
    with ranked_generation(strategies, SPARSITY, WINDOW, codes) as layers:
        tokens = generate(model, inputs).sequences
    return tokens, layers[0].stored(*layers[0].latest)


@pytest.mark.parametrize(("keys", "values", "codes", "cache"), CASES)
def test_tokens_are_those_of_the_oracle(keys, values, codes, cache):
    model, inputs = hf_model("llama", num_hidden_layers=1), prompt(padded=True, length=14)
    tokens, rows = expected(model, inputs, (keys, values), codes)
    with without_compiler(), explain() as report:
        coded = {"key_code": codes[0], "value_code": codes[1]}
        model.compile(backend="mustafar", options=options(keys, values, **coded))
        result = generate(model, inputs, cache_implementation=cache)
    assert torch.equal(result.sequences, tokens)
    assert [text.partition(" by ")[2] for text in report.matched[0].kept] == [name_of(keys), name_of(values)]
    assert not report.notices
    layer = result.past_key_values.layers[0]
    assert (layer.keys.format.strategy, layer.values.format.strategy) == (keys, values)
    for kv, x in zip((layer.keys, layer.values), rows, strict=True):
        dense = kv.dense()[:, :, : x.shape[2]]
        assert torch.equal(dense != 0, x != 0)
        torch.testing.assert_close(dense, x)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *[(TupleModel, torch.bfloat16), (BufferModel, torch.float32)],
        *at_night([(TupleModel, torch.float32), (BufferModel, torch.bfloat16)]),
    ],
)
def test_own_loops(kind, dtype):
    """A cache that the prompt's graph makes knows its queries; one of the caller does not, and a notice says so."""
    made = kind is TupleModel
    model = kind(**({} if made else {"dtype": dtype})).to(dtype)
    inputs = [randn(2, count, 32, seed=count + i, dtype=dtype) for i, count in enumerate([11, *[1] * 30])]
    layer = Layer(("output-aware", "magnitude"), SPARSITY, WINDOW, PLAIN)

    def attention(q, k, v):
        return layer.attend(q, k, v, None, q.shape[3] ** -0.5)

    q, k, v = (t.transpose(1, 2) for t in model.project(inputs[0]))
    layer.attend(q if made else 0 * q, k, v, None, 1.0)
    outputs = pruned_steps(model, inputs, attention)
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options("output-aware", "magnitude"))
        results = run_steps(model, inputs, step)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for result, output in zip(results, outputs, strict=True):
        torch.testing.assert_close(result, output, rtol=tolerance, atol=tolerance)
    assert any("without their queries, which were not seen" in notice for notice in report.notices) != made


def test_a_text_at_once_is_what_steps_make_of_it():
    """``teacher_forced`` ranks each row by the queries of its time."""
    model, ids = hf_model("llama", num_hidden_layers=1), prompt(batch=1, length=60)["input_ids"]
    settings = options("output-aware", "magnitude")
    with ranked_generation(("output-aware", "magnitude"), SPARSITY, WINDOW):
        past = DynamicCache(config=model.config)
        expected = torch.cat([model(x, past_key_values=past).logits for x in ids.split(1, dim=1)], dim=1)
    with teacher_forced(model, Settings(**settings)):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly  # rewinding is tested step by step as well
def test_drafts_that_are_taken_back_leave_no_trace():
    model, inputs = hf_model("llama", num_hidden_layers=1), prompt(batch=1, length=20)
    with without_compiler():
        model.compile(backend="mustafar", options=options("output-aware", "think"))
        plain = generate(model, inputs)
        drafted = generate(model, inputs, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted.sequences, plain.sequences)
    kept, again = (result.past_key_values.layers[0].keys.dense() for result in (plain, drafted))
    tokens = min(kept.shape[2], again.shape[2]) - WINDOW
    assert torch.equal(kept[:, :, :tokens] != 0, again[:, :, :tokens] != 0)


@pytest.mark.parametrize("strategy", ["output-aware", *at_night(["think"])])
def test_a_prompt_in_chunks_goes_on_with_what_was_seen(strategy):
    """One layer has the same keys and queries however they come in."""
    model, ids = hf_model("llama", num_hidden_layers=1), prompt(length=50)["input_ids"]
    with without_compiler():
        call = torch.compile(model, backend="mustafar", options=options(strategy, "magnitude"))
        whole = call(ids).past_key_values.layers[0].keys
        first = call(ids[:, :30])
        begun = first.past_key_values.layers[0].keys
        mine = begun.clone()
        both = call(ids[:, 30:], past_key_values=first.past_key_values).past_key_values.layers[0].keys
    (state,), (seen,), (at_first,) = (kv.format.state_of(kv.buffers) for kv in (both, whole, mine))
    if strategy == "think":
        assert torch.equal(state, at_first)
    else:
        torch.testing.assert_close(state, seen)


@pytest.mark.native
@pytest.mark.nightly
@pytest.mark.parametrize("keys", ["output-aware", "think"])
def test_a_compiled_model_on_kernels(keys):
    model, inputs = hf_model("llama", num_hidden_layers=1), prompt(padded=True, length=14)
    tokens, _ = expected(model, inputs, (keys, "magnitude"))
    torch._dynamo.reset()
    with explain() as report:
        model.compile(backend="mustafar", options=options(keys, "magnitude"))
        assert torch.equal(generate(model, inputs).sequences, tokens)
    assert [entry.kernels for entry in report.matched] == ["C++ kernels"]


STEPS = (1, 0), (3, 0), (16, 0), (1, 16), (5, 2), (1, 0), (16, 9), (16, 0)
"""Tokens of each, and by how many the cache is rewound before it."""


DTYPES = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("strategy", "dtype", "first"),
    [*pairwise(("output-aware",), DTYPES, (0, 5, 60)), ("think", torch.float32, 0), ("think", torch.bfloat16, 60)],
)
def test_which_queries_count(strategy, dtype, first):
    """Each query stands out or is nothing beside others, so one too many or too few changes what is kept."""
    window, known = 1, min(first, 50)

    def tokens(count, seed):
        scales = 8.0 ** torch.randint(-2, 3, (2, 1, count, 1), generator=torch.Generator().manual_seed(seed))
        return [x.to(dtype) for x in (randn(2, 6, count, 24, seed=seed) * scales, randn(2, 2, count, 24, seed=-seed))]

    query, rows = tokens(first, 1)
    queries = query[:, :, first - known :] if known else None
    room = torch.nn.functional.pad(rows, (0, 0, 0, 80))
    kv = CompressedKV.from_dense(room, SPARSITY, window, first, strategy=strategy, queries=queries)
    other = CompressedKV.from_dense(room, SPARSITY, window, first)
    packed = Packed.of_prompt(strategy, kv.format.kept, "none", window, rows, queries)
    held, formats = max(first - window - 16, 0), (kv.format.encode(), other.format.encode())
    for seed, (count, back) in enumerate(STEPS, 2):
        at = max(rows.shape[2] - back, 0)
        query, new = tokens(count, seed)
        place = torch.tensor([at])
        ops.decode_attention(query, new, new, kv.buffers, other.buffers, *formats, place, None, None, 0.1)
        for i in range(count):
            rows = torch.cat([rows[:, :, : at + i], new[:, :, i : i + 1]], dim=2)
            packed.append(rows, query[:, :, i : i + 1], min(held, at + i))
            held = max(min(held, at + i), at + i + 1 - window - 16)
        assert torch.equal(kv.dense()[:, :, : at + count - window], packed.rows[:, :, :-window])
