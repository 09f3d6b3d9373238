"""The plain Triton kernels in Triton's interpreter, on the CPU. ``test_kernels.py`` runs this in a process of its own.

bfloat16 is for the GPU: the interpreter's products of it are wrong, and it cuts float32 off where it should round.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import torch
import triton
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from kernel_checks import ROLES, SPOILT, KernelChecks, Kernels, check_a_compressed_cache, check_rows
from triton.runtime.interpreter import InterpretedFunction

from cases import (
    INF,
    LAYOUTS,
    NAN,
    REWINDING,
    assert_close,
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
    make_sinks,
    randn,
    rows,
    seeds,
    sparsities,
    weights_of,
    with_length,
)
from guarded import STEPS, check_compress, check_decompress, check_step
from mustafar_compile.lowering import kernels, portable, weighing
from mustafar_compile.lowering.checks import OUT_OF_PLACE, UNWRITTEN
from mustafar_compile.lowering.format import CODES, Format
from mustafar_compile.lowering.strategies.answers import scaled
from mustafar_compile.lowering.strategies.output_aware import OutputAware
from nightly import at_night, mostly_at_night
from pairwise import pairwise
from reference import pruned_cache

assert triton.knobs.runtime.interpret, "run with TRITON_INTERPRET=1"

_call = InterpretedFunction.__call__
_called = set()


def _without_patching_again(self, *args, **kwargs):
    """A device function patches the language anew at each call, a third of all time: once for a module is enough."""
    if self.fn.__module__ in _called:
        return self.rewrite()(*args, **kwargs)
    _called.add(self.fn.__module__)
    return _call(self, *args, **kwargs)


InterpretedFunction.__call__ = _without_patching_again


# Without shrinking, which takes minutes here.
phases = Phase.explicit, Phase.generate
few = settings(max_examples=3, deadline=None, phases=phases, suppress_health_check=list(HealthCheck))
few_queries = st.sampled_from([1, 1, 2, 3])  # more take long here
narrow = st.sampled_from([torch.float32, torch.float16])
codes = st.sampled_from(CODES)
portable_kernels = functools.partial(kernels.decode_attention, variant="portable")
KERNELS = Kernels(kernels.compress, kernels.decompress, portable_kernels, dtypes=(torch.float32, torch.float16))


@pytest.fixture(name="kernels")
def _kernels():
    return KERNELS


class TestKernels(KernelChecks):
    """What those of every kind are held to."""


@pytest.mark.nightly
class TestCodedKernels(KernelChecks):
    """The same over codes."""

    @pytest.fixture
    def kernels(self):
        return dataclasses.replace(KERNELS, codes={"key_code": "int8", "value_code": "int4"})


# ------------------------------------------------------------------------------------------- compress and decompress


@few
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 70), st.sampled_from([1, 3, 4, 8, 10, 16])),
    written=st.floats(0, 1),
    window=st.sampled_from([1, 7, 32, 40, 100]),
    spare=st.integers(-40, 10),
    sparsity=sparsities,
    dtype=narrow,
    how=st.sampled_from(LAYOUTS),
    seed=seeds,
    code=codes,
)
def test_a_compressed_cache_stands_for_the_pruned_one(**how):
    check_a_compressed_cache(KERNELS, **how)


@few
@given(rows(dtypes=narrow), st.integers(1, 32), codes)
def test_rows_of_all_kinds(x, eights, code):
    check_rows(KERNELS, x, min(8 * eights, x.shape[-1]), code)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "kept"), [(8, 8), (24, 8), (64, 32), (80, 40), (128, 8), (128, 120)])
def test_rows_that_are_hard_to_rank(head_dim, kept, dtype):
    check_rows(KERNELS, hard_rows(head_dim, kept, dtype), kept)
    if dtype != torch.bfloat16 and head_dim < 64:
        check_rows(KERNELS, hard_rows(head_dim, kept, dtype), kept, weights=weights_of(1, 1, 1, head_dim))


@pytest.mark.parametrize(("dtype", "queries", "group"), [(torch.float16, 5, 3), (torch.float32, 1, 1)])
def test_what_queries_make_of_channels(dtype, queries, group):
    """At the beginning, where a prompt ends, around the ring, and where no token can be."""
    ring, strategy = randn(6, 2, 48, 24, seed=1, dtype=dtype).abs(), OutputAware()
    ring[4] = 0
    query = randn(6, 2 * group, queries, 24, seed=2, dtype=dtype)
    query[4] = 0
    query[5, 0, 0, 3] = NAN
    position = torch.tensor([0, 7, 46, 1000, 31, 40])
    given = query, position, Format.interned(24, 16, 4)
    expected, ours = scaled(strategy.of_step(*given, [ring])), ring.clone()
    strategy.remember(*given, [ring])
    assert_same_bits(weighing.weigh_queries(query, position, ours), expected)
    assert_same_bits(ours, ring)
    weighing.weigh_queries(query, torch.tensor([-1, -(2**62), 2**62, -48, 5, 5]), ours)


DTYPES = torch.float32, torch.bfloat16, torch.float16
CODED = [code for code in CODES if code != "none"]


@pytest.mark.parametrize(
    ("dtype", "sizes", "code"), mostly_at_night(pairwise(DTYPES, [(24, 8), (40, 16), (32, 32), (128, 120)], CODED), 4)
)
def test_coded_rows_that_are_hard_to_rank(sizes, dtype, code):
    head_dim, kept = sizes
    x = torch.cat([randn(20, head_dim, seed=kept, dtype=dtype), hard_rows(head_dim, kept, dtype)])
    if dtype == torch.bfloat16:
        KERNELS.compressed_as_portable(x[None, None], len(x), kept, 1, len(x), code=code)
    else:
        check_rows(KERNELS, x, kept, code)


def test_floors_are_numbers_of_seven_bits():
    """So is the largest of them; the eighth bit can only come from a cache that was tampered with."""
    dense = randn(1, 1, 40, 16, seed=1)
    cache = compressed(dense, 40, 16, 4, 40, by=portable, code="int4")
    expected = decompressed(cache, 40, by=portable)
    cache[cache.format.place("floors")] |= 128
    assert torch.equal(decompressed(cache, 40, by=kernels), expected)


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 40, 64])
def test_compressing_a_part_of_a_static_cache(tokens):
    dense = randn(1, 2, 64, 24, seed=1)
    cache = KERNELS.compressed_as_portable(dense, tokens, 8, 7, 64)
    assert_same_bits(decompressed(cache, 64, by=kernels), with_length(pruned_cache(dense[:, :, :tokens], 0.7, 7), 64))


# ------------------------------------------------------------------------------------------------- decode attention


EVERY_CHANNEL = {"key_sparsity": 0.0, "value_sparsity": 0.0, "dtype": torch.float16}


def one_head(**how):
    """``make_case`` for where more programs would tell no more: each one takes long here."""
    return make_case(batch=1, heads=1, **how)


@few
@given(cases(narrow, (8, 24, 64, 80, 128), (1, 7, 32, 40, 100), few_queries), st.booleans())
@example(make_case(tokens=1), False)
@example(one_head(tokens=5, window=4), True)  # the first token that is pruned
@example(one_head(tokens=4, window=4), False)
@example(one_head(tokens=9, window=1), False)
@example(one_head(tokens=33, window=1), False)
@example(one_head(tokens=34, window=1), False)
@example(one_head(tokens=70, window=100), False)
@example(one_head(tokens=140, group=3), True)  # several splits
@example(make_case(mask=torch.zeros(2, 1, 1, 11, dtype=torch.bool)), False)
@example(one_head(mask=torch.full((11,), -INF)), False)
@example(one_head(mask=torch.full((1, 1, 1, 11), torch.finfo(torch.float32).min)), False)
@example(one_head(mask=torch.full((1, 1, 1, 11), -65504.0, dtype=torch.float16), dtype=torch.float16), False)
@example(make_case(mask=torch.ones(4, 1, 1, dtype=torch.bool)), False)
@example(one_head(tokens=40, key_code="int8", value_code="int4"), False)
@example(one_head(tokens=20, **EVERY_CHANNEL, key_code="int4", value_code="int8"), True)
@example(one_head(mask=both_ways(3, 11), queries=3), False)
@example(one_head(mask=both_ways(3, 11), queries=3, window=1), False)
def test_a_step_equals_the_oracle(case, position):
    KERNELS.check_step(case, torch.tensor([case.written]) if position else None)


@pytest.mark.parametrize(
    ("how", "position"),
    [
        ({"group": 1, "tokens": 9, "queries": 6}, True),  # new tokens leave the window
        *at_night(
            [
                ({"group": 5, "tokens": 75, "window": 7, "queries": 13}, False),  # more than a tile
                ({"group": 20, "tokens": 45, "window": 7}, False),
            ]
        ),
    ],
)
def test_a_step_of_many_rows_equals_the_oracle(how, position):
    case = one_head(**how)
    KERNELS.check_step(case, torch.tensor([case.written]) if position else None)


@pytest.mark.parametrize(
    ("window", "tokens", "position", "code"),
    [
        (1, 5, None, "int4"),
        (4, 6, "given", "none"),
        (3, 36, "given", "int8"),
        *at_night([(1, 5, "given", "int8"), (4, 6, None, "int4"), (3, 36, None, "none")]),
    ],
)
def test_tokens_one_by_one_give_the_same_cache_as_all_at_once(window, tokens, position, code):
    case = one_head(tokens=tokens, head_dim=24, value_dim=16)
    start = max(0, tokens - 6)
    grown = [compressed(x, start, 8, window, tokens, by=portable, code=code) for x in (case.keys, case.values)]
    for n in range(start, tokens):
        new = case.keys[:, :, n : n + 1], case.values[:, :, n : n + 1]
        at = torch.tensor([n]) if position else None
        attention(case.query, *new, *grown, at, scale=0.2, decode=portable_kernels)
    for x, cache in zip((case.keys, case.values), grown, strict=True):
        assert_same_cache(cache, compressed(x, tokens, 8, window, tokens, by=portable, code=code))


@pytest.mark.parametrize(
    ("moves", "window", "seed"), [*REWINDING[:2], REWINDING[3], *at_night([REWINDING[2], REWINDING[4]])]
)
def test_writing_at_an_earlier_position_rewinds(moves, window, seed):
    check_steps(moves[-3:], window, seed, decode=portable_kernels, start=30, batch=1)


# --------------------------------------------------------------------------------------- values that are not ordinary


@pytest.fixture
def exact_for_extremes(monkeypatch):
    """Kernels of a step with a tuned ``attend``, whose results are lost: only what is done again can be right."""
    combine = kernels.Step.combine

    def with_repetition(self, parts, exact_for_extremes, overlap):
        assert not exact_for_extremes, "the plain kernel is exact"
        return combine(self, parts, True, overlap)

    class Lossy:
        def __init__(self, step):
            self.step = step

        def __getitem__(self, grid):
            def attend(*, sums, states, **arguments):
                rows, splits = grid
                shape = (rows // self.step.row_tiles, splits + self.step.window_parts, self.step.query_rows)
                for x in (sums, states):
                    assert x.shape[:3] == shape
                    x[:, :splits] = NAN

            return attend

    monkeypatch.setattr(kernels.Step, "combine", with_repetition)
    monkeypatch.setattr(kernels.Step, "portable", lambda step: type("Module", (), {"attend": Lossy(step)}))


@pytest.mark.parametrize(
    ("value", "role", "queries", "code"), mostly_at_night(pairwise(SPOILT, ROLES, (1, 2), CODES), 7)
)
def test_a_step_with_extreme_values_is_done_again(role, value, queries, code, exact_for_extremes):
    case = one_head(tokens=75, group=6, window=17, queries=queries, key_code=code, value_code=code)
    case.query = case.query / 64
    case.mask = make_mask("bias", (1, 6, queries, 75), 5)
    case.sinks = make_sinks(6, 3)
    getattr(case, role)[0, 0, 7, 5] = value
    out = case.step(decode=portable_kernels)
    if value == 2.0**96:
        assert out.isnan().all(), "not extreme: taken from the splits"
    else:
        assert_close(out, case, rounds_weights=True)


@settings(few, max_examples=3)
@given(cases(narrow, (8, 24, 64), (1, 7, 40), few_queries))
def test_doing_a_step_again_equals_the_oracle(exact_for_extremes, case):
    key, value = case.past("key"), case.past("value")
    value.counts[:, 2] = 1
    assert_close(case.step(key, value, decode=portable_kernels), case, rounds_weights=True)


def test_one_row_of_the_batch_is_done_again_and_the_others_are_not(exact_for_extremes):
    case = make_case(tokens=75, window=17)
    case.values[1, 0, 7, 5] = 2.0**98
    out = case.step(decode=portable_kernels)
    assert out[0].isnan().all(), "taken from the splits"
    alone = dataclasses.replace(case, query=case.query[1:], keys=case.keys[1:], values=case.values[1:])
    assert_close(out[1:], alone, rounds_weights=True)


# ---------------------------------------------------------------------------------------------------- what is asserted


@pytest.fixture
def asserting(monkeypatch):
    """Device assertions hold in the interpreter, too; on a GPU the kernel that has them is compiled for them."""
    builder = triton.runtime.interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)
    monkeypatch.setattr(builder, "options", options)


def assert_fails(message, case, position=None, **how):
    """A step fails with ``message``."""
    with pytest.raises(Exception, match=re.escape(message)):
        case.step(position=position, decode=portable_kernels, **how)


@pytest.mark.parametrize("queries", [1, 3])
def test_a_step_asserts_that_positions_leave_no_gap_and_fit(queries, asserting):
    case = make_case(heads=1, group=1, tokens=40, queries=queries)
    for bad in ([-1], [case.written + 1], [case.written, case.written + 1], [0, -1], [2**33]):
        assert_fails(OUT_OF_PLACE, case, torch.tensor(bad))
    case.step(position=torch.tensor([0, case.written]), decode=portable_kernels)
    case.step(decode=portable_kernels, length=40)
    assert_fails(OUT_OF_PLACE, case, length=39)


@pytest.mark.parametrize("position", [None, [36]])
def test_a_step_asserts_that_a_growing_cache_has_room(position, asserting):
    for tokens in (36, 37):
        case = make_case(heads=1, group=1, tokens=tokens)
        keys, values = (compressed(x, tokens - 1, 8, 4, 32) for x in (case.keys, case.values))
        how = {"keys": keys, "values": values}
        if tokens == 36:
            case.step(decode=portable_kernels, **how)
        else:
            assert_fails(OUT_OF_PLACE, case, position and torch.tensor(position), **how)


def test_a_step_asserts_that_both_caches_hold_the_tokens(asserting):
    case = make_case(tokens=40)
    for role in ("keys", "values"):
        shorter = {"keys": case.past("key"), "values": case.past("value")}
        shorter[role].counts[1, 0] = 20
        assert_fails(OUT_OF_PLACE, case, torch.tensor([case.written]), **shorter)


@pytest.mark.parametrize(("queries", "kind"), [(1, "additive"), *at_night([(2, "bool")])])
def test_a_step_of_a_static_cache_asserts_that_the_mask_leaves_out_what_was_never_written(queries, kind, asserting):
    length, tokens = 4200, 40  # pieces of the mask for several programs
    places = (tokens, 127, 4095, 4096, length - 1)
    shapes = {(length,): places, (2, 1, 1, length): places[:1], (1, 2, queries, length): places[-1:]}
    for shape, unwritten in shapes.items():
        case = make_case(batch=2 if shape[0] == 2 else 1, heads=1, group=2, tokens=tokens, queries=queries)
        for place in (None, *unwritten):
            allowed = (torch.arange(length) < tokens).repeat(*shape[:-1], 1).view(shape)
            if place is not None:
                allowed.view(-1, length)[-1, place] = True
            case.mask = allowed if kind == "bool" else torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
            if place is None:
                case.step(decode=portable_kernels, length=length)
            else:
                assert_fails(UNWRITTEN, case, length=length)
    case.step(decode=portable_kernels)  # a growing cache has no such places
    case.step(decode=functools.partial(portable_kernels, checked=False), length=length)


# ----------------------------------------------------------------------------------------- what lies beside the buffers


@pytest.mark.parametrize(("queries", "group", "mask", "first"), [(1, 2, None, 0), *at_night([(2, 1, "bool", 1)])])
@pytest.mark.parametrize("later", [0, *at_night([2])])
def test_a_step_keeps_to_its_buffers(queries, group, mask, first, later):
    check_step(portable_kernels, queries, group, mask, steps=STEPS[first + later :: 4])


@pytest.mark.parametrize(("codes", "kept"), [(("int8", "int4"), 8), *at_night([(("int4", "int8"), 64)])])
def test_a_step_over_coded_rows_keeps_to_its_buffers(codes, kept):
    check_step(portable_kernels, steps=STEPS[-2:-1], codes=codes, kept=kept)


@pytest.mark.nightly
def test_a_step_that_is_done_again_keeps_to_its_buffers(exact_for_extremes):
    def decode(step, **how):
        for cache in (step.keys, step.values):
            cache.counts[:, 2] = 1
        return portable_kernels(step, **how)

    check_step(decode, steps=STEPS[2::4])


@pytest.mark.parametrize("code", ["none", *at_night(CODED)])
def test_compressing_keeps_to_its_buffers(code):
    check_compress(kernels, code=code)


@pytest.mark.parametrize("code", ["none", *at_night(CODED)])
def test_decompressing_keeps_to_its_buffers(code):
    check_decompress(kernels, code=code)
