"""Decode attention: the inline-assembly blocks of one specialisation, made of the steps in ``decode_steps``."""

from __future__ import annotations

from dataclasses import dataclass

from .block import Block, Lines, locate_thread, names
from .decode_steps import (
    Rows,
    accumulate,
    exchange,
    expand_setup,
    expand_word,
    locate_words,
    merge_warps,
    prefetch,
    rescale,
    score_setup,
    score_word,
    share_partial,
    stage,
    transpose,
    transposer,
    weigh,
)

_NEXT = {"bitmap": "l", "values": "l", "next": "r", "lane": "r"}  # what ``prefetch`` takes


@dataclass(frozen=True)
class Decode:
    """The blocks of one specialisation of the decode kernel.

    keys, values: packed rows of K and V. heads: query heads of a program, at most 8. dtype: "bf16" or "f16".
    """

    keys: Rows
    values: Rows
    heads: int
    warps: int
    dtype: str

    @property
    def groups(self) -> int:
        """Query heads come in fours: one mma scores four heads."""
        return -(-self.heads // 4)

    @property
    def key_dim(self) -> int:
        """Channels of K."""
        return 32 * self.keys.words

    @property
    def accumulators(self) -> int:
        """Accumulator registers of a lane."""
        return 8 * self.values.words

    @property
    def warp_bytes(self) -> int:
        """Shared memory of a warp: staged rows during the loop, accumulators after it."""
        return max(self.keys.staged_bytes(), self.values.staged_bytes(), 128 * self.accumulators)

    @property
    def query_bytes(self) -> int:
        """Shared memory of the query, eight bytes a channel for each group of heads."""
        return 8 * self.key_dim * self.groups

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        overread = max(self.keys.overread_bytes(), self.values.overread_bytes())
        return self.warps * self.warp_bytes + max(self.query_bytes + 64 * self.warps, overread)

    def setup(self) -> Block:
        """Query words -> shared memory; addresses; the 0/1 matrices of ``transpose``.

        in: q<c>_<h>_<k>: channels 4 (lane + 32 c) + 2 k, + 1 of head h. out: shared, stage, query, t0 ... t3.
        """
        chunks = -(-self.key_dim // 128)
        inputs = {f"q{c}_{h}_{k}": "r" for c in range(chunks) for h in range(4 * self.groups) for k in range(2)}
        outputs = {"shared": "r", "stage": "r", "query": "r"} | names("t", 4)
        return Block.of(inputs, outputs, self._setup(chunks))

    def _setup(self, chunks: int) -> Lines:
        yield f".shared .align 128 .b8 arena[{self.shared_bytes}];"
        yield ".reg .b32 lane, warp, spot, bit; .reg .pred inside;"
        yield "mov.u32 shared, arena;"
        yield from locate_thread()
        yield f"mad.lo.u32 stage, warp, {self.warp_bytes}, shared; mad.lo.u32 stage, lane, 4, stage;"
        # Every warp writes the same words.
        yield f"add.u32 query, shared, {self.warps * self.warp_bytes}; mad.lo.u32 spot, lane, 32, query;"
        for c in range(chunks):
            yield f"setp.lt.u32 inside, lane, {self.key_dim // 4 - 32 * c};"
            for g in range(self.groups):
                for parity in range(2):  # a lane with even r loads heads 0 and 2, with odd r 1 and 3
                    h = [4 * g + parity, 4 * g + parity + 2]
                    words = f"{{q{c}_{h[0]}_0,q{c}_{h[1]}_0,q{c}_{h[0]}_1,q{c}_{h[1]}_1}}"
                    offset = 8 * self.key_dim * g + 1024 * c + 16 * parity
                    yield f"@inside st.shared.v4.b32 [spot+{offset}], {words};"
        # A lane's fragments: of heads 0 and 2 or 1 and 3 by r % 2, of the first or the last four channels by t // 2
        yield "bar.sync 0; and.b32 bit, lane, 4; mad.lo.u32 query, bit, 4, query;"
        yield "and.b32 bit, lane, 2; mad.lo.u32 query, bit, 16, query;"
        yield from transposer()

    def first_keys(self) -> Block:
        """Loads the keys of the first block."""
        return Block.of(_NEXT, self.keys.registers("n"), prefetch(self.keys))

    def score(self) -> Block:
        """A block of 32 keys -> s; loads the values of the same block meanwhile."""
        inputs = _NEXT | {"stage": "r", "query": "r"}
        outputs = names("s", 4 * self.groups, "f") | self.values.registers("n")
        return Block.of(inputs | self.keys.registers(), outputs, self._score())

    def _score(self) -> Lines:
        yield from stage(self.keys)
        yield from locate_words(self.keys)
        yield from expand_setup()
        yield ".reg .f32 e<4>; .reg .b32 x<32>;"
        yield from score_setup()
        for s in self._score_sums():
            yield f"mov.f32 {s}, 0f00000000;"
        for w in range(self.keys.words):
            yield from expand_word(w, 16 * (w % 2))
            yield from score_word(w, 16 * (w % 2), self.groups, self.key_dim, self.dtype)
            if w == 0:  # later than at once: the registers are free by now
                yield from prefetch(self.values)
        if self.groups == 1:
            yield " ".join(f"add.f32 s{i}, s{i}, e{i};" for i in range(4))

    def _score_sums(self) -> list[str]:
        return [f"s{i}" for i in range(4 * self.groups)] + [f"e{i}" for i in range(4) if self.groups == 1]

    def softmax(self) -> Block:
        """s, and the running m, l, o -> p, and m, l, o brought up to date."""
        heads = 2 * self.groups
        state = names("m", heads, "f") | names("l", heads, "f") | names("o", self.accumulators, "f")
        return Block.of(names("s", 2 * heads, "f") | state, names("p", 4) | state, self._softmax())

    def _softmax(self) -> Lines:
        yield from rescale(self.groups, self.accumulators)
        yield from weigh(self.groups, self.dtype)
        yield from exchange(self.groups)

    def weighted_sum(self) -> Block:
        """A block of 32 values, weighed by p -> added to o; loads the keys of the next block meanwhile."""
        o = names("o", self.accumulators, "f")
        inputs = _NEXT | {"stage": "r"} | self.values.registers() | names("p", 4) | names("t", 4) | o
        return Block.of(inputs, o | self.keys.registers("n"), self._weighted_sum())

    def _weighted_sum(self) -> Lines:
        yield from stage(self.values)
        yield from locate_words(self.values)
        yield from expand_setup()
        yield ".reg .b32 x<32>, y<8>, zero, tokens; mov.b32 zero, 0;"
        for w in range(self.values.words):
            first = 16 * (w % 2)
            yield from expand_word(w, first)
            for tile in range(2):
                for half in range(2):
                    yield from transpose(first + 8 * tile + 4 * half, half)
                yield from accumulate(2 * w + tile, self.dtype)
            if w == 0:
                yield from prefetch(self.keys)

    def merge(self) -> Block:
        """The partial results of all warps -> z, M0, L0, M1, L1 (see ``merge_warps``)."""
        heads, share = 2 * self.groups, self.accumulators // self.warps
        inputs = {"shared": "r"} | names("m", heads, "f") | names("l", heads, "f")
        inputs |= names("o", self.accumulators, "f")
        outputs = names("z", share, "f") | {"M0": "f", "L0": "f", "M1": "f", "L1": "f"}
        return Block.of(inputs, outputs, self._merge())

    def _merge(self) -> Lines:
        yield f".reg .b32 state; add.u32 state, shared, {self.warps * self.warp_bytes + self.query_bytes};"
        yield from share_partial(self.groups, self.accumulators, self.warp_bytes)
        yield from merge_warps(self.warps, self.accumulators, self.warp_bytes)
