"""Pruning and packing 32 token rows: a lane owns a row, and nothing crosses lanes.

The kept-th largest magnitude of a row is never looked for. Turned into bit planes, one bit of every magnitude in a
word, a row is selected from by masks: from the top plane down, the candidates with a one are either all kept or all
that remain. Planes of the channel's own index break ties, so that exactly ``kept`` remain.

==========  ==============================================================================================
x<k>        channels 2k and 2k + 1 of the lane's row
y<k>        the 32 of a word of the bitmap times their weights, in the dtype of the cache, of rows that rank by them
plane<p>_<w>  bit p of the magnitudes of bitmap word w's 32 channels, in the bitmap's order of bits
mine<w>     candidates: channels that tie in all planes seen so far
b<w>        bitmap word w: channels that are kept for certain
==========  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .block import Block, Lines, listed, locate_thread, vectors
from .encode import find_peak, store_levels
from .rows import Rows

_SELECT = 0xE4  # lop3: bits of the first operand where the third has ones, of the second elsewhere
_INDEX_PLANES = (0x0F0F0F0F, 0x33333333, 0x55555555, 0x0000FFFF, 0x00FF00FF)  # bit 4 ... 0 of a channel is zero
_EXPONENT_BITS = {"bf16": 8, "fp16": 5}
_PAIRS = {"bf16": "bf16x2", "fp16": "f16x2"}
_EXTREME = "0f70000000"  # format.EXTREME
_EXTREME_BITS = {"bf16": 3, "fp16": 5}  # leading exponent bits that are all ones from format.EXTREME on


def load_row(words: int) -> Lines:
    """Lane: the dense row at ``row`` -> x, zeros where it is not ``valid``."""
    for k in range(16 * words):
        yield f"mov.b32 x{k}, 0;"
    for unit in range(4 * words):
        yield f"@valid ld.global.v4.b32 {listed('x', *range(4 * unit, 4 * unit + 4))}, [row+{16 * unit}];"


def keep_window(words: int) -> Lines:
    """Lane: x -> the row at ``ring``, where the token is ``recent``."""
    for unit in range(4 * words):
        yield f"@recent st.global.v4.b32 [ring+{16 * unit}], {listed('x', *range(4 * unit, 4 * unit + 4))};"


def weigh(w: int, dtype: str) -> Lines:
    """Lane: 32 channels of x, and their weights at ``weights`` -> y; what is largest of x so far, or NaN -> ``top``.

    Rounding makes one NaN of all, and that ranks on top. All lanes read the same weights.
    """
    for k in range(16):
        if k % 2 == 0:
            yield f"ld.global.nc.v4.f32 {{w0,w1,w2,w3}}, [weights+{128 * w + 8 * k}];"
        if dtype == "bf16":
            yield f"shl.b32 up, x{16 * w + k}, 16; and.b32 down, x{16 * w + k}, 0xFFFF0000;"
            yield "mov.b32 even, up; mov.b32 odd, down;"
        else:
            yield f"mov.b32 {{half0,half1}}, x{16 * w + k}; cvt.f32.f16 even, half0; cvt.f32.f16 odd, half1;"
        yield "abs.f32 even, even; abs.f32 odd, odd; max.NaN.f32 top, top, even; max.NaN.f32 top, top, odd;"
        yield f"mul.rn.f32 even, even, w{k % 2 * 2}; mul.rn.f32 odd, odd, w{k % 2 * 2 + 1};"
        yield f"cvt.rn.{_PAIRS[dtype]}.f32 y{k}, odd, even;"


def bit_planes(w: int, pairs: Sequence[str]) -> Lines:
    """Lane: 32 channels, in 16 registers -> plane<p>_<w>, p < 15.

    Low and high bytes of four channels to a register, then 8 x 8 bits are transposed in each byte of eight registers.
    """
    for half, selector in enumerate((0x6420, 0x7531)):
        planes = [f"plane{8 * half + i}_{w}" for i in range(8)]
        for i in range(8):
            yield f"prmt.b32 {planes[i]}, {pairs[2 * i]}, {pairs[2 * i + 1]}, {selector};"
        for distance, mask in ((4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
            for i in (i for i in range(8) if not i & distance):
                a, b = planes[i], planes[i + distance]
                yield f"shl.b32 up, {b}, {distance}; shr.u32 down, {a}, {distance};"
                yield f"lop3.b32 {a}, {a}, up, {mask}, {_SELECT}; lop3.b32 {b}, down, {b}, {mask}, {_SELECT};"


def note_extremes(words: int, dtype: str) -> Lines:
    """Lane: whether its row holds a value from ``format.EXTREME`` on -> ``flags``; any NaN then ranks on top."""
    exponent = _EXPONENT_BITS[dtype]
    yield ".reg .b32 high, fraction, seen; .reg .pred odd, report; mov.b32 seen, 0;"
    for w in range(words):
        yield f"mov.b32 high, plane14_{w};"
        for p in range(13, 14 - _EXTREME_BITS[dtype], -1):
            yield f"and.b32 high, high, plane{p}_{w};"
        yield "or.b32 seen, seen, high;"
    yield "setp.ne.u32 odd, seen, 0; @!odd bra TAME;"
    yield "setp.ne.and.u32 report, seen, 0, valid; @report red.global.or.b64 [flags], 1;"
    for w in range(words):
        yield f"mov.b32 high, plane14_{w}; mov.b32 fraction, 0;"
        for p in range(13, 14 - exponent, -1):
            yield f"and.b32 high, high, plane{p}_{w};"
        for p in range(15 - exponent):
            yield f"or.b32 fraction, fraction, plane{p}_{w};"
        yield "and.b32 high, high, fraction;"
        for p in range(15):
            yield f"or.b32 plane{p}_{w}, plane{p}_{w}, high;"
    yield "TAME:"


def select(words: int, kept: int) -> Lines:
    """Lane: planes -> b<w>, with exactly ``kept`` bits set in all."""
    yield f".reg .b32 room, ones, count, {', '.join(f'mine{w}, with{w}' for w in range(words))}; .reg .pred more;"
    yield f"mov.b32 room, {kept};"
    for w in range(words):
        yield f"mov.b32 mine{w}, -1; mov.b32 b{w}, 0;"
    for p in range(14, -1, -1):
        yield from _narrow([f"plane{p}_{w}" for w in range(words)])
    for bit in (4, 2, 1):  # lower channels first: by the index of their word, then within it
        if bit < words:
            yield from _narrow(["0" if w & bit else "-1" for w in range(words)])
    for mask in _INDEX_PLANES:
        yield from _narrow([str(mask)] * words)
    for w in range(words):
        yield f"or.b32 b{w}, b{w}, mine{w};"


def _narrow(plane: list[str]) -> Lines:
    """Lane: one more plane. Candidates with a one remain if they fill the room; else they are kept, the rest remain."""
    for w, ones in enumerate(plane):
        yield f"and.b32 with{w}, mine{w}, {ones}; popc.b32 {'ones' if w else 'count'}, with{w};"
        if w:
            yield "add.u32 count, count, ones;"
    yield "setp.ge.u32 more, count, room;"
    for w in range(len(plane)):
        yield f"@!more or.b32 b{w}, b{w}, with{w}; @!more xor.b32 with{w}, with{w}, mine{w}; mov.b32 mine{w}, with{w};"
    yield "@!more sub.u32 room, room, count;"


def pack(words: int) -> Lines:
    """Lane: the kept values of x, in channel order -> shared memory, slot s at 128 s + 4 lane from ``stage``.

    Every value is stored and only a kept one moves the address on, so the next store overwrites what was not kept.
    """
    yield ".reg .b32 bits, value, at, a1, a2, a3; mov.b32 at, stage;"
    for w in range(words):
        for i in range(8):
            low, high = f"x{16 * w + 2 * i}", f"x{16 * w + 2 * i + 1}"
            yield f"shr.u32 bits, b{w}, {i}; and.b32 bits, bits, 0x01010101;"
            for address, weights in (("a1", 0x80), ("a2", 0x8080), ("a3", 0x808080)):
                yield f"dp4a.u32.u32 {address}, bits, {weights}, at;"
            yield f"st.shared.b32 [at], {low}; shr.u32 value, {low}, 16; st.shared.b32 [a1], value;"
            yield f"st.shared.b32 [a2], {high}; shr.u32 value, {high}, 16; st.shared.b32 [a3], value;"
            yield "dp4a.u32.u32 at, bits, 0x80808080, at;"


def store_bitmap(words: int) -> Lines:
    """Lane: b -> ``bitmap``, where the token is ``stored``."""
    for w, kind, source in vectors("b", words):
        yield f"@stored st.global.{kind} [bitmap+{4 * w}], {source};"


def fetch(first: int, count: int) -> Lines:
    """Lane: packed values in shared memory -> v<first> ... v<first + count - 1>, two to a register."""
    for j in range(first, first + count):
        yield f"ld.shared.b32 lower, [stage+{256 * j}]; ld.shared.b32 upper, [stage+{256 * j + 128}];"
        yield f"prmt.b32 v{j}, lower, upper, 0x5410;"


def store_values(kept: int) -> Lines:
    """Lane: packed values -> ``values``, where the token is ``stored``."""
    for unit in range(kept // 8):
        yield from fetch(4 * unit, 4)
        yield f"@stored st.global.v4.b32 [values+{512 * unit}], {listed('v', *range(4 * unit, 4 * unit + 4))};"


@dataclass(frozen=True)
class Prune:
    """The block of one compressing kernel: rows of 32 ``words`` channels, of which ``kept`` are stored in ``code``."""

    words: int
    kept: int
    warps: int
    dtype: str
    code: str = "none"
    weighted: bool = False  # magnitudes rank times weights of the channels

    @property
    def rows(self) -> Rows:
        """What it packs. Where they have no bitmap, nothing is pruned."""
        return Rows(self.words, self.kept, self.code)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program: a slot for each value, and one for what is not kept behind the last."""
        return self.warps * 128 * (self.kept + 1) * self.rows.has_bitmap

    @property
    def addresses(self) -> list[str]:
        """The addresses that the block takes."""
        others = ["levels"] * (self.code == "int4") + ["weights"] * self.weighted
        return ["row", "ring", "flags", *self.rows.buffers, *others]

    def block(self) -> Block:
        """Prune and pack one row a lane.

        in: addresses row, ring, flags, of the row's place in the buffers of packed rows, levels for int4, and weights
        of all channels where it is ``weighted``; 0 or 1:
        is_valid (there is a row), is_recent (it belongs into the window), is_stored (it is pruned).
        """
        inputs = dict.fromkeys(self.addresses, "l")
        inputs |= dict.fromkeys(("is_valid", "is_recent", "is_stored"), "r")
        return Block.of(inputs, {"done": "r"}, self._body())

    def _body(self) -> Lines:
        yield ".reg .b32 stage, lane, warp, up, down; .reg .pred valid, recent, stored;"
        for name in ("valid", "recent", "stored"):
            yield f"setp.ne.u32 {name}, is_{name}, 0;"
        yield f".reg .b32 x<{16 * self.words}>, v<{self.kept // 2}>;"
        yield from load_row(self.words)
        yield from keep_window(self.words)
        if self.rows.has_bitmap:
            yield from self._prune()
        else:
            yield from (f"mov.b32 v{j}, x{j};" for j in range(self.kept // 2))
        if self.code == "none":
            yield from store_values(self.kept)
        else:
            yield from self._encode()
        yield "mov.b32 done, 0;"

    def _prune(self) -> Lines:
        yield f".shared .align 128 .b8 slots[{self.shared_bytes}]; mov.u32 stage, slots;"
        yield from locate_thread()
        yield f"mad.lo.u32 stage, warp, {(self.kept + 1) * 128}, stage; mad.lo.u32 stage, lane, 4, stage;"
        yield f".reg .b32 lower, upper, {', '.join(f'b{w}' for w in range(self.words))};"
        for w in range(self.words):
            yield ".reg .b32 " + ", ".join(f"plane{p}_{w}" for p in range(16)) + ";"
        yield from self._planes()
        yield from select(self.words, self.kept)
        yield from pack(self.words)
        yield from store_bitmap(self.words)

    def _planes(self) -> Lines:
        """What rows rank by, in bit planes; whether one holds a value from ``format.EXTREME`` on -> ``flags``."""
        if not self.weighted:
            for w in range(self.words):
                yield from bit_planes(w, [f"x{16 * w + k}" for k in range(16)])
            yield from note_extremes(self.words, self.dtype)
            return
        yield ".reg .b32 y<16>; .reg .f32 w0, w1, w2, w3, even, odd, top; .reg .b16 half0, half1; .reg .pred report;"
        yield "mov.f32 top, 0f00000000;"
        for w in range(self.words):
            yield from weigh(w, self.dtype)
            yield from bit_planes(w, [f"y{k}" for k in range(16)])
        yield f"setp.geu.and.f32 report, top, {_EXTREME}, valid; @report red.global.or.b64 [flags], 1;"

    def _encode(self) -> Lines:
        count = self.kept // 2
        if self.rows.has_bitmap:
            yield from fetch(0, count)
        yield from find_peak(count, self.code, self.dtype, note=not self.rows.has_bitmap)
        yield from store_levels(count, self.code, self.dtype)
