"""Decode attention, step by step. ``decode`` makes blocks of these steps.

A warp works on a block of 32 tokens and a lane owns one token row, packed as ``format`` says. Nothing is ever laid
out dense in memory: a lane expands its row four channels at a time into two registers, and the tensor cores do all
that crosses lanes.

Vocabulary, used for register names too:

==========  ==============================================================================================
b<w>        bitmap word w of the lane's row (32 channels)
v<j>        packed values 2j and 2j+1 of the lane's row
x<k>        two neighbouring channels of the lane's row, expanded (16 registers to a bitmap word)
r, t        lane // 4 and lane % 4: row and column of the lane in an mma fragment
s<k>        scores; s[2i] and s[2i+1]: head 2 i + r % 2 at tokens 8 t + u and 8 t + 4 + u, where u = r // 2
m<i>, l<i>  running maximum (base 2) and the lane's share of the sum of weights, for the head of s[2i]
p<u>        weights of head r at tokens 8 t + u and 8 t + 4 + u
y<k>        values transposed: channel r of a tile of 8, two tokens to a register
o<k>        accumulators: channel 16 (k // 4) + 8 (k // 2 % 2) + r of head 2 t + k % 2; ``values`` halves them
==========  ==============================================================================================
"""

from __future__ import annotations

from .block import Lines, float32, listed, locate_thread
from .rows import BIAS, TOP, UNITS

# Which two of four neighbouring columns a sparse A has, in all rows and columns: a token has two columns side by side.
FIRST_TOKEN, SECOND_TOKEN = "0x44444444", "0xEEEEEEEE"
_LAZY_RESCALE = "0f41000000"  # 8: the weights may grow to 2^8 before the accumulators are rescaled
_LEAST_LOG = "0fC2C80000"  # -100
HEAD_LANES = (1, 2, 8, 16)  # distances between the 16 lanes that score for the same heads


def mma(dtype: str) -> str:
    """The mma instruction with operands of ``dtype`` ("bf16" or "f16") and sums in float32."""
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"


def sparse_mma(sums: str, dtype: str) -> str:
    """The mma whose A operand is sparse, two of four neighbouring columns, which the operand behind C tells."""
    return f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.{sums}.{dtype}.{dtype}.{sums}"


def score_setup() -> Lines:
    """Lane: ``tokens`` (which of two tokens its rows of A are for), ``active``, and zeros for where it is not."""
    yield ".reg .b32 tokens; .reg .pred active, odd; shr.u32 tokens, lane, 4; xor.b32 tokens, tokens, lane;"
    yield "and.b32 tokens, tokens, 1; setp.eq.u32 active, tokens, 0;"
    yield f"and.b32 tokens, lane, 8; setp.ne.u32 odd, tokens, 0; selp.b32 tokens, {SECOND_TOKEN}, {FIRST_TOKEN}, odd;"
    yield ".reg .b32 q<4>; " + " ".join(f"mov.b32 q{i}, 0;" for i in range(4))


def score_word(w: int, first: int, groups: int, head_dim: int, dtype: str) -> Lines:
    """Warp: expanded word w of 32 keys x the query -> added to s, and for one group of heads to s and e in turn.

    So two sums are under way at any time: an mma need not wait for the one before it.

    The expanded registers are the B operand as they are: column r, rows 2 t and 2 t + 1 (and those + 8, 16, 24) hold
    eight channels of token 4 r + t. A is the query laid out block-diagonally, row (head, u) nonzero only in the columns
    of u = t, so that the four tokens of a column do not mix. Two of four neighbouring columns belong to one token, so A
    is structured sparse, and packed it has two columns for tokens 0 and 1 and two for tokens 2 and 3. Only lanes with
    t % 2 = u // 2 load something (``active``): the registers of the others stay zero, as loading zeros would take as
    many shared-memory wavefronts again.
    """
    query = listed("q", 0, 1, 2, 3)
    for i in range(4):
        b = listed("x", *(first + 4 * i + k for k in (0, 2, 1, 3)))  # so that A's are four neighbouring channels
        for g in range(groups):
            address = f"query+{64 * (4 * w + i) + 8 * head_dim * g}"
            yield f"@active ld.shared.v4.b32 {query}, [{address}];"
            scores = listed("e" if groups == 1 and i % 2 else "s", *range(4 * g, 4 * g + 4))
            yield f"{sparse_mma('f32', dtype)} {scores}, {query}, {b}, {scores}, tokens, 0;"


def normalise(groups: int, chunks: int) -> Lines:
    """Warp: the query q<c>_<h>_<k> from bfloat16 to float16, each head over a power of two of its own -> g<i>, that of
    the head of s[2i].

    Its largest element then is from 2^14 to 2^15, and the smallest ones lose less than float32 sums do.
    """
    heads = range(4 * groups)
    yield f".reg .b32 size<{4 * groups}>, bits; .reg .f32 low, high, inverse; .reg .pred upper;"
    for h in heads:
        words = [f"q{c}_{h}_{k}" for c in range(chunks) for k in range(2)]
        yield f"mov.b32 size{h}, 0;"
        for q in words:
            for shift in (f"shl.b32 bits, {q}, 16; and.b32 bits, bits", f"and.b32 bits, {q}"):
                yield f"{shift}, 0x7FFF0000; max.u32 size{h}, size{h}, bits;"
        yield f"redux.sync.max.u32 size{h}, size{h}, -1; and.b32 size{h}, size{h}, 0x7F800000;"
        yield f"max.u32 size{h}, size{h}, 0x07800000; sub.u32 size{h}, size{h}, 0x07000000;"  # over 2^14
        yield f"sub.u32 bits, 0x7F000000, size{h}; mov.b32 inverse, bits;"
        for q in words:
            yield f"shl.b32 bits, {q}, 16; mov.b32 low, bits; mul.f32 low, low, inverse;"
            yield f"and.b32 bits, {q}, 0xFFFF0000; mov.b32 high, bits; mul.f32 high, high, inverse;"
            yield f"cvt.rn.f16x2.f32 {q}, high, low;"
    yield "and.b32 bits, lane, 4; setp.ne.u32 upper, bits, 0;"
    for i in range(2 * groups):
        yield f"selp.b32 bits, size{2 * i + 1}, size{2 * i}, upper; mov.b32 g{i}, bits;"


def sum_query(groups: int, chunks: int) -> Lines:
    """Warp: the query in float16, q<c>_<h>_<k> -> n<i>: what has to be added to sums of coded elements for the head of
    s[2i] because of their bias."""
    yield f".reg .f32 total<{4 * groups}>, term; .reg .b16 front, back; .reg .pred second; .reg .b32 parity;"
    for h in range(4 * groups):
        yield f"mov.f32 total{h}, 0f00000000;"
        for q in (f"q{c}_{h}_{k}" for c in range(chunks) for k in range(2)):
            yield f"mov.b32 {{front,back}}, {q};"
            for half in ("front", "back"):
                yield f"cvt.f32.f16 term, {half}; add.f32 total{h}, total{h}, term;"
        for distance in (1, 2, 4, 8, 16):
            yield f"shfl.sync.bfly.b32 term, total{h}, {distance}, 31, -1; add.f32 total{h}, total{h}, term;"
        yield f"mul.f32 total{h}, total{h}, {float32(BIAS / UNITS)};"
    yield "and.b32 parity, lane, 4; setp.ne.u32 second, parity, 0;"
    for i in range(2 * groups):
        yield f"selp.f32 n{i}, total{2 * i + 1}, total{2 * i}, second;"


def level_scale(groups: int, normalised: bool) -> Lines:
    """Lane: g<i>, that of ``normalise`` or none -> what scores in units of their peak are multiplied with."""
    for i in range(2 * groups):
        yield f"{f'mul.f32 g{i}, g{i}' if normalised else f'mov.f32 g{i}'}, {float32(-UNITS / TOP)};"


def scale_scores(groups: int) -> Lines:
    """Lane: s, sums of coded elements (``rows``) -> what they stand for, times what g<i> was multiplied with."""
    for k in range(4 * groups):
        yield f"add.f32 s{k}, s{k}, n{k // 2}; mul.f32 s{k}, s{k}, peak{k % 2}; mul.f32 s{k}, s{k}, g{k // 2};"


def rescale(groups: int, accumulators: int, scaled: bool) -> Lines:
    """Warp: where a score exceeds the running maximum by more than 2^8, raise the maximum and rescale l and o.

    scaled: values are levels, which the weights are multiplied for by ``peak<k>``. Then the maximum is that of the
    products, so that they fit in float16 whatever the values are. The weights themselves fit in float32 for peaks from
    2^-100 on; below, they count as 2^-100.
    """
    heads = 2 * groups
    yield f".reg .f32 other, f0, f1, {', '.join(f'top{i}, new{i}, factor{i}' for i in range(heads))};"
    yield ".reg .pred over, any, odd, upper;"
    if scaled:
        yield ".reg .f32 log0, log1;"
        for k in range(2):
            yield f"lg2.approx.ftz.f32 log{k}, peak{k}; max.f32 log{k}, log{k}, {_LEAST_LOG};"
    for i in range(heads):
        if scaled:
            yield f"add.f32 top{i}, s{2 * i}, log0; add.f32 other, s{2 * i + 1}, log1; max.f32 top{i}, top{i}, other;"
        else:
            yield f"max.f32 top{i}, s{2 * i}, s{2 * i + 1};"
        yield f"add.f32 other, m{i}, {_LAZY_RESCALE};"
        yield f"setp.gt.f32 over, top{i}, other;" if i == 0 else f"setp.gt.or.f32 over, top{i}, other, over;"
    yield "vote.sync.any.pred any, over, -1; @!any bra KEEP;"
    for distance in HEAD_LANES:
        for i in range(heads):
            yield f"shfl.sync.bfly.b32 other, top{i}, {distance}, 31, -1; max.f32 top{i}, top{i}, other;"
    for i in range(heads):
        yield f"max.f32 new{i}, m{i}, top{i}; sub.f32 other, m{i}, new{i}; ex2.approx.ftz.f32 factor{i}, other;"
        yield f"mov.f32 m{i}, new{i}; mul.f32 l{i}, l{i}, factor{i};"
    # The accumulators of a lane belong to heads 2 t and 2 t + 1: factor t of lanes with r = 0 and r = 1.
    yield "and.b32 bit, lane, 1; setp.ne.u32 odd, bit, 0; and.b32 bit, lane, 2; setp.ne.u32 upper, bit, 0;"
    for parity in range(2):
        fetch = f"{4 * parity}, 31, -1"
        yield f"shfl.sync.idx.b32 f{parity}, factor0, {fetch}; shfl.sync.idx.b32 other, factor1, {fetch};"
        yield f"selp.f32 f{parity}, other, f{parity}, odd;"
        if groups == 2:
            yield f"{{ .reg .f32 far; shfl.sync.idx.b32 far, factor2, {fetch};"
            yield f"shfl.sync.idx.b32 other, factor3, {fetch}; selp.f32 far, other, far, odd;"
            yield f"selp.f32 f{parity}, far, f{parity}, upper; }}"
    for k in range(accumulators):
        yield f"mul.f32 o{k}, o{k}, f{k % 2};"
    yield "KEEP:"


def weigh(groups: int, dtype: str, scaled: bool) -> Lines:
    """Lane: s -> weights 2^(s - m), added to l and packed as p<i> (two tokens of the head of s[2i]), if so scaled."""
    heads = 2 * groups
    yield ".reg .f32 weight0, weight1, difference;"
    for i in range(heads):
        for token in range(2):
            yield f"sub.f32 difference, s{2 * i + token}, m{i}; ex2.approx.ftz.f32 weight{token}, difference;"
            yield f"add.f32 l{i}, l{i}, weight{token};"
            if scaled:
                yield f"mul.f32 weight{token}, weight{token}, peak{token};"
        yield f"cvt.rn.{dtype}x2.f32 p{i}, weight1, weight0;"


def exchange(groups: int, halved: bool) -> Lines:
    """Warp: p<i> of weigh -> p<u> (B operand): a transposition of i and u, between registers and bits 3, 4 of the lane.

    With one group of heads p2 and p3 are those of the other lane for heads 0 to 3; nobody reads heads 4 to 7. If
    halved (see ``values``), those are left out: bit 4 of the lane stays a bit of u.
    """
    yield ".reg .b32 given;"
    steps = [(8, [(0, 1)])] if halved else [(16, [(0, 2), (1, 3)]), (8, [(0, 1), (2, 3)])]
    for distance, pairs in steps:
        yield f"and.b32 bit, lane, {distance}; setp.ne.u32 upper, bit, 0;"
        for a, b in pairs:
            if distance == 16 and groups == 1:
                yield f"shfl.sync.bfly.b32 p{b}, p{a}, {distance}, 31, -1;"
                continue
            yield f"selp.b32 given, p{a}, p{b}, upper; shfl.sync.bfly.b32 given, given, {distance}, 31, -1;"
            yield f"selp.b32 p{a}, given, p{a}, upper; selp.b32 p{b}, p{b}, given, upper;"


def share_partial(groups: int, accumulators: int, warp_bytes: int) -> Lines:
    """Warp: o, m and the sum of l over the lanes of a head -> shared memory of the program, for ``merge_warps``."""
    yield ".reg .b32 lane, warp, mine, spot, bit; .reg .f32 other; .reg .pred first;"
    yield from locate_thread()
    yield f"mad.lo.u32 mine, warp, {warp_bytes}, shared; mad.lo.u32 mine, lane, 4, mine;"
    for i in range(2 * groups):
        for distance in HEAD_LANES:
            yield f"shfl.sync.bfly.b32 other, l{i}, {distance}, 31, -1; add.f32 l{i}, l{i}, other;"
    yield "bar.warp.sync -1;"
    for k in range(accumulators):
        yield f"st.shared.b32 [mine+{128 * k}], o{k};"
    # (m, l) of head h of warp w at state + 64 w + 8 h
    yield "and.b32 bit, lane, 27; setp.eq.u32 first, bit, 0;"
    yield "mad.lo.u32 spot, warp, 64, state; mad.lo.u32 spot, lane, 2, spot;"
    for i in range(2 * groups):
        yield f"@first st.shared.v2.b32 [spot+{16 * i}], {{m{i},l{i}}};"
    yield "bar.sync 0;"


def merge_warps(warps: int, accumulators: int, warp_bytes: int) -> Lines:
    """Program: the partial results of its warps -> z<k>, a share of the accumulators for each warp, and M0, L0, M1, L1.

    Warp w takes accumulators w n ... w n + n - 1 of all warps, n = accumulators / warps. M and L belong to heads 2 t
    and 2 t + 1.
    """
    share = accumulators // warps
    sums = ", ".join(f"pm{w}_{h}, pl{w}_{h}" for w in range(warps) for h in range(2))
    yield f".reg .f32 part, {sums}; .reg .b32 column; and.b32 column, lane, 3; mad.lo.u32 column, column, 16, state;"
    for h in range(2):
        for w in range(warps):
            yield f"ld.shared.v2.b32 {{pm{w}_{h},pl{w}_{h}}}, [column+{64 * w + 8 * h}];"
        yield f"mov.f32 M{h}, pm0_{h}; mov.f32 L{h}, 0f00000000;"
        for w in range(1, warps):
            yield f"max.f32 M{h}, M{h}, pm{w}_{h};"
        for w in range(warps):  # from here on pm is the factor of the warp
            yield f"sub.f32 part, pm{w}_{h}, M{h}; ex2.approx.ftz.f32 pm{w}_{h}, part;"
            yield f"fma.rn.f32 L{h}, pl{w}_{h}, pm{w}_{h}, L{h};"
    yield f"mad.lo.u32 mine, warp, {128 * share}, shared; mad.lo.u32 mine, lane, 4, mine;"
    for k in range(share):
        yield f"mov.f32 z{k}, 0f00000000;"
        for w in range(warps):
            yield f"ld.shared.b32 part, [mine+{128 * k + warp_bytes * w}]; fma.rn.f32 z{k}, part, pm{w}_{k % 2}, z{k};"
