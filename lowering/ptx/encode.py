"""Kept elements into levels (``lowering/codes.py``): a lane owns a row, which it holds two elements to a register.

==========  ==============================================================================================
v<j>        kept elements 2 j and 2 j + 1 of the lane's row
peak        the bits of the row's largest magnitude, in the cache's dtype; ``least`` those of the smallest kept one
inverse     127 over the peak, 0 where everything counts as zero
==========  ==============================================================================================
"""

from __future__ import annotations

from .block import Lines, listed

_INFINITE = {"bf16": "0x7F80", "fp16": "0x7C00"}
_EXTREME = {"bf16": "0x7000", "fp16": "0x7C00"}  # format.EXTREME
_ROUND = "0f4B400000"  # 1.5 * 2^23: added to a number, its low bits are the nearest integer
_TINY = "0f04000000"  # codes.TINY, 2^-119
_TOP = "0f42FE0000"  # codes.TOP


def find_peak(count: int, code: str, dtype: str, note: bool) -> Lines:
    """Lane: v -> peak, inverse; of int4 also least, and no v is -0. A row that is not finite becomes zeros, of which
    int4 keeps the signs, and a NaN.

    note: tell ``flags`` of a ``valid`` row that it is extreme.
    """
    yield ".reg .b32 peak, least, mine, other; .reg .f32 inverse, size; .reg .pred finite, stays;"
    yield "mov.b32 peak, 0; mov.b32 least, -1;"
    one, zero = ("0x3F803F80", "fma.rn.bf16x2") if dtype == "bf16" else ("0x3C003C00", "fma.rn.f16x2")
    if code == "int4":
        yield f".reg .b32 one, none; mov.b32 one, {one}; mov.b32 none, 0;"
    for j in range(count):
        if code == "int4":
            yield f"{zero} v{j}, v{j}, one, none;"
        # The upper of two elements decides, so each has its turn there.
        yield f"and.b32 mine, v{j}, 0x7FFF7FFF; shl.b32 other, mine, 16;"
        yield "max.u32 peak, peak, mine; max.u32 peak, peak, other;"
        if code == "int4":
            yield "min.u32 least, least, mine; min.u32 least, least, other;"
    yield "shr.u32 peak, peak, 16; shr.u32 least, least, 16;"
    if note:
        yield f".reg .pred report; setp.ge.and.u32 report, peak, {_EXTREME[dtype]}, valid;"
        yield "@report red.global.or.b64 [flags], 1;"
    yield f"setp.lt.u32 finite, peak, {_INFINITE[dtype]}; @finite bra FINITE;"
    for j in range(count):
        yield f"and.b32 v{j}, v{j}, 0x80008000;"
    yield "mov.b32 peak, 0x7FFF; mov.b32 least, 0;"
    yield "FINITE:"
    yield from _as_float("size", "peak", dtype)
    yield f"setp.ge.and.f32 stays, size, {_TINY}, finite; div.rn.f32 inverse, {_TOP}, size;"
    yield "selp.f32 inverse, inverse, 0f00000000, stays;"


def _as_float(to: str, bits: str, dtype: str) -> Lines:
    """The element in the low half of a register as float32."""
    if dtype == "bf16":
        yield f"shl.b32 other, {bits}, 16; mov.b32 {to}, other;"
    else:
        yield f"{{ .reg .b16 half; cvt.u16.u32 half, {bits}; cvt.f32.f16 {to}, half; }}"


def _nearest(x: str) -> str:
    """A number -> its level, in the low bits. Rounded twice on purpose, as the contract has it: never one fma."""
    return f"mul.rn.f32 {x}, {x}, inverse; add.rn.f32 {x}, {x}, {_ROUND};"


def _levels(to: str, j: int, dtype: str, mask: str) -> Lines:
    """Two elements of v<j> -> the levels in the low bytes of <to>0 and <to>1. mask: which of their bits count."""
    yield f"and.b32 mine, v{j}, {mask};"
    if dtype == "bf16":
        yield f"shl.b32 other, mine, 16; mov.b32 {to}0, other; and.b32 other, mine, 0xFFFF0000; mov.b32 {to}1, other;"
    else:
        yield "{ .reg .b16 front, back; mov.b32 {front,back}, mine;"
        yield f"cvt.f32.f16 {to}0, front; cvt.f32.f16 {to}1, back; }}"
    for half in range(2):
        yield _nearest(f"{to}{half}")


def _four_levels(to: str, j: int, dtype: str, mask: str) -> Lines:
    """Elements of v<j> and v<j + 1> -> their levels, a byte each."""
    yield from _levels("near", j, dtype, mask)
    yield from _levels("far", j + 1, dtype, mask)
    yield "mov.b32 mine, near0; mov.b32 other, near1; prmt.b32 first, mine, other, 0x0040;"
    yield "mov.b32 mine, far0; mov.b32 other, far1; prmt.b32 second, mine, other, 0x0040;"
    yield f"prmt.b32 {to}, first, second, 0x5410;"


def store_levels(count: int, code: str, dtype: str) -> Lines:
    """Lane: v, peak, inverse -> ``values``, ``peaks`` and ``floors``, where the token is ``stored``."""
    yield ".reg .f32 near<2>, far<2>; .reg .b32 first, second, level<2>; .reg .b16 narrow;"
    yield "cvt.u16.u32 narrow, peak; @stored st.global.b16 [peaks], narrow;"
    if code == "int4":
        yield from _find_bounds(dtype)
    for chunk in range(count // 4):
        for half in range(2):
            j = 4 * chunk + 2 * half
            if code == "int8":
                yield from _four_levels(f"level{half}", j, dtype, "0xFFFFFFFF")
            else:
                yield from _four_levels(f"level{half}", j, dtype, "0x7FFF7FFF")
                yield from _four_codes(f"level{half}", j)
        if code == "int8":
            yield f"@stored st.global.v2.b32 [values+{256 * chunk}], {listed('level', 0, 1)};"
        else:
            yield "prmt.b32 level0, level0, level1, 0x6420;"
            yield f"@stored st.global.b32 [values+{128 * chunk}], level0;"


def _find_bounds(dtype: str) -> Lines:
    """Lane: least -> ``floors``; bound<i>, from which on level i + 1 of the row is nearer than i, in all bytes."""
    yield ".reg .b32 small, large, bound<7>, wide; .reg .b64 from;"
    yield from _as_float("size", "least", dtype)
    yield f"{_nearest('size')} mov.b32 least, size;"
    yield "and.b32 least, least, 127;"
    yield "cvt.u16.u32 narrow, least; @stored st.global.b8 [floors], narrow;"
    yield "mad.wide.u32 from, least, 8, levels; ld.global.v2.b32 {small,large}, [from];"
    # The averages of neighbouring levels, rounded down, and 1 more
    yield "prmt.b32 first, small, large, 0x4321; shr.u32 second, large, 8;"
    for level, after in (("small", "first"), ("large", "second")):
        yield f"xor.b32 mine, {level}, {after}; and.b32 mine, mine, 0xFEFEFEFE; shr.u32 mine, mine, 1;"
        yield f"and.b32 {after}, {level}, {after}; add.u32 {after}, {after}, mine;"
        yield f"add.u32 {after}, {after}, 0x01010101;"
    for i in range(7):
        yield f"prmt.b32 bound{i}, {'first' if i < 4 else 'second'}, 0, 0x{i % 4}{i % 4}{i % 4}{i % 4};"


def _four_codes(at: str, j: int) -> Lines:
    """Four levels -> their codes, two to each of bytes 0 and 2: which of the row's levels, and the sign in v<j>, ..."""
    yield f"or.b32 wide, {at}, 0x80808080; prmt.b32 {at}, v{j}, v{j + 1}, 0x7531;"
    yield f"and.b32 {at}, {at}, 0x80808080; shr.u32 {at}, {at}, 4;"
    for i in range(7):  # the top bit of a byte stays where the bound is reached
        yield f"sub.u32 mine, wide, bound{i}; and.b32 mine, mine, 0x80808080;"
        yield f"shr.u32 mine, mine, 7; add.u32 {at}, {at}, mine;"
    yield f"shr.u32 mine, {at}, 4; or.b32 {at}, {at}, mine;"
