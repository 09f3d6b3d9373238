"""Weighted sums of values, step by step. The vocabulary is that of ``decode_steps``.

An mma takes 16 channels in its rows and up to eight heads in its columns. With up to four heads every other column is
free, and sums are **halved**: an mma takes 8 channels, whose tokens 0 and 1 of four are in rows r and 2 and 3 in rows
r + 8, and its columns h and h + 4 have the weights of head h for the one or the other. Half of its sums mean nothing.
But what ``transpose`` gives is an A operand then as it stands: no register has to be moved. There are twice as many
registers o: what is o<2 i>, o<2 i + 1> in the end are two sums, one over tokens 0 and 1, which are o<4 i>, o<4 i + 1>
of lanes with t < 2, and one over tokens 2 and 3, which are o<4 i + 2>, o<4 i + 3> of lanes with t >= 2.
"""

from __future__ import annotations

from .block import Lines, float32, listed
from .decode_steps import FIRST_TOKEN, SECOND_TOKEN, mma, sparse_mma
from .rows import BIAS, TOP, UNITS


def transposer() -> Lines:
    """Lane: its part of the 0/1 matrix of ``transpose`` -> t0 ... t3.

    Packed, columns 2 t and 2 t + 1 are for tokens 0 and 1 (t even) or 2 and 3 (t odd) of the four of a column, at the
    two channels of x register t // 2; those + 8 at the channels of the register after the next. Row r takes channel r
    of tokens 0 and 1 (t0, t2), row r + 8 of tokens 2 and 3 (t1, t3).
    """
    yield ".reg .b32 one, odd, pair, own; .reg .pred chosen, here;"
    yield "and.b32 odd, lane, 4; setp.eq.u32 here, odd, 0; selp.b32 one, 0x3C00, 0x3C000000, here;"  # 1.0 for channel r
    yield "and.b32 odd, lane, 1; shr.u32 own, lane, 3; shr.u32 pair, lane, 1; and.b32 pair, pair, 1;"
    for k in range(2):
        for i in range(2):
            yield f"setp.eq.u32 chosen, odd, {i}; setp.eq.and.u32 here, own, pair, chosen;"
            yield f"selp.b32 t{2 * k + i}, one, 0, here;"
        yield "add.u32 pair, pair, 2;"


def transpose(first: int, half: int) -> Lines:
    """Warp: 8 channels of 32 tokens, x<first> ... x<first + 3> -> y<4 half> ... y<4 half + 3>.

    An mma with a 0/1 matrix on the raw 16-bit patterns, taken for float16: each sum has one term, so it is exact
    unless a pattern is infinite or NaN as a float16 (``format.EXTREME``). The matrix is structured sparse: one packed
    matrix serves tokens 0 and 2 of the four of a column, and tokens 1 and 3. Of levels (``rows``) it takes away the
    bias: ``bias`` is added to each sum, which is exact, too.
    """
    x = listed("x", *range(first, first + 4))
    for u, tokens in enumerate((FIRST_TOKEN, SECOND_TOKEN)):
        y = listed("y", 4 * half + u, 4 * half + u + 2)
        yield f"mov.b32 tokens, {tokens};"
        yield f"{sparse_mma('f16', 'f16')} {y}, {{t0,t1,t2,t3}}, {x}, {{bias,bias}}, tokens, 0;"


def accumulate(tile: int, dtype: str) -> Lines:
    """Warp: 16 transposed channels (A operand) x the weights of 32 tokens -> added to o<4 tile> ... o<4 tile + 3>."""
    o = listed("o", *range(4 * tile, 4 * tile + 4))
    yield f"{mma(dtype)} {o}, {listed('y', 0, 4, 2, 6)}, {listed('p', 0, 2)}, {o};"
    yield f"{mma(dtype)} {o}, {listed('y', 1, 5, 3, 7)}, {listed('p', 1, 3)}, {o};"


def accumulate_halves(tile: int, dtype: str) -> Lines:
    """The same, halved -> added to o<8 tile> ... o<8 tile + 7>."""
    for half in range(2):
        o = listed("o", *range(8 * tile + 4 * half, 8 * tile + 4 * half + 4))
        y = listed("y", *(4 * half + k for k in (0, 2, 1, 3)))
        yield f"{mma(dtype)} {o}, {y}, {listed('p', 0, 1)}, {o};"


def bias_of_levels(coded: bool) -> Lines:
    """What ``transpose`` adds: of coded elements the bias of levels, as two subnormal numbers of float16."""
    yield f".reg .b32 bias; mov.b32 bias, {0x10001 * BIAS if coded else 0};"


def scale_sums(sums: int) -> Lines:
    """Lane: z, sums of coded elements times weights times peaks -> what they stand for."""
    for k in range(sums):
        yield f"mul.f32 z{k}, z{k}, {float32(-UNITS / TOP)};"


def join_halves(accumulators: int) -> Lines:
    """Warp: o, halved -> o as ``decode_steps`` has it."""
    yield ".reg .f32 far;"
    for i in range(accumulators // 2):
        for k in range(2):
            yield f"shfl.sync.bfly.b32 far, o{4 * i + 2 + k}, 2, 31, -1; add.f32 o{2 * i + k}, o{4 * i + k}, far;"
