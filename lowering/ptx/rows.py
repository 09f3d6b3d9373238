"""Packed rows: from memory into registers, and there into two neighbouring channels to a register.

The vocabulary is that of ``decode_steps``, and two registers more:

==========  ==============================================================================================
c<e>        of coded rows: the largest magnitude of the rows that s<k> of this lane are for, in the cache's dtype
f           of int4: the floor of the lane's row
==========  ==============================================================================================

Coded rows come out as subnormal numbers of float16, whose bits count in units of 2^-24: the upper byte has the sign
alone, and the lower one a level and a bias, so that it is never negative. In these units an element is
``-(level + BIAS)``, a pruned one, of level 0, too. Of keys the bias is taken away from the scores, of values where they
are transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .block import Lines, names, vectors

LEVEL_TABLE_BYTES = 128 * 8
"""Of the levels of int4: eight bytes for each floor."""

UNITS = 2.0**24
"""What a sum of coded elements is multiplied with to count in levels."""

BIAS = 128
"""What is added to levels."""

TOP = 127
"""The level of the peak."""

_BITS = {"none": 16, "int8": 8, "int4": 4}  # of a kept element; also the bytes of eight of them
_ZEROS = "0x80808080"  # four bytes of pruned elements. Such a byte, digit 4 of a permute, is also the upper one, a sign


@dataclass(frozen=True)
class Rows:
    """Packed rows of K or V, of ``32 * words`` channels of which ``kept`` are stored in ``code``."""

    words: int
    kept: int
    code: str = "none"

    @property
    def coded(self) -> bool:
        """Whether elements are levels."""
        return self.code != "none"

    @property
    def has_bitmap(self) -> bool:
        """As of ``Format``."""
        return not self.coded or self.kept < 32 * self.words

    @property
    def gathered(self) -> bool:
        """Whether channels look up their elements by the bitmap. A row of all channels has them in order, and stays in
        registers if there are not too many."""
        return self.kept < 32 * self.words or self.packed > 64

    @property
    def buffers(self) -> list[str]:
        """The buffers that a row is stored in."""
        return ["values", *["bitmap"] * self.has_bitmap, *["peaks"] * self.coded, *["floors"] * (self.code == "int4")]

    @property
    def loaded(self) -> list[str]:
        """Those that a row is loaded from."""
        return [name for name in self.buffers if name != "bitmap" or self.gathered]

    @property
    def row_bytes(self) -> dict[str, int]:
        """From one row of a block to the next, in each buffer as it is loaded."""
        return {"values": _BITS[self.code], "bitmap": 4 * self.words, "peaks": 2, "floors": 1}

    @property
    def packed(self) -> int:
        """32-bit words of packed values."""
        return self.kept * _BITS[self.code] // 32

    @property
    def deciding(self) -> int:
        """Of its registers the first so many: a row in which they are zero counts as zero.

        Of coded rows the peaks. What else a row has may be anything, as levels are finite.
        """
        if self.coded:
            return 2
        return self.words if self.gathered else self.packed

    def registers(self, prefix: str = "") -> dict[str, str]:
        """The registers that hold a row."""
        bitmap = names(f"{prefix}b", self.words * self.gathered)
        peaks = names(f"{prefix}c", 2 * self.coded)
        floor = {f"{prefix}f": "r"} if self.code == "int4" else {}
        return peaks | bitmap | names(f"{prefix}v", self.packed) | floor

    def staged_bytes(self) -> int:
        """Shared memory of a warp's staged rows: a word for each value and one to read past the last."""
        return (self.kept + 1) * 128 * self.gathered

    @property
    def clamped(self) -> bool:
        """Whether addresses of values are kept near the row. That costs 2% of the kernel; where channels are few there
        is shared memory enough to read from instead."""
        return self.words > 4

    @property
    def stored_apart(self) -> int:
        """Bytes from one to the next of the four words that ``stage`` stores at once."""
        return 128 if self.coded else 256

    def overread_bytes(self) -> int:
        """Shared memory behind the staged rows that may be read because of a bitmap with more bits than values."""
        return 128 * (32 if self.clamped else 32 * self.words - self.kept) * self.gathered


def prefetch(rows: Rows) -> Lines:
    """Lane: its row of block ``next`` of the buffers, given that of block 0 -> nb<w>, nv<j>, nf. Peaks of the rows of
    s<k> -> nc<e>.

    The warp barriers keep ptxas from sinking the loads to their first use, an iteration later.
    """
    bits, load = _BITS[rows.code], "ld.global.L1::no_allocate"
    yield f".reg .b64 {', '.join(f'{name}_row' for name in rows.loaded)};"
    for name in rows.loaded:
        block = 4 * rows.kept * bits if name == "values" else 32 * rows.row_bytes[name]
        yield f"mad.wide.u32 {name}_row, next, {block}, {name};"
    yield "bar.warp.sync -1;"
    for w, kind, target in vectors("nb", rows.words * rows.gathered):
        yield f"{load}.{kind} {target}, [bitmap_row+{4 * w}];"
    if rows.coded:
        yield f"{load}.u16 nc0, [peaks_row]; {load}.u16 nc1, [peaks_row+8];"
    if rows.code == "int4":
        yield f"{load}.u8 nf, [floors_row];"
    for chunk in range(rows.kept // 8):
        for j, kind, target in vectors("nv", bits // 4, bits // 4 * chunk):
            yield f"{load}.{kind} {target}, [values_row+{32 * bits * chunk + 4 * (j - bits // 4 * chunk)}];"
    yield "bar.warp.sync -1;"


def level_setup(rows: Rows) -> Lines:
    """Lane: what ``levels`` and ``_four_levels`` need. Of int4 the eight levels of the lane's row."""
    yield f".reg .b32 u<{rows.kept // 4}>, unit, naught;"
    yield "mov.b32 unit, 0x3C003C00; mov.b32 naught, 0x80008000;"  # 1 and -0, as float16
    if rows.code == "int4":
        yield ".reg .b32 small, large, codes, turned, minus; and.b32 f, f, 127; mad.lo.u32 f, f, 8, table;"
        yield "ld.shared.v2.b32 {small,large}, [f];"


def levels(rows: Rows, j: int) -> Lines:
    """Lane: packed levels -> u<j>: those of kept elements 4 j ... 4 j + 3, with their bias.

    Of int4, four codes in 16 bits are the selector of a byte permute. Its fourth bit, the sign, asks for the sign bits
    of the byte, which are none: so one permute has the levels of the positive elements, with zeros between, and one
    with all signs turned those of the negative ones.
    """
    if rows.code == "int8":
        yield f"xor.b32 u{j}, v{j}, {_ZEROS};"
        return
    yield f"mov.b32 codes, v{j // 2};" if j % 2 == 0 else f"shr.u32 codes, v{j // 2}, 16;"
    yield f"xor.b32 turned, codes, 0x8888; prmt.b32 u{j}, small, large, codes; prmt.b32 minus, small, large, turned;"
    yield f"sub.u32 minus, {_ZEROS}, minus; add.u32 u{j}, u{j}, minus;"


def stage(rows: Rows, by_matrices: bool) -> Lines:
    """Warp: its packed rows -> shared memory, as overlapping words that begin with value s, at 128 s + 4 lane.

    A word has two values, or four levels. One 32-bit load then fetches the next of them wherever the lane stands in its
    row, without bank conflicts.

    A store takes four words of each lane, those of four levels, or every other one of values, which stand in registers
    side by side as they were loaded. By matrices, it is one instruction, to which they are four 8 x 8 matrices of
    16 bits, and the words of four lanes are a row. Where rows go, all lanes say: ``spread`` of lane l is for row l % 8
    of matrix l // 8. So a lane's words are written by others, between barriers.
    """
    if rows.coded:
        yield from level_setup(rows)
    if not rows.gathered:
        return
    yield ".reg .b32 overlap<4>; bar.warp.sync -1;"
    if rows.coded:
        last = rows.kept // 4 - 1
        for j in range(last + 1):
            yield from levels(rows, j)
        for j in range(last + 1):
            for i in range(1, 4):
                yield f"prmt.b32 overlap{i}, u{j}, u{min(j + 1, last)}, 0x{i + 3}{i + 2}{i + 1}{i};"
            yield _store(rows, 512 * j, [f"u{j}", "overlap1", "overlap2", "overlap3"], by_matrices)
    else:
        for j in range(0, rows.packed, 4):
            yield _store(rows, 256 * j, [f"v{j + i}" for i in range(4)], by_matrices)
            for i in range(4):
                yield f"prmt.b32 overlap{i}, v{j + i}, v{min(j + i + 1, rows.packed - 1)}, 0x5432;"
            yield _store(rows, 256 * j + 128, [f"overlap{i}" for i in range(4)], by_matrices)
    yield "bar.warp.sync -1;"


def _store(rows: Rows, at: int, words: list[str], by_matrices: bool) -> str:
    if by_matrices:
        return f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [spread+{at}], {{{','.join(words)}}};"
    return " ".join(f"st.shared.b32 [stage+{at + rows.stored_apart * i}], {word};" for i, word in enumerate(words))


def expand_setup(rows: Rows) -> Lines:
    """Lane: ``at``, the staged address of the row's first value; dp2a weights that turn bitmap bytes into selectors.

    Of two values: selector = 0x4444 + 8652 p - 13312 q for bits p, q: 0x3210 (both values), 0x6610 (the value, zero),
    0x1044 (zero, the value), 0x4444 (zeros); bytes 4 to 7 of the permuted pair are zero. The bits arrive as 0 or 2^k,
    so the weights are scaled by 2^-k.
    """
    if not rows.gathered:
        return
    yield ".reg .b32 at, bytes, second, selector, pair; mov.b32 at, stage;"
    if rows.clamped:
        yield f".reg .b32 behind; add.u32 behind, stage, {128 * rows.kept};"
    if not rows.coded:
        yield ".reg .b32 " + ", ".join(f"weights{k}" for k in range(3)) + ";"
        for k in range(3):
            yield f"mov.b32 weights{k}, {((-13312 >> k) & 0xFFFF) << 16 | (8652 >> k)};"


def expand_word(rows: Rows, w: int, first: int) -> Lines:
    """Lane: the 32 channels of bitmap word w -> x<first> ... x<first + 15>, two channels to a register.

    Four channels at a time: their bits are one byte each of ``word & 0x01010101 << k``. The staged address moves on
    by 128 for each kept value, added up by dp4a. No branch, no predicate. If clamped, a word begins at most behind the
    last value: a bitmap with more bits than the row has values thus reads at most ``overread_bytes`` past the row.
    """
    if not rows.gathered:
        for i in range(8):
            if rows.coded:
                yield from levels(rows, 8 * w + i)
                yield from _widen(f"u{8 * w + i}", first + 2 * i)
            else:
                yield " ".join(f"mov.b32 x{first + k}, v{16 * w + k};" for k in (2 * i, 2 * i + 1))
        return
    if rows.clamped and w:
        yield "min.u32 at, at, behind;"
    yield f"{{ .reg .b32 shifted; mov.b32 shifted, b{w};"
    for i in range(8):
        k = i % 3
        if i and k == 0:
            yield f"shr.u32 shifted, b{w}, {i};"
        step = 128 >> k
        yield f"and.b32 bytes, shifted, {0x01010101 << k}; ld.shared.b32 pair, [at];"
        yield from (_four_levels if rows.coded else _two_pairs)(k, first + 2 * i, step)
        if i < 7 or w + 1 < rows.words:
            yield f"dp4a.u32.u32 at, bytes, {_signed(step * 0x01010101)}, at;"
    yield "}"


def _two_pairs(k: int, x: int, step: int) -> Iterator[str]:
    yield f"dp2a.lo.s32.u32 selector, weights{k}, bytes, 0x4444; prmt.b32 x{x}, pair, 0, selector;"
    yield f"dp4a.u32.u32 second, bytes, {step | step << 8}, at; ld.shared.b32 pair, [second];"
    yield f"dp2a.hi.s32.u32 selector, weights{k}, bytes, 0x4444; prmt.b32 x{x + 1}, pair, 0, selector;"


def _four_levels(k: int, x: int, step: int) -> Iterator[str]:
    """The two selectors by one product, as each byte of it sums up the bits of bytes before: the lower digit of byte c
    is the number of kept channels before c, and 4 more, a zero, where c is not kept itself."""
    yield f"mad.lo.u32 selector, bytes, {(0x01010100 - 4) >> k}, 0x44444444; prmt.b32 x{x}, pair, {_ZEROS}, selector;"
    # The upper half comes down as a product of float16 with 1, since shifts and permutes share a pipe that is full. Its
    # upper digits are 4, so it is a normal number and stays what it is.
    yield "{ .reg .b16 lower, upper; mov.b32 {lower,upper}, selector; mov.b32 selector, {upper,upper};"
    yield "fma.rn.f16x2 selector, selector, unit, naught; }"
    yield f"prmt.b32 x{x + 1}, pair, {_ZEROS}, selector;"


def _widen(four: str, x: int) -> Iterator[str]:
    """Four levels with their bias -> x<x> and x<x + 1>."""
    yield f"prmt.b32 x{x}, {four}, {_ZEROS}, 0x4140; prmt.b32 x{x + 1}, {four}, {_ZEROS}, 0x4342;"


def peaks(dtype: str) -> Lines:
    """Lane: c<e> -> peak<e>, in float32, of the two tokens that s<k> are for.

    dtype: of the cache, "bf16" or "f16".
    """
    yield ".reg .f32 peak<2>; .reg .b16 half;"
    for e in range(2):
        if dtype == "bf16":
            yield f"shl.b32 c{e}, c{e}, 16; mov.b32 peak{e}, c{e};"
        else:
            yield f"cvt.u16.u32 half, c{e}; cvt.f32.f16 peak{e}, half;"


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
