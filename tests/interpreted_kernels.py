"""The plain Triton kernels in Triton's interpreter, on the CPU. ``test_kernels.py`` runs this in a process of its own.

bfloat16 is for the GPU: the interpreter's products of it are wrong.
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
from triton.runtime.interpreter import InterpretedFunction

from cases import (
    BORDERS,
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
    counts_of,
    decompressed,
    hard_rows,
    make_case,
    make_mask,
    make_sinks,
    partly_written,
    randn,
    row_holding,
    rows,
    seeds,
    sparsities,
    sparsity_for,
    strided,
    with_length,
)
from guarded import STEPS, check_compress, check_decompress, check_step
from mustafar_compile.lowering import kernels, portable
from mustafar_compile.lowering.checks import OUT_OF_PLACE, UNWRITTEN
from nightly import at_night, mostly_at_night
from pairwise import pairwise
from ragged import POSITIONS, check_ragged, check_ragged_cache
from reference import kept_count, pruned_cache

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
portable_kernels = functools.partial(kernels.decode_attention, variant="portable")


def stepped(case, position=None):
    """The result of a step through the kernels; the caches must become what ``portable`` makes of them."""
    ours, theirs = ([case.past("key"), case.past("value")] for _ in range(2))
    out = case.step(*ours, position, decode=portable_kernels)
    case.step(*theirs, position, decode=portable.decode_attention)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_cache(mine, other)
    return out


# ------------------------------------------------------------------------------------------- compress and decompress


def check_compressed(dense, tokens, kept, window, capacity):
    cache, expected = (compressed(dense, tokens, kept, window, capacity, by=by) for by in (kernels, portable))
    assert [(b.shape, b.dtype) for b in cache] == [(b.shape, b.dtype) for b in expected]
    assert_same_cache(cache, expected)
    return cache


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
)
def test_a_compressed_cache_stands_for_the_pruned_one(sizes, written, window, spare, sparsity, dtype, how, seed):
    batch, heads, length, eights = sizes
    tokens, head_dim = round(written * length), 8 * eights
    dense = strided(randn(batch, heads, length, head_dim, seed=seed, dtype=dtype), how)
    expected = pruned_cache(dense[:, :, :tokens], sparsity, window)
    dense = strided(partly_written(dense, tokens), how)
    kept, capacity = kept_count(head_dim, sparsity), max(length + spare, tokens - window, 0)
    cache = check_compressed(dense, tokens, kept, window, capacity)
    assert cache.counts.tolist() == counts_of(tokens, window, batch=batch), "NaN that is not written is not extreme"
    for asked in {tokens, length + 7, max(tokens - 1, 0)}:
        assert_same_bits(decompressed(cache, asked, by=kernels), with_length(expected, asked))


@few
@given(rows(dtypes=narrow), st.integers(1, 32))
def test_rows_of_all_kinds(x, eights):
    kept = min(8 * eights, x.shape[-1])
    cache = check_compressed(x[None, None], len(x), kept, 1, len(x))
    expected = pruned_cache(x[None, None], sparsity_for(x.shape[-1], kept), 1)
    assert_same_bits(decompressed(cache, len(x), by=kernels), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "kept"), [(8, 8), (24, 8), (64, 32), (80, 40), (128, 8), (128, 120)])
def test_rows_that_are_hard_to_rank(head_dim, kept, dtype):
    """Ties, NaN, denormals; all kept channels first, last, in one word, at both ends."""
    dense = hard_rows(head_dim, kept, dtype)[None, None]
    length = dense.shape[2]
    cache = check_compressed(dense, length, kept, 1, length)
    expected = pruned_cache(dense, sparsity_for(head_dim, kept), 1)
    assert_same_bits(decompressed(cache, length, by=kernels), expected)


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 40, 64])
def test_compressing_a_part_of_a_static_cache(tokens):
    dense = randn(1, 2, 64, 24, seed=1)
    cache = check_compressed(dense, tokens, 8, 7, 64)
    assert_same_bits(decompressed(cache, 64, by=kernels), with_length(pruned_cache(dense[:, :, :tokens], 0.7, 7), 64))


def test_compressing_no_rows():
    cache = compressed(torch.zeros(1, 2, 0, 16), 0, 8, 4, 10, by=kernels)
    assert cache.counts.tolist() == [[0, 0, 0]]
    assert not cache.window.any()
    assert decompressed(cache, 0, by=kernels).shape == (1, 2, 0, 16)
    assert not decompressed(cache, 3, by=kernels).any()


@pytest.mark.parametrize(("dtype", "value", "flag"), mostly_at_night(BORDERS, 4))
def test_the_flag_of_extreme_values(dtype, value, flag):
    """Set by compressing where it is written, and by appending to the cache that gets it; it stays, with its row."""
    plain, row = (row_holding(v, dtype)[:, 1:] for v in (0, value))
    for place, tokens in ((0, 6), (5, 5), (5, 6)):
        dense = torch.cat([row if i == place else plain for i in range(6)], dim=2)
        counts = compressed(dense, tokens, 8, 2, 6, by=kernels).counts
        assert counts.tolist() == counts_of(tokens, 2) + counts_of(tokens, 2, flag if place < tokens else 0)
    if dtype == torch.bfloat16:
        return
    for role in (0, 1):
        caches = [compressed(plain, 1, 8, 2, 9, by=portable) for _ in range(2)]
        new = [row if i == role else plain for i in range(2)]
        attention(plain, *new, *caches, scale=0.1, decode=portable_kernels)
        assert [c.counts.tolist() for c in caches] == [[[2, 0, 0], [2, 0, flag if i == role else 0]] for i in range(2)]
        if role == 0 and flag:
            attention(plain, plain, plain, *caches, scale=0.1, decode=portable_kernels)
            assert [c.counts.tolist() for c in caches] == [[[3, 0, 0], [3, 0, 1]], [[3, 0, 0], [3, 0, 0]]]


# ------------------------------------------------------------------------------------------------- decode attention


@few
@given(cases(narrow, (8, 24, 64, 80, 128), (1, 7, 32, 40, 100), few_queries), st.booleans())
@example(make_case(tokens=1), False)
@example(make_case(tokens=5, window=4), True)  # the first token that is pruned
@example(make_case(tokens=4, window=4), False)
@example(make_case(tokens=9, window=1), False)
@example(make_case(tokens=33, window=1, batch=1), False)
@example(make_case(tokens=34, window=1, batch=1), False)
@example(make_case(tokens=70, window=100, batch=1), False)
@example(make_case(batch=1, heads=1, tokens=140, group=3), True)  # several splits
@example(make_case(mask=torch.zeros(2, 1, 1, 11, dtype=torch.bool)), False)
@example(make_case(mask=torch.full((11,), -INF)), False)
@example(make_case(mask=torch.full((1, 1, 1, 11), torch.finfo(torch.float32).min)), False)
@example(make_case(mask=torch.full((1, 1, 1, 11), -65504.0, dtype=torch.float16), dtype=torch.float16), False)
@example(make_case(mask=torch.ones(4, 1, 1, dtype=torch.bool)), False)
@example(make_case(mask=both_ways(3, 11), queries=3), False)
@example(make_case(mask=both_ways(3, 11), queries=3, window=1), False)
def test_a_step_equals_the_oracle(case, position):
    out = stepped(case, torch.tensor([case.written]) if position else None)
    assert_close(out, case, rounds_weights=True)


@pytest.mark.parametrize(
    ("how", "position"),
    [
        ({"heads": 1, "group": 1, "tokens": 20, "queries": 16}, True),  # new tokens leave the window
        *at_night(
            [
                (
                    {"heads": 1, "group": 5, "tokens": 75, "window": 7, "queries": 13},
                    False,
                ),  # more than a tile
                ({"heads": 1, "group": 20, "tokens": 45, "window": 7}, False),
            ]
        ),
    ],
)
def test_a_step_of_many_rows_equals_the_oracle(how, position):
    case = make_case(batch=1, **how)
    assert_close(stepped(case, torch.tensor([case.written]) if position else None), case, rounds_weights=True)


def test_a_mask_of_each_head_and_batch_entry():
    case = make_case(heads=3, group=2, tokens=50)
    case.mask = make_mask("bool", (2, 6, 1, 50), 3, density=0.2)
    assert_close(stepped(case), case, rounds_weights=True)
    case.mask = make_mask("bias", (6, 2, 1, 50), 4).transpose(0, 1)
    assert_close(stepped(case), case, rounds_weights=True)
    case = make_case(batch=1, group=2, tokens=50, queries=5)
    case.mask = make_mask("bool", (1, 4, 5, 50), 5, density=0.2)
    assert_close(stepped(case), case, rounds_weights=True)


def test_what_may_attend_to_nothing_gives_zeros():
    case = make_case(tokens=40)
    case.mask = torch.ones(2, 4, 1, 40, dtype=torch.bool)
    case.mask[1, 2] = False
    case.mask[0, 1, :, :38] = False  # nothing but the window
    case.mask[0, 2, :, 3:] = False  # nothing but the compressed part
    out = stepped(case)
    assert out[1, 2].count_nonzero() == 0
    assert_close(out, case, rounds_weights=True)


@pytest.mark.parametrize("sink", mostly_at_night([200.0, NAN, -INF, 0.0], 2))
def test_a_sink_takes_weight_and_gives_nothing(sink):
    case = make_case(tokens=40, scale=0.01, softcap=0.5, sinks=torch.tensor([0.0, sink, -INF, 1.0]))
    case.mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    case.mask[1] = False
    assert_close(stepped(case), case, rounds_weights=True)


def test_inputs_of_any_strides():
    case = make_case(batch=1, tokens=38)
    clean = stepped(case)
    for how in LAYOUTS[1:-1]:
        case.query, case.keys, case.values = (strided(x, how) for x in (case.query, case.keys, case.values))
        assert torch.equal(stepped(case), clean)


def test_caches_of_different_capacity():
    case = make_case(tokens=70, batch=2)
    larger = make_case(tokens=70, batch=2, spare=100)
    for caches in ((case.past("key"), larger.past("value")), (larger.past("key"), case.past("value"))):
        assert_close(case.step(*caches, decode=portable_kernels), case, rounds_weights=True)


@pytest.mark.parametrize(
    ("window", "tokens", "position"),
    [
        (1, 5, None),
        (4, 6, "given"),
        (3, 36, "given"),
        *at_night([(1, 5, "given"), (4, 6, None), (3, 36, None)]),
    ],
)
def test_tokens_one_by_one_give_the_same_cache_as_all_at_once(window, tokens, position):
    case = make_case(batch=1, heads=1, tokens=tokens, head_dim=24, value_dim=16)
    start = max(0, tokens - 6)
    grown = [compressed(x, start, 8, window, tokens, by=portable) for x in (case.keys, case.values)]
    for n in range(start, tokens):
        new = case.keys[:, :, n : n + 1], case.values[:, :, n : n + 1]
        at = torch.tensor([n]) if position else None
        attention(case.query, *new, *grown, at, scale=0.2, decode=portable_kernels)
    for x, cache in zip((case.keys, case.values), grown, strict=True):
        assert_same_cache(cache, compressed(x, tokens, 8, window, tokens, by=portable))


@pytest.mark.parametrize(("position", "queries"), mostly_at_night(pairwise([*POSITIONS.values()], (1, 3)), 5))
def test_rows_of_the_batch_in_step_stand_at_places_of_their_own(position, queries):
    check_ragged(portable_kernels, position, queries)


def test_rows_of_the_batch_hold_tokens_of_their_own():
    check_ragged_cache(kernels)


@pytest.mark.parametrize(
    ("moves", "window", "seed"), [*REWINDING[:2], REWINDING[3], *at_night([REWINDING[2], REWINDING[4]])]
)
def test_writing_at_an_earlier_position_rewinds(moves, window, seed):
    check_steps(moves[-3:], window, seed, decode=portable_kernels, start=30)


# --------------------------------------------------------------------------------------- values that are not ordinary

SPOILT = [NAN, INF, -INF, 1e38, -3e38, 2.0**96, 2.0**98]
ROLES = "keys", "values"


@pytest.mark.parametrize(  # compressed, in the window
    ("value", "role", "token"), mostly_at_night(pairwise(SPOILT, ROLES, (2, 39)), 7)
)
def test_extreme_values_count_as_in_the_oracle(role, token, value):
    case = make_case(tokens=41, batch=1)
    case.query = case.query / 64  # no score overflows
    getattr(case, role)[0, 0, token, 5] = value
    assert_close(stepped(case), case, rounds_weights=True)


def test_a_channel_of_huge_values():
    """Their sum is no float32, their average is one."""
    case = make_case(tokens=90, batch=1, window=40)
    case.values[..., 3] = 3e38
    assert_close(stepped(case), case, rounds_weights=True)


def test_a_bad_key_that_is_masked_out_does_no_harm():
    case = make_case(mask=torch.ones(2, 1, 1, 11, dtype=torch.bool))
    case.mask[0, ..., [2, 9]] = False
    clean = stepped(case)
    case.keys[0, :, [2, 9]] = NAN
    assert torch.equal(stepped(case), clean)


@pytest.fixture
def exact_for_extremes(monkeypatch):
    """Kernels of a step with a tuned ``attend``, whose results are lost: only what is done again can be right."""
    combine = kernels.Step.combine

    def with_repetition(self, parts, heads, channels, exact_for_extremes, overlap):
        assert not exact_for_extremes, "the plain kernel is exact"
        return combine(self, parts, heads, channels, True, overlap)

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


@pytest.mark.parametrize(("value", "role", "queries"), mostly_at_night(pairwise(SPOILT, ROLES, (1, 2)), 7))
def test_a_step_with_extreme_values_is_done_again(role, value, queries, exact_for_extremes):
    case = make_case(tokens=75, group=6, batch=1, window=17, queries=queries)
    case.query = case.query / 64
    case.mask = make_mask("bias", (1, 12, queries, 75), 5)
    case.sinks = make_sinks(12, 3)
    getattr(case, role)[0, 1, 7, 5] = value
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
        case = make_case(heads=1, group=2, tokens=tokens, queries=queries)
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


@pytest.mark.nightly
def test_a_step_that_is_done_again_keeps_to_its_buffers(exact_for_extremes):
    def decode(*given, **how):
        for cache in given[3:5]:
            cache.counts[:, 2] = 1
        return portable_kernels(*given, **how)

    check_step(decode, steps=STEPS[2::4])


def test_compressing_keeps_to_its_buffers():
    check_compress(kernels)


def test_decompressing_keeps_to_its_buffers():
    check_decompress(kernels)
