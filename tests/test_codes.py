"""Codes of kept elements: what a level stands for, and that nothing is lost that the contract keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import NAN, assert_same_bits, compressed, decompressed, randn, rows
from mustafar_compile.lowering import codes, portable
from mustafar_compile.lowering import rows as packing
from mustafar_compile.lowering.format import CODES, ORDERS, Format
from reference import quantized

CODED = [code for code in CODES if code != "none"]
ROUNDING = {"int8": 0.5 / 127, "int4": 0.14}  # of the row's peak: half a level; half the widest step of int4


def expanded(x, kept, code, order="blocks"):
    format = Format.interned(x.shape[-1], kept, 1, code, order)
    return packing.expand(packing.pack(x, format), format)


codes_of_rows = st.sampled_from(CODED)


@given(code=codes_of_rows, order=st.sampled_from(ORDERS), x=rows(), share=st.sampled_from([0.25, 0.5, 1.0]))
def test_rows_are_what_the_reference_makes_of_them(code, order, x, share):
    kept = max(8, int(x.shape[-1] * share) // 8 * 8)
    expected = quantized(x, kept, code)
    assert_same_bits(expanded(x, kept, code, order) + 0.0, expected + 0.0)  # a zero may have lost its sign


@given(code=codes_of_rows, x=rows(), share=st.sampled_from([0.5, 1.0]))
def test_a_code_keeps_signs_order_zeros_and_the_largest(code, x, share):
    x = x.nan_to_num(1.0, 2.0, -2.0)
    kept = max(8, int(x.shape[-1] * share) // 8 * 8)
    row = expanded(x, kept, code)
    peak = x.float().abs().amax(-1, keepdim=True)
    stored = peak >= codes.TINY
    mask = packing.keep_mask(x, kept)
    assert (row[~mask] == 0).all()
    assert (row * x.float() >= 0).all()
    assert (row[mask & (x == 0)] == 0).all()
    largest = row.abs().amax(-1, keepdim=True)[stored]
    if x.dtype == torch.float32:  # a unit in the last place is what level * peak / 127 may be off by
        torch.testing.assert_close(largest, peak[stored], rtol=2.0**-22, atol=0)
    else:
        assert_same_bits(largest.to(x.dtype), peak.to(x.dtype)[stored])
    by_size = x.float().abs().masked_fill(~mask, -1).argsort(-1)
    sizes = row.abs().masked_fill(~mask, -1).gather(-1, by_size)
    assert (sizes.diff() >= 0).all()
    error = (row - x.float()).masked_fill(~mask, 0).abs()
    assert (error <= 1.001 * ROUNDING[code] * peak.double() + codes.TINY).all()


def test_rows_that_are_not_finite_are_nan_as_a_whole():
    for code in CODED:
        for bad in (NAN, float("inf"), -float("inf")):
            x = torch.tensor([[1.0, -2.0, bad, 0.5, 4.0, 0.1, 3.0, 0.2], [1.0] * 8])
            row = expanded(x, 8, code)
            assert row[0].isnan().all()
            assert (row[1] == 1).all()


def test_levels_of_int4_rise_from_the_floor_to_the_top():
    for floor, levels in enumerate(codes.level_table()):
        assert levels[0] == floor
        assert levels[-1] == codes.TOP
        assert levels == sorted(levels)


def test_a_bitmap_is_stored_only_where_something_is_pruned():
    names = {
        (code, kept): [buffer.name for buffer in Format.interned(64, kept, 4, code).buffers]
        for code in CODES
        for kept in (32, 64)
    }
    assert names["none", 64] == names["none", 32] == ["values", "bitmap", "window", "counts"]
    assert names["int8", 32] == ["values", "bitmap", "peaks", "window", "counts"]
    assert names["int8", 64] == ["values", "peaks", "window", "counts"]
    assert names["int4", 64] == ["values", "peaks", "floors", "window", "counts"]


@pytest.mark.parametrize(
    ("code", "kept", "share"),
    [("int8", 128, 0.508), ("int8", 64, 0.321), ("int8", 40, 0.227), ("int4", 64, 0.205), ("int4", 40, 0.158)],
)
def test_bytes_of_a_token(code, kept, share):
    assert Format.interned(128, kept, 32, code).token_bytes(2) <= share * 256


@pytest.mark.parametrize("code", CODED)
@pytest.mark.parametrize(("kept", "dtype"), [(16, torch.float32), (40, torch.float16), (16, torch.bfloat16)])
def test_a_cache_holds_coded_rows_before_the_window(code, kept, dtype):
    dense = randn(2, 3, 70, 40, seed=1, dtype=dtype)
    caches = [compressed(dense, 70, kept, 8, 70, portable, order, code) for order in ORDERS]
    results = [decompressed(cache, 70, portable) for cache in caches]
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0][:, :, 62:], dense[:, :, 62:])
    assert_same_bits(results[0][:, :, :62] + 0.0, quantized(dense[:, :, :62], kept, code).to(dtype) + 0.0)
    again = portable.reordered(caches[0], caches[0].format, "rows")
    assert all(torch.equal(a, b) for a, b in zip(again, caches[1], strict=True))
