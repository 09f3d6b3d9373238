"""What kernels of every kind are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cases import (
    BORDERS,
    INF,
    LAYOUTS,
    NAN,
    assert_close,
    assert_same_cache,
    assert_same_rows,
    attention,
    compressed,
    counts_of,
    decompressed,
    make_case,
    make_mask,
    partly_written,
    randn,
    row_holding,
    sparsity_for,
    strided,
    weights_of,
    with_length,
)
from mustafar_compile.lowering import portable
from mustafar_compile.lowering.codes import level_table
from nightly import mostly_at_night
from pairwise import pairwise
from ragged import POSITIONS, check_ragged, check_ragged_cache
from reference import kept_count, pruned_cache

SPOILT = [NAN, INF, -INF, 1e38, -3e38, 2.0**96, 2.0**98]
ROLES = "keys", "values"


@dataclass(frozen=True)
class Kernels:
    """Kernels under test, with the signatures of ``lowering.portable``.

    order: of the formats that they take. sizes, dtypes, codes: those of heads, and of steps, that the checks use.
    """

    compress: Callable
    decompress: Callable
    decode_attention: Callable
    order: str = "blocks"
    sizes: dict[str, int] = field(default_factory=lambda: {"head_dim": 16, "value_dim": 16})
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    codes: dict[str, str] = field(default_factory=dict)

    def case(self, **how):
        """``make_case`` with heads, codes and order as these kernels want them."""
        return make_case(**self.sizes | self.codes | how, order=self.order)

    def compressed(self, dense, tokens, kept, window, capacity, by=None, **how):
        """A cache, compressed by these kernels or ``by`` others."""
        return compressed(dense, tokens, kept, window, capacity, by=by or self, order=self.order, **how)

    def compressed_as_portable(self, *given, **how):
        """``compressed``, which must be what ``portable`` makes."""
        cache, expected = (self.compressed(*given, by=by, **how) for by in (self, portable))
        assert [(b.shape, b.dtype) for b in cache] == [(b.shape, b.dtype) for b in expected]
        assert_same_cache(cache, expected)
        return cache

    def stepped(self, case, position=None):
        """The result of a step; the caches must become what ``portable`` makes of them."""
        case = replace(case, order=self.order)
        ours, theirs = ([case.past("key"), case.past("value")] for _ in range(2))
        out = case.step(*ours, position, decode=self.decode_attention)
        case.step(*theirs, position, decode=portable.decode_attention)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_cache(mine, other)
        return out

    def check_step(self, case, position=None):
        """A step, against the oracle."""
        assert_close(self.stepped(case, position), case, rounds_weights=True)


class Copies(TorchDispatchMode):
    """Notes what copies a tensor."""

    def __init__(self, noted):
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            self.noted.append((str(func),))
        return func(*args, **(kwargs or {}))


def check_a_compressed_cache(kernels, sizes, written, window, spare, sparsity, dtype, how, seed, code="none"):
    """It stands for the pruned one. sizes: batch, heads, tokens and eighths of the channels."""
    batch, heads, length, eights = sizes
    tokens, head_dim = round(written * length), 8 * eights
    dense = strided(randn(batch, heads, length, head_dim, seed=seed, dtype=dtype), how)
    expected = pruned_cache(dense[:, :, :tokens], sparsity, window, code)
    dense = strided(partly_written(dense, tokens), how)
    kept, capacity = kept_count(head_dim, sparsity), max(length + spare, tokens - window, 0)
    cache = kernels.compressed_as_portable(dense, tokens, kept, window, capacity, code=code)
    assert cache.counts.tolist() == counts_of(tokens, window, batch=batch), "NaN that is not written is not extreme"
    for asked in {tokens, length + 7, max(tokens - 1, 0)}:
        assert_same_rows(decompressed(cache, asked, by=kernels), with_length(expected, asked), code)


def check_rows(kernels, x, kept, code="none", weights=None):
    """Rows [n, D] come back pruned, bit by bit; with a code as what it makes of them. weights: [1, 1, 1, D]."""
    cache = kernels.compressed_as_portable(x[None, None], len(x), kept, 1, len(x), code=code, weights=weights)
    each = None if weights is None else weights.expand(1, 1, *x.shape)
    expected = pruned_cache(x[None, None], sparsity_for(x.shape[-1], kept), 1, code, each)
    assert_same_rows(decompressed(cache, len(x), by=kernels), expected, code)


def every_level():
    """[128, 16]: a row for each floor of int4, with all its levels and their negatives."""
    levels = torch.tensor(level_table(), dtype=torch.float32)
    return torch.cat([levels, -levels], dim=1)


class KernelChecks:
    """A class of tests that has this one as its base runs these on the fixture ``kernels``."""

    def test_compressing_no_rows(self, kernels):
        head_dim = kernels.sizes["head_dim"]
        cache = kernels.compressed(torch.zeros(1, 2, 0, head_dim), 0, 8, 4, 10)
        assert cache.counts.tolist() == [[0, 0, 0]]
        assert not cache.window.any()
        assert decompressed(cache, 0, by=kernels).shape == (1, 2, 0, head_dim)
        assert not decompressed(cache, 3, by=kernels).any()

    def test_every_level_of_every_floor(self, kernels):
        """Of int4, whose levels are a rounded quotient."""
        check_rows(kernels, every_level(), 16, "int4")

    @pytest.mark.parametrize(("dtype", "value", "flag"), mostly_at_night(BORDERS, 4))
    def test_the_flag_of_extreme_values(self, kernels, dtype, value, flag):
        """Set by compressing where it is written, by appending to the cache that gets it; it stays, with its row."""
        wider = max(kernels.sizes["head_dim"] - 40, 0), 0
        plain, row = (torch.nn.functional.pad(row_holding(v, dtype)[:, 1:], wider) for v in (0, value))
        for place, tokens in ((0, 6), (5, 5), (5, 6)):
            dense = torch.cat([row if i == place else plain for i in range(6)], dim=2)
            counts = kernels.compressed(dense, tokens, 8, 2, 6).counts
            assert counts.tolist() == counts_of(tokens, 2) + counts_of(tokens, 2, flag if place < tokens else 0)
        if dtype not in kernels.dtypes:
            return
        query = torch.cat([plain, plain], dim=1)
        for role in (0, 1):
            caches = [kernels.compressed(plain, 1, 8, 2, 9, by=portable) for _ in range(2)]
            new = [row if i == role else plain for i in range(2)]
            attention(query, *new, *caches, scale=0.1, decode=kernels.decode_attention)
            flags = [flag if i == role else 0 for i in range(2)]
            assert [c.counts.tolist() for c in caches] == [[[2, 0, 0], [2, 0, f]] for f in flags]
        attention(query, plain, plain, *caches, scale=0.1, decode=kernels.decode_attention)
        assert [c.counts.tolist() for c in caches] == [[[3, 0, 0], [3, 0, f]] for f in flags]

    @pytest.mark.parametrize("queries", [1, 3])
    def test_rows_rank_by_weights(self, kernels, queries):
        """Those of a prompt by some of each KV head, those that leave the window by some of each new token, too."""
        window, code = 3, kernels.codes.get("key_code", "none")
        case = kernels.case(tokens=33 + queries, queries=queries, dtype=kernels.dtypes[-1])
        heads, dim = case.keys.shape[1], case.keys.shape[3]
        prompt, weights = weights_of(2, heads, 1, dim, 1), weights_of(2, heads, queries, dim, 2)
        outs, caches = [], []
        for by in (kernels, portable):
            how = {"by": by, "code": code}
            x = [x[:, :, : case.written] for x in (case.keys, case.values)]
            past = [kernels.compressed(x[0], torch.tensor([33, 21]), dim // 2, window, 40, weights=prompt, **how)]
            past += [kernels.compressed(x[1], torch.tensor([33, 21]), case.values.shape[3] // 2, window, 40, **how)]
            new = [x[:, :, case.written :] for x in (case.keys, case.values)]
            given = {"key_weights": weights, "value_weights": weights if dim == new[1].shape[3] else None}
            outs.append(attention(case.query, *new, *past, scale=0.1, decode=by.decode_attention, **given))
            caches.append(past)
        for mine, other in zip(*caches, strict=True):
            assert_same_cache(mine, other)
        plain = kernels.compressed(x[0], torch.tensor([33, 21]), dim // 2, window, 40, by=portable, code=code)
        assert not torch.equal(plain.bitmap, caches[0][0].bitmap), "weights change what is kept"
        torch.testing.assert_close(*outs, rtol=1e-2, atol=1e-2)

    def test_what_may_attend_to_nothing_gives_zeros(self, kernels):
        case = kernels.case(tokens=40)
        case.mask = torch.ones(2, 4, 1, 40, dtype=torch.bool)
        case.mask[1, 2] = False
        case.mask[0, 1, :, :38] = False  # nothing but the window
        case.mask[0, 2, :, 3:] = False  # nothing but the compressed part
        out = kernels.stepped(case)
        assert out[1, 2].count_nonzero() == 0
        assert_close(out, case, rounds_weights=True)

    @pytest.mark.parametrize("sink", mostly_at_night([200.0, NAN, -INF, 0.0], 2))
    def test_a_sink_takes_weight_and_gives_nothing(self, kernels, sink):
        case = kernels.case(tokens=40, scale=0.01, softcap=0.5, sinks=torch.tensor([0.0, sink, -INF, 1.0]))
        case.mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
        case.mask[1] = False
        kernels.check_step(case)

    @pytest.mark.parametrize(("queries", "layouts"), mostly_at_night([(2, LAYOUTS[-4:-1]), (1, LAYOUTS[1:-1])], 1))
    def test_inputs_of_any_strides(self, kernels, queries, layouts):
        case = kernels.case(tokens=7, queries=queries)
        clean = kernels.stepped(case)
        for how in layouts:
            moved = {name: strided(getattr(case, name), how) for name in ("query", "keys", "values")}
            assert torch.equal(kernels.stepped(replace(case, **moved)), clean), how

    def test_caches_of_different_capacity(self, kernels):
        case = kernels.case(tokens=70, batch=2)
        larger = replace(case, spare=100)
        for caches in ((case.past("key"), larger.past("value")), (larger.past("key"), case.past("value"))):
            assert_close(case.step(*caches, decode=kernels.decode_attention), case, rounds_weights=True)

    @pytest.mark.parametrize(("position", "queries"), mostly_at_night(pairwise([*POSITIONS.values()], (1, 3)), 5))
    def test_rows_of_the_batch_in_step_stand_at_places_of_their_own(self, kernels, position, queries):
        check_ragged(kernels.decode_attention, position, queries, order=kernels.order)

    def test_rows_of_the_batch_hold_tokens_of_their_own(self, kernels):
        check_ragged_cache(kernels, order=kernels.order)

    @pytest.mark.parametrize(  # compressed, in the window
        ("value", "role", "token"), mostly_at_night(pairwise(SPOILT, ROLES, (2, 39)), 7)
    )
    def test_extreme_values_count_as_in_the_oracle(self, kernels, role, token, value):
        case = kernels.case(tokens=41, batch=1)
        case.query = case.query / 64  # no score overflows
        getattr(case, role)[0, 0, token, 5] = value
        kernels.check_step(case)

    def test_a_channel_of_huge_values(self, kernels):
        """Their sum is no float32, their average is one."""
        case = kernels.case(tokens=90, batch=1, window=40)
        case.values[..., 3] = 3e38
        kernels.check_step(case)

    def test_a_bad_key_that_is_masked_out_does_no_harm(self, kernels):
        case = kernels.case(mask=torch.ones(2, 1, 1, 11, dtype=torch.bool))
        case.mask[0, ..., [2, 9]] = False
        clean = kernels.stepped(case)
        case.keys[0, :, [2, 9]] = NAN
        assert torch.equal(kernels.stepped(case), clean)

    def test_a_mask_of_each_head_and_batch_entry(self, kernels):
        case = kernels.case(heads=3, tokens=50)
        case.mask = make_mask("bool", (2, 6, 1, 50), 3, density=0.2)
        kernels.check_step(case)
        case.mask = make_mask("bias", (6, 2, 1, 50), 4).transpose(0, 1)
        kernels.check_step(case)
        case = kernels.case(batch=1, tokens=50, queries=5)
        case.mask = make_mask("bool", (1, 4, 5, 50), 5, density=0.2)
        kernels.check_step(case)
