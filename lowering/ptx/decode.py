"""Decode attention: the inline-assembly blocks of one specialisation, made of the steps in ``decode_steps``."""

from __future__ import annotations

from dataclasses import dataclass

from .block import Block, Lines, locate_thread, names
from .decode_steps import (
    exchange,
    level_scale,
    merge_warps,
    normalise,
    rescale,
    scale_scores,
    score_setup,
    score_word,
    share_partial,
    sum_query,
    weigh,
)
from .rows import LEVEL_TABLE_BYTES, Rows, expand_setup, expand_word, peaks, prefetch, stage
from .values import (
    accumulate,
    accumulate_halves,
    bias_of_levels,
    join_halves,
    scale_sums,
    transpose,
    transposer,
)


@dataclass(frozen=True)
class Decode:
    """The blocks of one specialisation of the decode kernel.

    keys, values: packed rows of K and V. heads: query heads of a program, at most 8. dtype: "bf16" or "f16".
    by_matrices: shared memory is written by ``stmatrix``, which needs compute capability 9.0.
    """

    keys: Rows
    values: Rows
    heads: int
    warps: int
    dtype: str
    by_matrices: bool = True

    @property
    def key_dtype(self) -> str:
        """Of the products of the query and the keys."""
        return "f16" if self.keys.coded else self.dtype

    @property
    def value_dtype(self) -> str:
        """Of the products of the weights and the values."""
        return "f16" if self.values.coded else self.dtype

    @property
    def normalised(self) -> bool:
        """Whether the query is brought into float16."""
        return self.key_dtype != self.dtype

    @property
    def has_table(self) -> bool:
        """Whether the levels of int4 are needed."""
        return "int4" in (self.keys.code, self.values.code)

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
        """Registers of a lane for the sums of weighted values."""
        return 8 * self.values.words

    @property
    def halved(self) -> bool:
        """Whether sums over values are halved, see ``values``: where columns of an mma are free and registers are."""
        staged = self.keys.gathered and self.values.gathered  # else both rows stand in registers at once
        return self.groups == 1 and self.values.words <= 4 and staged

    @property
    def sums(self) -> int:
        """Registers that sum up weighted values during the loop."""
        return self.accumulators * (2 if self.halved else 1)

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
        table = LEVEL_TABLE_BYTES * self.has_table
        return self.warps * self.warp_bytes + max(self.query_bytes + 64 * self.warps + table, overread)

    @property
    def table_at(self) -> int:
        """Where in it the levels of int4 stand."""
        return self.warps * self.warp_bytes + self.query_bytes + 64 * self.warps

    def _next(self, rows: Rows) -> dict[str, str]:
        """What ``prefetch`` takes."""
        return dict.fromkeys(rows.loaded, "l") | {"next": "r"}

    def _score_scales(self) -> dict[str, str]:
        """What ``scale_scores`` takes besides the scores: n<i>, g<i>."""
        return names("n", 2 * self.groups, "f") | names("g", 2 * self.groups, "f")

    def _table(self, rows: Rows) -> dict[str, str]:
        """What ``stage`` takes besides the row."""
        return {"table": "r"} if rows.code == "int4" else {}

    def setup(self) -> Block:
        """Query words -> shared memory; addresses; the 0/1 matrices of ``transpose``; levels of int4 -> shared memory.

        in: q<c>_<h>_<k>: channels 4 (lane + 32 c) + 2 k, + 1 of head h; levels. out: shared, stage, of keys and of
        values the ``spread`` (see ``rows.stage``), query, t0 ... t3; n<i> (see ``sum_query``), g<i> (see
        ``level_scale``), table, where they are needed.
        """
        chunks = -(-self.key_dim // 128)
        inputs = {f"q{c}_{h}_{k}": "r" for c in range(chunks) for h in range(4 * self.groups) for k in range(2)}
        outputs = dict.fromkeys(("shared", "stage", "key_spread", "value_spread", "query"), "r") | names("t", 4)
        if self.keys.coded:
            outputs |= self._score_scales()
        if self.has_table:
            inputs, outputs = inputs | {"levels": "l"}, outputs | {"table": "r"}
        return Block.of(inputs, outputs, self._setup(chunks))

    def _setup(self, chunks: int) -> Lines:
        yield f".shared .align 128 .b8 arena[{self.shared_bytes}];"
        yield ".reg .b32 lane, warp, spot, bit; .reg .pred inside;"
        yield "mov.u32 shared, arena;"
        yield from locate_thread()
        yield f"mad.lo.u32 stage, warp, {self.warp_bytes}, shared;"
        yield "and.b32 bit, lane, 7; shr.u32 spot, lane, 3; mad.lo.u32 bit, bit, 16, stage;"
        for role, rows in (("key", self.keys), ("value", self.values)):
            yield f"mad.lo.u32 {role}_spread, spot, {rows.stored_apart}, bit;"
        yield "mad.lo.u32 stage, lane, 4, stage;"
        if self.normalised:
            yield from normalise(self.groups, chunks)
        if self.keys.coded:
            yield from sum_query(self.groups, chunks)
            yield from level_scale(self.groups, self.normalised)
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
        if self.has_table:
            yield f"add.u32 table, shared, {self.table_at}; .reg .b64 from; .reg .b32 v<2>;"
            yield "mad.lo.u32 spot, warp, 32, lane; mad.wide.u32 from, spot, 8, levels;"
            yield "mad.lo.u32 spot, spot, 8, table;"
            for at in range(0, LEVEL_TABLE_BYTES, 256 * self.warps):
                yield f"ld.global.v2.b32 {{v0,v1}}, [from+{at}]; st.shared.v2.b32 [spot+{at}], {{v0,v1}};"
        # A lane's fragments: of heads 0 and 2 or 1 and 3 by r % 2, of the first or the last four channels by t // 2
        yield "bar.sync 0; and.b32 bit, lane, 4; mad.lo.u32 query, bit, 4, query;"
        yield "and.b32 bit, lane, 2; mad.lo.u32 query, bit, 16, query;"
        yield from transposer()

    def first_keys(self) -> Block:
        """Loads the keys of the first block."""
        return Block.of(self._next(self.keys), self.keys.registers("n"), prefetch(self.keys))

    def score(self) -> Block:
        """A block of 32 keys -> s; loads the values of the same block meanwhile."""
        inputs = self._next(self.values) | {"stage": "r", "spread": "r", "query": "r"} | self._table(self.keys)
        inputs |= self._score_scales() if self.keys.coded else {}
        outputs = names("s", 4 * self.groups, "f") | self.values.registers("n")
        return Block.of(inputs | self.keys.registers(), outputs, self._score())

    def _score(self) -> Lines:
        yield ".reg .b32 lane; mov.u32 lane, %laneid;"
        yield from stage(self.keys, self.by_matrices)
        yield from expand_setup(self.keys)
        yield ".reg .f32 e<4>; .reg .b32 x<32>;"
        yield from score_setup()
        for s in self._score_sums():
            yield f"mov.f32 {s}, 0f00000000;"
        for w in range(self.keys.words):
            yield from expand_word(self.keys, w, 16 * (w % 2))
            yield from score_word(w, 16 * (w % 2), self.groups, self.key_dim, self.key_dtype)
            if w == 0:  # later than at once: the registers are free by now
                yield from prefetch(self.values)
        if self.groups == 1:
            yield " ".join(f"add.f32 s{i}, s{i}, e{i};" for i in range(4))
        if self.keys.coded:
            yield from peaks(self.dtype)
            yield from scale_scores(self.groups)

    def _score_sums(self) -> list[str]:
        return [f"s{i}" for i in range(4 * self.groups)] + [f"e{i}" for i in range(4) if self.groups == 1]

    def softmax(self) -> Block:
        """s, and the running m, l, o -> p, and m, l, o brought up to date. Of coded values it takes c<e> as well."""
        heads = 2 * self.groups
        state = names("m", heads, "f") | names("l", heads, "f") | names("o", self.sums, "f")
        scores = names("s", 2 * heads, "f") | names("c", 2 * self.values.coded)
        return Block.of(scores | state, names("p", 4) | state, self._softmax())

    def _softmax(self) -> Lines:
        yield ".reg .b32 lane, bit; mov.u32 lane, %laneid;"
        if self.values.coded:
            yield from peaks(self.dtype)
        yield from rescale(self.groups, self.sums, self.values.coded)
        yield from weigh(self.groups, self.value_dtype, self.values.coded)
        yield from exchange(self.groups, self.halved)

    def weighted_sum(self) -> Block:
        """A block of 32 values, weighed by p -> added to o; loads the keys of the next block meanwhile."""
        o = names("o", self.sums, "f")
        inputs = self._next(self.keys) | {"stage": "r", "spread": "r"} | self._table(self.values)
        inputs |= self.values.registers() | names("p", 4) | names("t", 4) | o
        return Block.of(inputs, o | self.keys.registers("n"), self._weighted_sum())

    def _weighted_sum(self) -> Lines:
        yield from stage(self.values, self.by_matrices)
        yield from expand_setup(self.values)
        yield ".reg .b32 x<32>, y<8>, tokens;"
        yield from bias_of_levels(self.values.coded)
        for w in range(self.values.words):
            first = 16 * (w % 2)
            yield from expand_word(self.values, w, first)
            for tile in range(2):
                for half in range(2):
                    yield from transpose(first + 8 * tile + 4 * half, half)
                yield from (accumulate_halves if self.halved else accumulate)(2 * w + tile, self.value_dtype)
            if w == 0:
                yield from prefetch(self.keys)

    def merge(self) -> Block:
        """The partial results of all warps -> z, M0, L0, M1, L1 (see ``merge_warps``)."""
        heads, share = 2 * self.groups, self.accumulators // self.warps
        inputs = {"shared": "r"} | names("m", heads, "f") | names("l", heads, "f")
        inputs |= names("o", self.sums, "f")
        outputs = names("z", share, "f") | {"M0": "f", "L0": "f", "M1": "f", "L1": "f"}
        return Block.of(inputs, outputs, self._merge())

    def _merge(self) -> Lines:
        yield f".reg .b32 state; add.u32 state, shared, {self.warps * self.warp_bytes + self.query_bytes};"
        if self.halved:
            yield from join_halves(self.accumulators)
        yield from share_partial(self.groups, self.accumulators, self.warp_bytes)
        yield from merge_warps(self.warps, self.accumulators, self.warp_bytes)
        if self.values.coded:
            yield from scale_sums(self.accumulators // self.warps)
