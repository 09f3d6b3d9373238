"""The C++ kernels against the oracle and against ``portable``; whole models on them."""

from __future__ import annotations

import functools
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_checks import Copies, KernelChecks, Kernels, check_a_compressed_cache, check_rows
from test_generate import generate, options, oracle
from torch._inductor.utils import run_and_get_code

from cases import (
    INF,
    LAYOUTS,
    REWINDING,
    assert_same_bits,
    assert_same_cache,
    attention,
    both_ways,
    cases,
    check_steps,
    compressed,
    decompressed,
    hard_rows,
    make_case,
    make_mask,
    randn,
    rows,
    seeds,
    sparsities,
    strided,
    weights_of,
)
from compilers import allocations, without_inductor
from guarded import HEAD_DIM, SENTINELS, VALUE_DIM, Zones, check_compress, check_decompress, check_step
from models import BufferModel, hf_model, prompt, run_steps
from mustafar_compile import CompressedKV, _compat, explain
from mustafar_compile.lowering import backends, builds, native, portable
from mustafar_compile.lowering.checks import OUT_OF_PLACE, UNWRITTEN
from mustafar_compile.lowering.format import CODES, Format
from nightly import at_night
from pairwise import pairwise
from test_own_loops import assert_close as assert_outputs_close
from test_own_loops import embeddings
from test_own_loops import options as loop_options
from test_own_loops import oracle as loop_oracle

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(builds.why_not() is not None, reason="needs a C++ compiler"),
]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SIMDS = ["", *at_night(["AVX2", "NONE"])]
SHAPES = {F32: (64, (2,)), F16: (80, (3,)), BF16: (128, (4,))}
"""dtype -> channels, which make whole vectors or do not, and query heads of a KV head. Each is a build."""
SIZES = {"head_dim": 64, "value_dim": 64}
WINDOWS = (1, 7, 32, 40, 100)
PLAIN = ("none",)
CODED_SIZES = {"head_dim": HEAD_DIM, "value_dim": VALUE_DIM}
INT8_INT4 = {"key_code": "int8", "value_code": "int4"}


@pytest.fixture(params=SIMDS)
def kernels(request):
    """``native`` with one kind of vectors: the best that the processor has, or what older ones have."""
    names = ("compress", "decompress", "decode_attention")
    return Kernels(*(functools.partial(getattr(native, name), simd=request.param) for name in names), "rows", SIZES)


class TestKernels(KernelChecks):
    """What those of every kind are held to."""


# ------------------------------------------------------------------------------------------- compress and decompress


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 600), st.sampled_from([8, 10])),  # 64 and 80
    written=st.floats(0, 1),
    window=st.sampled_from([1, 7, 32, 40, 100]),
    spare=st.integers(-40, 10),
    sparsity=sparsities,
    dtype=st.just(F32),
    how=st.sampled_from(LAYOUTS),
    seed=seeds,
)
def test_a_compressed_cache_stands_for_the_pruned_one(kernels, **how):
    check_a_compressed_cache(kernels, **how)


@settings(max_examples=8)
@given(rows(st.sampled_from([F32, BF16]), st.just(16)), st.integers(1, 16))
def test_rows_of_all_kinds(kernels, x, eights):
    check_rows(kernels, x, min(8 * eights, x.shape[-1]))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(
    ("head_dim", "kept"), [(128, 8), (128, 120), *at_night([(8, 8), (24, 8), (64, 32), (80, 40), (256, 128)])]
)
def test_rows_that_are_hard_to_rank(kernels, head_dim, kept, dtype):
    check_rows(kernels, hard_rows(head_dim, kept, dtype), kept)
    check_rows(kernels, hard_rows(head_dim, kept, dtype), kept, weights=weights_of(1, 1, 1, head_dim))


@pytest.mark.parametrize(
    ("code", "kept", "dtype"),
    [
        *[("int8", 64, F32), ("int4", 64, F16), ("int4", 128, BF16)],
        *at_night(pairwise(("int8", "int4"), (8, 64, 128), (F32, F16, BF16))),
    ],
)
def test_rows_in_a_code(kernels, code, kept, dtype):
    ordinary, tiny = randn(300, 128, seed=1), randn(40, 128, seed=2) * 2.0**-121  # some count as zero, some do not
    x = torch.cat([hard_rows(128, kept, dtype), ordinary.to(dtype), tiny.to(dtype)])
    check_rows(kernels, x, kept, code)


def test_compressing_no_batch(kernels):
    assert kernels.compressed(torch.zeros(0, 2, 5, 64), 5, 8, 4, 10).counts.shape == (0, 3)


# ------------------------------------------------------------------------------------------------- decode attention

shapes = st.sampled_from(list(SHAPES.items()))


@given(shapes.flatmap(lambda x: cases(st.just(x[0]), (x[1][0],), WINDOWS, groups=x[1][1], codes=PLAIN)), st.booleans())
@example(make_case(tokens=1, **SIZES), False)
@example(make_case(tokens=5, window=4, **SIZES), True)  # the first token that is pruned
@example(make_case(tokens=9, window=1, **SIZES), False)
@example(make_case(tokens=34, window=1, batch=1, **SIZES), False)
@example(make_case(tokens=70, window=100, batch=1, **SIZES), False)
@example(make_case(batch=1, heads=1, tokens=40, window=4, queries=16, **SIZES), True)  # new tokens leave the window
@example(make_case(batch=1, heads=1, tokens=2500, **SIZES), True)  # several splits
@example(make_case(mask=torch.zeros(2, 1, 1, 11, dtype=torch.bool), **SIZES), False)
@example(make_case(mask=torch.full((11,), -INF), **SIZES), False)
@example(make_case(mask=torch.full((1, 1, 1, 11), torch.finfo(torch.float32).min), **SIZES), False)
@example(make_case(mask=torch.ones(4, 1, 1, dtype=torch.bool), **SIZES), False)
@example(make_case(mask=both_ways(3, 11), queries=3, **SIZES), False)
@example(make_case(mask=both_ways(3, 11), queries=3, window=1, **SIZES), False)
def test_a_step_equals_the_oracle(kernels, case, position):
    kernels.check_step(case, torch.tensor([case.written]) if position else None)


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "group", "dtype"),
    [
        (128, 64, 8, F32),
        *at_night(
            [
                *((128, 64, 8, dtype) for dtype in (F16, BF16)),
                *((8, 8, 1, dtype) for dtype in (F32, F16, BF16)),
                *((72, 40, 5, dtype) for dtype in (F32, F16, BF16)),
                *((256, 256, 7, F32), (64, 64, 71, BF16), (24, 136, 12, F16)),
            ]
        ),
    ],
)
def test_heads_of_any_size_and_number(kernels, head_dim, value_dim, group, dtype):
    for queries in (1, 5):
        case = make_case(2, 2, group, head_dim, value_dim, 150, queries=queries, dtype=dtype)
        case.mask = make_mask("bool", (2, 1, queries, 150), 3)
        kernels.check_step(case)


CODES_OF_STEPS = [
    (("int8", 0.5), ("int4", 0.5), F32),
    (("int4", 0.0), ("int8", 0.0), BF16),
    *at_night(
        [
            (("int4", 0.5), ("int4", 0.7), BF16),
            (("int8", 0.7), ("int8", 0.5), F16),
            (("int8", 0.0), ("int4", 0.0), F32),
            (("int8", 0.5), ("none", 0.0), F32),
            (("none", 0.5), ("int8", 0.5), BF16),
            (("none", 0.5), ("int4", 0.0), F16),
        ]
    ),
]


@pytest.mark.parametrize(("key", "value", "dtype"), CODES_OF_STEPS)
def test_a_step_over_codes(kernels, key, value, dtype):
    """From one tile that is not full to several splits; tokens that leave the window in the step; masks."""
    head_dim, (group,) = SHAPES[dtype]
    sizes = CODED_SIZES if dtype == F32 else {"head_dim": head_dim, "value_dim": head_dim}
    how = {"key_sparsity": key[1], "value_sparsity": value[1], "key_code": key[0], "value_code": value[0]}
    for queries, tokens in ((1, 11), (1, 1100), (5, 150), (16, 40)):
        case = make_case(1, 2, group, tokens=tokens, queries=queries, dtype=dtype, **sizes, **how)
        kernels.check_step(case)
        case.mask = make_mask("bool", (1, 1, queries, tokens), 3)
        kernels.check_step(case)


@pytest.mark.nightly
@given(cases(st.just(F32), (64,), WINDOWS, groups=(2,)), st.booleans())
def test_a_step_over_any_codes_equals_the_oracle(kernels, case, position):
    kernels.check_step(case, torch.tensor([case.written]) if position else None)


def test_rows_are_read_where_they_lie(kernels):
    case, copies = kernels.case(tokens=7), []
    past = case.past("key"), case.past("value")
    case.query, case.keys, case.values = (strided(x, "joined") for x in (case.query, case.keys, case.values))
    with Copies(copies):
        case.step(*past, decode=kernels.decode_attention)
    assert not copies


class TestCodedKernels:
    """What is not ordinary, over codes."""

    @pytest.fixture
    def kernels(self, kernels):
        return replace(kernels, sizes=CODED_SIZES, codes=INT8_INT4)

    test_what_may_attend_to_nothing = KernelChecks.test_what_may_attend_to_nothing_gives_zeros
    test_caches_of_different_capacity = KernelChecks.test_caches_of_different_capacity
    test_extreme_values = KernelChecks.test_extreme_values_count_as_in_the_oracle
    test_huge_values = KernelChecks.test_a_channel_of_huge_values
    test_a_bad_key_that_is_masked_out = KernelChecks.test_a_bad_key_that_is_masked_out_does_no_harm
    test_a_mask_of_each_head = KernelChecks.test_a_mask_of_each_head_and_batch_entry


def test_every_code_has_kernels():
    for code in CODES:
        format = Format.of(64, 0.5, 4, "rows", code)
        assert backends.for_cache(format, F32, torch.device("cpu")) is backends.NATIVE
        assert backends.for_step(backends.Work(format, format, F32, torch.device("cpu"), 2)) is backends.NATIVE


@pytest.mark.parametrize("dtype", [torch.bool, F32, F16, BF16, torch.float64])
def test_masks_of_any_kind(kernels, dtype):
    case = make_case(heads=3, tokens=150, **SIZES)
    for shape in ((2, 6, 1, 150), (1, 1, 1, 150), (150,), (2, 1, 1, 1)):
        mask = make_mask("bool" if dtype == torch.bool else "bias", shape, 3)
        case.mask = mask if dtype == torch.bool else mask.to(dtype)
        kernels.check_step(case)
    case.mask = case.mask.new_ones(150, 2)[:, 1]  # strided
    kernels.check_step(case)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(kernels, threads):
    case, before = make_case(heads=3, tokens=3000, **SIZES), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernels.check_step(case)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("moves", "window", "seed"), REWINDING)
def test_writing_at_an_earlier_position_rewinds(kernels, moves, window, seed):
    check_steps(moves, window, seed, decode=kernels.decode_attention, order="rows")


# --------------------------------------------------------------------------------------- values that are not ordinary


# ---------------------------------------------------------------------------------------------------- what is asserted


def assert_fails(message, case, kernels, position=None, **how):
    """A step fails with ``message`` and leaves the caches as they were."""
    caches = [how.pop("keys", None) or case.past("key"), how.pop("values", None) or case.past("value")]
    before = [cache.clone() for cache in caches]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        case.step(*caches, position=position, decode=kernels.decode_attention, **how)
    for cache, was in zip(caches, before, strict=True):
        assert_same_cache(cache, was)


@pytest.mark.parametrize("queries", [1, 3])
def test_a_step_asserts_that_positions_leave_no_gap_and_fit(kernels, queries):
    case = kernels.case(tokens=40, queries=queries)
    for bad in ([-1], [case.written + 1], [case.written, case.written + 1], [0, -1], [2**33], [-(2**62)]):
        assert_fails(OUT_OF_PLACE, case, kernels, torch.tensor(bad))
    case.step(position=torch.tensor([0, case.written]), decode=kernels.decode_attention)
    case.step(decode=kernels.decode_attention, length=40)
    assert_fails(OUT_OF_PLACE, case, kernels, length=39)


@pytest.mark.parametrize("position", [None, [36]])
def test_a_step_asserts_that_a_growing_cache_has_room(kernels, position):
    for tokens in (36, 37):
        case = kernels.case(tokens=tokens)
        keys, values = (kernels.compressed(x, tokens - 1, 8, 4, 32, by=portable) for x in (case.keys, case.values))
        if tokens == 36:
            case.step(keys, values, decode=kernels.decode_attention)
        else:
            at = position and torch.tensor(position)
            assert_fails(OUT_OF_PLACE, case, kernels, at, keys=keys, values=values)


def test_a_step_asserts_that_both_caches_hold_the_tokens(kernels):
    case = kernels.case(tokens=40)
    for role in ("keys", "values"):
        shorter = {"keys": case.past("key"), "values": case.past("value")}
        shorter[role].counts[1, 0] = 20
        assert_fails(OUT_OF_PLACE, case, kernels, torch.tensor([case.written]), **shorter)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_step_of_a_static_cache_asserts_that_the_mask_leaves_out_what_was_never_written(kernels, kind):
    length, tokens = 200, 40
    for shape in ((length,), (2, 1, 1, length), (1, 4, 2, length)):
        case = kernels.case(tokens=tokens, queries=2 if len(shape) > 2 and shape[2] == 2 else 1)
        for place in (None, tokens, length - 1):
            allowed = (torch.arange(length) < tokens).repeat(*shape[:-1], 1).view(shape)
            if place is not None:
                allowed.view(-1, length)[-1, place] = True
            case.mask = allowed if kind == "bool" else torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
            case.spare = length
            if place is None:
                case.step(decode=kernels.decode_attention, length=length)
            else:
                assert_fails(UNWRITTEN, case, kernels, length=length)
    case.step(decode=kernels.decode_attention)  # a growing cache has no such places


# ----------------------------------------------------------------------------------------- what lies beside the buffers


def refusing(kernels):
    """``decode_attention`` that gives zeros where it refuses a step."""

    def decode(step, *, checked):
        try:
            return kernels.decode_attention(step)
        except RuntimeError:
            return torch.zeros(*step.query.shape[:3], step.value.shape[3])

    return decode


@pytest.mark.parametrize(("queries", "group", "mask"), [(1, 2, None), (2, 2, "bool")])
def test_a_step_keeps_to_its_buffers(kernels, queries, group, mask):
    check_step(refusing(kernels), queries, group, mask, order="rows")


@pytest.mark.parametrize(
    ("codes", "kept", "queries"),
    [
        (("int8", "int4"), 8, 1),
        *at_night(pairwise([("int8", "int4"), ("int4", "int8"), ("none", "int8")], (8, HEAD_DIM), (1, 2))),
    ],
)
def test_a_step_over_codes_keeps_to_its_buffers(kernels, codes, kept, queries):
    check_step(refusing(kernels), queries, 2, order="rows", codes=codes, kept=kept)


@pytest.mark.parametrize(("codes", "dims"), [(("none", "none"), (64, 64)), (("int8", "int4"), (HEAD_DIM, VALUE_DIM))])
def test_a_whole_tile_at_the_end_of_a_buffer_is_read_within_it(kernels, codes, dims):
    """Its last row has bits for more elements than there are behind it."""
    tokens, window, slots = 65, 2, 64
    new = [randn(1, heads, 1, dim, seed=heads) for heads, dim in ((2, dims[0]), (1, dims[0]), (1, dims[1]))]
    dense = [randn(1, 1, tokens, dim, seed=i) for i, dim in enumerate(dims)]
    how = [{"by": portable, "code": code} for code in codes]
    caches = [kernels.compressed(x, tokens, 8, window, slots, **h) for x, h in zip(dense, how, strict=True)]
    results = []
    for sentinel in SENTINELS:
        with Zones(sentinel) as zones:
            guarded = [cache.changed(zones.guarded) for cache in caches]
            for cache in guarded:
                cache.bitmap.fill_(-1)
            results.append(attention(*new, *guarded, scale=0.1, decode=kernels.decode_attention))
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_compressing_keeps_to_its_buffers(kernels):
    check_compress(kernels, order="rows")


def test_decompressing_keeps_to_its_buffers(kernels):
    check_decompress(kernels, order="rows")


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.fixture
def _fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("how", at_night([{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}]))
def test_a_model_generates_what_the_oracle_does(how):
    if "prompt_lookup_num_tokens" in how and torch.__version__ < "2.12":
        pytest.skip(
            "Inductor of torch 2.11 makes C++ of the mask that does not compile: a bound uses an undeclared name"
        )
    inputs, sparsity = prompt(batch=1 if "prompt_lookup_num_tokens" in how else 2, padded=not how), 0.5
    expected = oracle(hf_model(), inputs, sparsity)
    model = hf_model()
    model.compile(backend="mustafar", options=options(sparsity))
    with explain() as report, without_inductor() if not how else nullcontext():
        out = generate(model, inputs, **how)
    assert torch.equal(out.sequences, expected)
    assert {entry.kernels for entry in report.matched} == {"C++ kernels"}


@pytest.mark.usefixtures("_fresh")
def test_a_decode_step_is_one_op_of_a_layer():
    torch.manual_seed(0)
    model = BufferModel(slots=200, head_dim=64)
    inputs = embeddings(150, steps=3)
    step = torch.compile(model.step, backend="mustafar", options=loop_options(0.5))
    outputs, (_, *codes) = run_and_get_code(run_steps, model, inputs, step)
    assert_outputs_close(outputs, loop_oracle(model, inputs, 0.5))
    for code in codes:
        assert code.count("torch.ops.mustafar.decode_attention_kernel.default(") == 1
        assert "aten.clone" not in code
        assert max(allocations(code, 200 // 32 + 1), default=0) < 2 * 2 * 150 * 64, "no copy of the cache"


def run_step():
    """The caches and the result of a step of the op over a compressed prompt."""
    case = make_case(order="rows", **SIZES)
    caches = [compressed(x, case.written, 32, 4, 16, order="rows") for x in (case.keys, case.values)]
    return [case.step(*caches), *(decompressed(cache, 11) for cache in caches)]


def expected_of_portable(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(builds, "why_not", lambda: "not now")
        return run_step()


def test_what_cannot_be_built_is_done_by_pytorch_with_a_warning(monkeypatch):
    expected = expected_of_portable(monkeypatch)
    builds._build.cache_clear()
    monkeypatch.setattr(builds, "source", lambda *given, **constants: "this is no C++")
    with pytest.warns(UserWarning, match="could not be built") as warned:
        results = run_step()
    assert len([w for w in warned if "could not be built" in str(w.message)]) == 2, (
        "of a step and of a prompt, once each"
    )
    builds._build.cache_clear()
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_without_a_compiler_pytorch_does_it_with_one_warning(monkeypatch):
    def none_there():
        raise RuntimeError("no compiler")

    expected = expected_of_portable(monkeypatch)
    monkeypatch.setattr(_compat.inductor, "cpp_compiler", none_there)
    builds.why_not.cache_clear()
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler") as warned:
        results = run_step()
    builds.why_not.cache_clear()
    assert len(warned) == 1
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_a_build_knows_the_processor():
    """The cache on disk may be shared by machines of different processors."""
    assert torch.backends.cpu.get_cpu_capability() in builds.source("prompt.cpp", F32, ROW_DIM=64)


# --------------------------------------------------------------------------------------------- the order of elements


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_cache_is_the_same_in_either_order(dtype):
    dense = randn(2, 2, 75, 40, seed=1, dtype=dtype)
    for how in ((), (60,)):
        cache = CompressedKV.from_dense(dense, 0.5, 8, *how)
        assert cache.format.order == "rows"
        blocks = cache.ordered("blocks")
        assert blocks.format == cache.format.ordered("blocks")
        assert_same_bits(blocks.dense(), cache.dense())
        assert blocks.stored_bytes == cache.stored_bytes
        back = blocks.ordered("rows")
        assert all(torch.equal(x, y) for x, y in zip(back.buffers[1:], cache.buffers[1:], strict=True))
        assert_same_bits(back.dense(), cache.dense())
        assert cache.ordered("rows") is cache


def test_a_cache_that_was_saved_on_a_gpu_is_in_rows_on_a_cpu():
    blocks = CompressedKV.from_dense(randn(1, 2, 75, 40, seed=1), 0.5, 8).ordered("blocks")
    function, given = blocks.__reduce_ex__(2)
    loaded = function(*given)
    assert (given[0], loaded.format.order) == ("head_dim=40,kept=24,window=8", "rows")
    assert_same_bits(loaded.dense(), blocks.dense())
