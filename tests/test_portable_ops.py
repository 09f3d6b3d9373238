"""The custom ops, eager, against the oracle: pruning and packing exactly, attention to its own rounding error."""

from __future__ import annotations

import itertools
import math
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cases import (
    BITS,
    BORDERS,
    INF,
    LAYOUTS,
    NAN,
    REWINDING,
    Case,
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
    dtypes,
    make_case,
    make_mask,
    make_sinks,
    moves,
    partly_written,
    randn,
    row_holding,
    rows,
    rows_of,
    seeds,
    sparsities,
    strided,
    with_length,
)
from mustafar_compile.lowering import ops, portable
from mustafar_compile.lowering import rows as packing
from mustafar_compile.lowering.buffers import CACHE_DTYPES
from mustafar_compile.lowering.format import EXTREME, MAX_QUERY_TOKENS, Format
from nightly import at_night
from reference import kept_count, kept_mask, prune, pruned_cache

# ----------------------------------------------------------------------------------------------- rows: prune, pack


def row_with(head_dim, channels, dtype=torch.float32):
    """A row of zeros with ones in ``channels``."""
    x = torch.zeros(1, head_dim, dtype=dtype)
    x[:, channels] = 1
    return x


def words_of(kept):
    """The words of the bitmap of a row, bit by bit as the layout says; ``kept``: a boolean for each channel."""
    words = [0] * math.ceil(len(kept) / 32)
    for channel, is_kept in enumerate(kept):
        word, within = divmod(channel, 32)
        i, c = divmod(within, 4)
        words[word] |= is_kept << (8 * c + i)
    return [word - 2**32 if word >= 2**31 else word for word in words]  # as a signed integer


@given(rows(), st.integers(1, 32))
@example(torch.zeros(2, 64), 4)
@example(torch.full((1, 128), -0.0), 5)
@example(torch.ones(1, 256), 31)
@example(torch.full((1, 64), NAN), 1)
@example(torch.tensor([[0.0, -0.0] * 8]), 1)
@example(torch.tensor([[INF, NAN, -INF, -NAN, 3.0, -3.0, 3.0, 1.0] * 2]), 1)
@example(row_with(64, slice(0, 32)), 4)  # the first half is kept
@example(row_with(64, slice(32, 64)), 4)  # the last half
@example(row_with(64, slice(24, 32)), 1)  # the last two groups of a word
@example(row_with(128, slice(32, 64)), 4)  # one word of the bitmap
@example(row_with(256, slice(8, 256)), 31)  # 248 kept channels, most of them before the last group
@example(torch.ones(2, 40), 5)  # a word of which channels past the row take three quarters
@example(torch.tensor([[65504.0, -65504.0, 6e-8, -6e-8, 0.0, 1.0, -1.0, 2.0] * 2], dtype=torch.float16), 1)
def test_packing_a_row_is_pruning_it(x, eights):
    kept = min(8 * eights, x.shape[-1])
    format = Format.interned(x.shape[-1], kept, 1)
    values, words = packing.pack(x, format)
    mask = kept_mask(x, kept)
    assert words.dtype == torch.int32
    assert words.tolist() == [words_of(row) for row in mask.tolist()]
    assert_same_bits(values.reshape(-1), x[mask])
    assert values.is_contiguous()
    assert_same_bits(packing.expand((values, words), format), prune(x, kept))


@given(rows(), st.integers(1, 32))
def test_every_row_keeps_the_same_number(x, eights):
    kept = min(8 * eights, x.shape[-1])
    mask = packing.keep_mask(x, kept)
    assert mask.sum(-1).tolist() == [kept] * len(x)
    words = packing.pack(x, Format.interned(x.shape[-1], kept, 1))[1].tolist()
    assert [sum((word % 2**32).bit_count() for word in row) for row in words] == [kept] * len(x)


def test_ties_keep_the_lower_channels():
    x = torch.tensor([[1.0, 2.0, -1.0, 1.0, -2.0, 1.0, 1.0, -1.0] + [1.0] * 8])
    assert packing.keep_mask(x, 8)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert packing.keep_mask(x.flip(-1), 8)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 11, 14]


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_nan_is_kept_before_infinity(dtype):
    x = torch.full((1, 16), INF, dtype=dtype)
    x[:, [3, 15]] = NAN
    assert packing.keep_mask(x, 8)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 15]


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_all_nan_tie(dtype):
    """Whatever bits stand behind them."""
    infinity = torch.tensor(INF, dtype=dtype).view(BITS[dtype])
    x = (infinity + torch.arange(1, 17, dtype=BITS[dtype])).view(dtype).unsqueeze(0)
    assert x.isnan().all()
    assert packing.keep_mask(x, 8)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("head_dim", [8, 24, 32, 40, 80, 128, 264])
def test_the_bit_of_every_channel(head_dim):
    """One channel at a time, at the other end of its word than little-endian order would have it."""
    for channel in range(head_dim):
        x = row_with(head_dim, channel)
        _, words = packing.pack(torch.cat([x, -x]), Format.interned(head_dim, 8, 1))
        fillers = [c for c in range(9) if c != channel][:7]  # zeros tie, and the lower channels win
        expected = words_of([c == channel or c in fillers for c in range(head_dim)])
        assert words.tolist() == [expected] * 2
    assert words_of([c == 5 for c in range(8)]) == [1 << 9], "channel 5 = 4 * 1 + 1 is bit 8 * 1 + 1"
    assert words_of([c == 31 + 32 for c in range(64)]) == [0, -(2**31)], "the last channel is the highest bit"


@pytest.mark.parametrize("before", [False, True], ids=["alone", "after kept channels"])
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_every_group_of_four_channels_expands(dtype, before):
    """All its 16 forms at each of the 8 places in a word."""
    values = torch.arange(1, 33, dtype=dtype).unsqueeze(0)
    for i, form in itertools.product(range(8), range(16)):
        channels = [c for c in range(4 * i) if before] + [4 * i + c for c in range(4) if form >> c & 1]
        words = torch.tensor([words_of([c in channels for c in range(32)])], dtype=torch.int32)
        dense = packing.expand((values, words), Format.interned(32, 32, 1))[0].tolist()
        assert [c for c in range(32) if dense[c]] == channels
        assert [dense[c] for c in channels] == list(range(1, len(channels) + 1))


def test_rows_of_more_than_256_channels():
    """More kept channels before a group than a byte counts to."""
    for head_dim in (264, 576):
        x = randn(3, head_dim, seed=0)
        for kept in (8, 256, head_dim - 8, head_dim):
            format = Format.interned(head_dim, kept, 1)
            assert_same_bits(packing.expand(packing.pack(x, format), format), prune(x, kept))


# ------------------------------------------------------------------------------------------- compress and decompress


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 80), st.integers(1, 10)),
    written=st.floats(0, 1),
    window=st.integers(1, 45),
    spare=st.integers(-40, 10),
    sparsity=sparsities,
    dtype=dtypes,
    how=st.sampled_from(LAYOUTS),
    seed=seeds,
)
def test_a_compressed_cache_stands_for_the_pruned_one(sizes, written, window, spare, sparsity, dtype, how, seed):
    batch, heads, length, eights = sizes
    tokens = round(written * length)
    capacity = max(length + spare, tokens - window, 0)
    dense = strided(randn(batch, heads, length, 8 * eights, seed=seed, dtype=dtype), how)
    expected = pruned_cache(dense[:, :, :tokens], sparsity, window)
    dense = partly_written(dense, tokens)
    kept = kept_count(8 * eights, sparsity)
    buffers = compressed(strided(dense, how), tokens, kept, window, capacity)
    assert [(tuple(b.shape), b.dtype) for b in buffers] == buffers.format.shapes(batch, heads, capacity, dtype)
    assert all(b.is_contiguous() for b in buffers)
    assert buffers.counts.tolist() == counts_of(tokens, window, batch=batch), "NaN that is not written is not extreme"
    for asked in {tokens, length, length + 7, max(tokens - 1, 0)}:
        assert_same_bits(decompressed(buffers, asked), with_length(expected, asked))


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 12])
def test_compressing_a_part_of_a_static_cache(device, tokens):
    dense = randn(2, 2, 12, 16, seed=1, device=device)
    buffers = compressed(dense, tokens, 8, 4, 12)
    assert buffers.counts.tolist() == counts_of(tokens, 4, batch=2)
    assert_same_bits(decompressed(buffers, 12), with_length(pruned_cache(dense[:, :, :tokens], 0.5, 4), 12))


@pytest.mark.parametrize(("head_dim", "kept"), [(8, 8), (40, 24), (64, 32), (80, 24)])
@pytest.mark.parametrize("how", ["compress", "append"])
def test_where_every_kept_element_stands(head_dim, kept, how):
    """Element by element, as the layout says, over more than two blocks."""
    tokens, window = 71, 2
    dense = randn(2, 1, tokens, head_dim, seed=4, dtype=torch.bfloat16)
    if how == "compress":
        buffers = compressed(dense, tokens, kept, window, tokens)
    else:
        buffers = compressed(dense[:, :, :1], 1, kept, window, tokens)
        for n in range(1, tokens):
            portable.append(dense[:, :, n : n + 1], buffers, buffers.format, None)
    values, bitmap = buffers.values, buffers.bitmap
    for b in range(2):
        for t in range(tokens - window):
            row = dense[b, 0, t]
            channels = sorted(row.abs().sort(descending=True, stable=True).indices[:kept].tolist())
            for r, channel in enumerate(channels):
                assert values[b, 0, t // 32, r // 8, t % 32, r % 8] == row[channel]
            assert bitmap[b, 0, t // 32, t % 32].tolist() == words_of([c in channels for c in range(head_dim)])


# ------------------------------------------------------------------------------------------------ the extreme flag


@pytest.mark.parametrize(("dtype", "value", "flag"), BORDERS)
def test_what_is_extreme(dtype, value, flag, device):
    x = torch.tensor([1.0, value], dtype=dtype, device=device)
    assert math.isnan(value) or x[1].item() == value, "the value has to be one of the dtype"
    assert packing.extreme(x).tolist() == [False, bool(flag)]
    assert EXTREME == 2.0**97


@pytest.mark.parametrize(("dtype", "value", "flag"), BORDERS)
def test_a_token_with_an_extreme_value_sets_the_flag_of_its_own_cache(dtype, value, flag, device):
    plain, row = row_holding(0, dtype, device), row_holding(value, dtype, device)
    for role in (0, 1):
        buffers = [compressed(plain, 1, 8, 2, 9) for _ in range(2)]
        new = [row if i == role else plain for i in range(2)]
        attention(plain, *new, *buffers, None, None, None, 0.1)
        assert [b.counts[:, 2].tolist() for b in buffers] == [[0, flag if i == role else 0] for i in range(2)]


@pytest.mark.parametrize(("dtype", "value", "flag"), BORDERS)
def test_compressing_an_extreme_value_sets_the_flag_where_it_is_written(dtype, value, flag, device):
    plain, row = row_holding(0, dtype, device), row_holding(value, dtype, device)
    for place in range(6):
        dense = torch.cat([row if i == place else plain for i in range(6)], dim=2)
        for tokens in range(7):
            counts = compressed(dense, tokens, 8, 2, 6).counts.tolist()
            assert counts == counts_of(tokens, 2) + counts_of(tokens, 2, flag if place < tokens else 0)


@pytest.mark.parametrize("position", [None, "given"])
def test_the_flag_is_sticky(position, device):
    """Also after the token is overwritten: what was packed from it may still lie somewhere."""
    plain = row_holding(0, torch.float32, device)
    buffers = compressed(row_holding(INF, torch.float32, device), 1, 8, 2, 9)
    assert buffers.counts.tolist() == [[1, 0, 0], [1, 0, 1]]
    for n in range(5):
        at = n if position else n + 1
        where = torch.tensor([at], device=device) if position else None
        portable.append(plain, buffers, buffers.format, where)
        assert buffers.counts.tolist() == counts_of(at + 1, 2) + counts_of(at + 1, 2, 1)


def test_what_lies_in_unwritten_slots_sets_no_flag():
    case = make_case(tokens=9, window=4)
    key, value = case.past("key"), case.past("value")
    assert key.values.isnan().any()
    case.step(key, value)
    assert key.counts.tolist() == value.counts.tolist() == counts_of(9, 4, batch=2)


# ------------------------------------------------------------------------------------------------- decode attention


@given(cases())
@example(make_case(tokens=1))
@example(make_case(tokens=5, window=4))  # the first token that is pruned
@example(make_case(tokens=4, window=4))
@example(make_case(tokens=9, window=1))
@example(make_case(group=8, heads=1))
@example(make_case(spare=0))
@example(make_case(mask=torch.zeros(2, 1, 1, 11, dtype=torch.bool)))
@example(make_case(mask=torch.full((11,), -INF)))
@example(make_case(mask=torch.ones(4, 1, 1, dtype=torch.bool)))
@example(make_case(mask=both_ways(3, 11), queries=3))
@example(make_case(mask=both_ways(3, 11), queries=3, window=1))
def test_a_step_equals_the_oracle(case):
    assert_close(case.step(), case)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_a_step_equals_the_oracle_on_every_device(device, dtype, group):
    case = make_case(heads=3, group=group, head_dim=64, value_dim=32, tokens=50, dtype=dtype, device=device, window=7)
    case.mask = make_mask("bool", (2, 1, 1, 50), 3).to(device)
    assert_close(case.step(), case, rounds_weights=device == "cuda")


@given(cases())
def test_nothing_pruned_equals_dense_attention(case):
    case.key_sparsity = case.value_sparsity = case.softcap = 0.0
    case.key_code = case.value_code = "none"
    case.sinks = None  # SDPA has none
    case.query, case.keys, case.values = case.query.float(), case.keys.float(), case.values.float()
    mask = torch.arange(case.tokens) <= torch.arange(case.written, case.tokens).unsqueeze(-1)
    if case.mask is not None:
        given_mask = case.mask[..., : case.tokens].expand(*case.query.shape[:3], case.tokens)
        mask = mask | case.sees_later
        mask = given_mask & mask if given_mask.dtype == torch.bool else given_mask.masked_fill(~mask, -INF)
    dense = torch.nn.functional.scaled_dot_product_attention(
        case.query, case.keys, case.values, mask, scale=case.scale_number, enable_gqa=True
    )
    assert_close(case.step(), case)
    assert_close(dense, case, factor=2)  # else this test would say nothing


@pytest.mark.parametrize("kind", ["bool", "-inf"])
def test_a_row_that_may_attend_to_nothing_gives_zeros_as_sdpa_does(kind):
    case = make_case(key_sparsity=0.0, value_sparsity=0.0)
    case.mask = make_mask(kind, (2, 4, 1, 11), 0)
    case.mask[1, 2] = False if kind == "bool" else -INF
    how = {"attn_mask": case.mask, "scale": case.scale_number, "enable_gqa": True}
    dense = torch.nn.functional.scaled_dot_product_attention(case.query, case.keys, case.values, **how)
    out = case.step()
    assert dense[1, 2].count_nonzero() == 0
    assert out[1, 2].count_nonzero() == 0
    assert_close(out, case)


@pytest.mark.parametrize("sink", [-INF, -3.0, 0.0, 200.0, NAN])
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_a_sink_takes_weight_and_gives_nothing(dtype, sink, device):
    """Scaled by neither ``scale`` nor ``softcap``, and not masked."""
    case = make_case(dtype=dtype, device=device, scale=0.01, softcap=0.5)
    case.sinks = torch.tensor([0.0, sink, -INF, 1.0], device=device)
    case.mask = torch.ones(2, 1, 1, 11, dtype=torch.bool, device=device)
    case.mask[1] = False
    out = case.step()
    assert_close(out, case, rounds_weights=device == "cuda")
    assert out[1, [0, 2, 3]].count_nonzero() == 0
    assert out[0, 1].isnan().any() == math.isnan(sink)
    if sink == -INF:
        without = make_case(dtype=dtype, device=device, scale=0.01, softcap=0.5, mask=case.mask).step()
        assert_same_bits(out[:, 1:3], without[:, 1:3])


@pytest.mark.parametrize("token", [2, 10], ids=["compressed", "in the window"])
@pytest.mark.parametrize("role", ["keys", "values"])
def test_a_bad_value_that_is_attended_to_is_not_hidden(role, token):
    case = make_case()
    getattr(case, role)[0, 0, token, 5] = NAN
    out = case.step()
    assert out[0, :2].isnan().any(-1).all(), "the query heads of the bad KV head"
    assert not out[0, 2:].isnan().any()
    assert not out[1].isnan().any()


def test_a_bad_key_that_is_masked_out_does_no_harm():
    """As in a dense score with masked_fill. Its value would: 0 * NaN is NaN there as here."""
    case = make_case(mask=torch.ones(2, 1, 1, 11, dtype=torch.bool))
    case.mask[0, ..., 2] = False
    clean = case.step()
    case.keys[0, :, 2] = NAN
    assert torch.equal(case.step(), clean)


@pytest.mark.parametrize("position", [None, "given"])
@pytest.mark.parametrize(("window", "tokens"), [(1, 9), (4, 3), (4, 4), (4, 5), (4, 23), (32, 40), (3, 70)])
def test_tokens_one_by_one_give_the_same_cache_as_all_at_once(window, tokens, position, device):
    case = make_case(tokens=tokens, window=window, head_dim=24, value_dim=16, spare=2, device=device)
    capacity = max(tokens - window, 1)
    empty = torch.zeros(1, dtype=torch.int64, device=device)
    grown = [compressed(x[:, :, :1], empty, 8, window, capacity) for x in (case.keys, case.values)]
    for n in range(tokens):
        step = Case(case.query, case.keys[:, :, : n + 1], case.values[:, :, : n + 1], window=window)
        step.key_sparsity, step.value_sparsity = 0.7, 0.5  # 8 of 24 and 8 of 16 channels
        where = torch.tensor([n], device=device) if position else None
        assert_close(step.step(*grown, where), step)
    for x, buffers in zip((case.keys, case.values), grown, strict=True):
        at_once = compressed(x, tokens, 8, window, max(capacity, tokens))
        assert torch.equal(buffers.counts, at_once.counts)
        pruned = max(tokens - window, 0)
        for mine, other in zip(rows_of(buffers), rows_of(at_once), strict=True):
            assert torch.equal(mine[:, :, :pruned], other[:, :, :pruned])
        assert torch.equal(buffers.window, at_once.window)
        assert_same_bits(decompressed(buffers, tokens), decompressed(at_once, tokens))


@given(moves, st.integers(1, 6), seeds)
@example(*REWINDING[0])
@example(*REWINDING[1])
@example(*REWINDING[2])
@example(*REWINDING[3])
@example(*REWINDING[4])
def test_writing_at_an_earlier_position_rewinds(moves, window, seed):
    check_steps(moves, window, seed)


@pytest.mark.parametrize("start", [3, *at_night([0, 40])])
def test_steps_of_any_number_of_tokens_on_every_device(device, start):
    for how, window, seed in REWINDING:
        check_steps(how, window, seed, start=start, head_dim=64, dtype=torch.bfloat16, device=device)


@pytest.mark.parametrize("queries", [2, 5, MAX_QUERY_TOKENS])
@pytest.mark.parametrize(("window", "tokens"), [(1, 16), (1, 70), (4, 19), (4, 40), (7, 29), (32, 90)])
def test_tokens_at_once_equal_single_steps(window, tokens, queries, device):
    """Bit by bit in the caches, to rounding in the results."""
    case = make_case(tokens=tokens, window=window, queries=queries, device=device, sinks=make_sinks(4, 0).to(device))
    case.mask = make_mask("bool", (2, 1, queries, tokens), 1).tril(tokens - queries).to(device)
    at_once, one_by_one = ([case.past("key"), case.past("value")] for _ in range(2))
    out = case.step(*at_once)
    singles = torch.cat([single.step(*one_by_one) for single in case.singles()], dim=2)
    assert_close(out, case, rounds_weights=device == "cuda")
    assert_close(singles, case, rounds_weights=device == "cuda")
    for mine, other in zip(at_once, one_by_one, strict=True):
        assert_same_cache(mine, other)


@pytest.mark.parametrize("window", [1, 4, 32])
def test_speculating_and_rewinding_equals_the_plain_sequence(window, device):
    """Five tokens, of which the last three are rejected, then four: as if six had come one by one."""
    start = 60
    case = make_case(tokens=start + 6, window=window, queries=6, device=device)
    drafted, plain = ([case.past("key"), case.past("value")] for _ in range(2))
    expected = torch.cat([single.step(*plain) for single in case.singles()], dim=2)
    new = [x[:, :, start:] for x in (case.keys, case.values)]
    rejected = [randn(2, 2, 3, 16, seed=i, device=device) for i in (50, 51)]
    first = [torch.cat([x[:, :, :2], bad], dim=2) for x, bad in zip(new, rejected, strict=True)]
    outs = []
    for position, query, tokens in (
        (start, case.query[:, :, :5], first),
        (start + 2, case.query[:, :, 2:], [x[:, :, 2:] for x in new]),
    ):
        at = torch.tensor([position], device=device)
        outs.append(attention(query, *tokens, *drafted, at, None, None, case.scale_number))
    out = torch.cat([outs[0][:, :, :2], outs[1]], dim=2)
    assert_close(out, case, rounds_weights=device == "cuda")
    assert_close(expected, case, rounds_weights=device == "cuda")
    for mine, other in zip(drafted, plain, strict=True):
        assert_same_cache(mine, other)


@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("window", [1, 4])
def test_a_bad_token_does_no_harm_to_those_before_it(role, window, device):
    case = make_case(tokens=40, queries=5, window=window, device=device)
    clean = case.step()
    getattr(case, role)[:, :, 37, 3] = NAN
    out = case.step()
    assert out[:, :, 2:].isnan().flatten(3).any(-1).all()
    assert_close(out[:, :, :2], replace(case, query=case.query[:, :, :2], **{
        name: getattr(case, name)[:, :, :37] for name in ("keys", "values")
    }), rounds_weights=device == "cuda")  # fmt: skip
    assert not clean.isnan().any()


@pytest.mark.parametrize("counts", [(0, 0, 0), (17, 17, 17), (3, 2, 3), (3, 3, 1), (1, 2, 2)])
@pytest.mark.parametrize("fake", [False, True])
def test_numbers_of_tokens_that_an_op_does_not_take(counts, fake):
    with FakeTensorMode() if fake else nullcontext():
        query, key, value = (torch.zeros(1, 2, count, 8) for count in counts)
        buffers = compressed(torch.zeros(1, 2, 20, 8), 20, 8, 4, 40)
        with pytest.raises(
            ValueError, match=re.escape(f"{list(counts)} tokens; accepted are as many of each, 1 to 16")
        ):
            attention(query, key, value, buffers, buffers, scale=0.1)


@pytest.mark.parametrize("queries", [1, 3, MAX_QUERY_TOKENS])
@pytest.mark.parametrize("tokens", [16, 37, 38, 50])
def test_only_the_written_slots_change(tokens, queries):
    case = make_case(tokens=tokens, window=4, spare=5, queries=queries)
    leaving, entering = range(max(case.written - 4, 0), tokens - 4), range(case.written, tokens)
    in_ring = [token % (4 + MAX_QUERY_TOKENS) for token in entering]
    for role in ("key", "value"):
        before, after = case.past(role), case.past(role)
        other = case.past("value" if role == "key" else "key")
        case.step(*((after, other) if role == "key" else (other, after)))
        slots = ((*rows_of(before), before.window), (*rows_of(after), after.window), (leaving, leaving, in_ring))
        for old, new, changed in zip(*slots, strict=True):
            same = [s for s in range(old.shape[2]) if s not in changed]
            assert torch.equal(old[:, :, same].nan_to_num(7), new[:, :, same].nan_to_num(7))
            assert not any(torch.equal(old[:, :, s], new[:, :, s]) for s in changed)


# ------------------------------------------------------------------------------------------- tracing and registration


def traced_targets(function, *arguments):
    graph = make_fx(function, tracing_mode="fake")(*arguments).graph
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


def list_of(x):
    """A cache as a plain list, as tracing takes it."""
    return list(x) if isinstance(x, list) else x


HOST_READS = ("_local_scalar_dense", "aten.item", "nonzero", "masked_select", "unique")


def test_nothing_waits_for_the_device():
    """No op reads a tensor's value on the host, so lengths may live on the device and CUDA graphs can be captured."""
    case = make_case(mask=torch.ones(2, 1, 1, 11, dtype=torch.bool), sinks=make_sinks(4, 0))
    text = case.past("key").format.encode()
    arguments = case.query, case.keys[:, :, -1:], case.values[:, :, -1:], case.past("key"), case.past("value")
    how = torch.tensor([10]), case.mask, case.sinks

    def step(query, key, value, keys, values, *rest):
        return ops.decode_attention(query, key, value, keys, values, text, text, *rest, 0.3, length=11)

    targets = traced_targets(step, *map(list_of, arguments), *how)
    targets |= traced_targets(lambda x, n: ops.compress(x, n, text, 20), case.keys, torch.tensor([5]))
    targets |= traced_targets(lambda xs: ops.decompress(xs, text, 12), list(case.past("key")))
    assert len(targets) > 20
    assert not [t for t in targets if any(read in t for read in HOST_READS)]


def test_shapes_are_known_without_data():
    with FakeTensorMode():
        x, q = torch.empty(2, 3, 40, 24, dtype=torch.bfloat16), torch.empty(2, 6, 1, 24, dtype=torch.bfloat16)
        text = Format.interned(24, 16, 4).encode()
        buffers = [ops.compress(x, torch.empty(1, dtype=torch.int64), text, 64) for _ in range(2)]
        out = ops.decode_attention(q, x[:, :, :1], x[:, :, :1], *buffers, text, text, None, None, None, 0.2)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        dense = ops.decompress(buffers[0], text, 50)
        assert (dense.shape, dense.dtype) == ((2, 3, 50, 24), x.dtype)
    assert [(tuple(b.shape), b.dtype) for b in buffers[0]] == Format.interned(24, 16, 4).shapes(2, 3, 64, x.dtype)


@pytest.mark.parametrize(
    ("name", "queries"),
    [("decompress", 1), *at_night([("compress", 1), ("decode_attention", 1), ("decode_attention", 3)])],
)
def test_the_schema_says_what_the_op_does(name, queries):
    case = make_case(mask=torch.ones(2, 1, 1, 11, dtype=torch.bool), sinks=make_sinks(4, 0), queries=queries)
    key, value = case.past("key"), case.past("value")
    for buffers in (key, value):
        buffers.values.nan_to_num_(0)  # the check compares, and NaN is unequal to itself
    new = (x[:, :, case.written :].clone() for x in (case.keys, case.values))
    text = key.format.encode()
    step = case.query, *new, list(key), list(value), text, text
    arguments = {
        "compress": (case.keys, torch.tensor([5]), text, 20),
        "decompress": (list(key), text, 12),
        "decode_attention": (*step, torch.tensor([case.written]), case.mask, case.sinks, 0.3),
    }
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(ops, name), arguments[name], test_utils=utils)
