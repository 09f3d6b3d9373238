"""Random sequences of operations on live caches: after each one they hold, and attend to, what plain rows would."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import mustafar_compile
from cases import query_counts, randn, seeds
from conftest import SHARDS, sharded
from live_caches import Live, Shape
from mustafar_compile import CompressedKV, CompressedWriteError, StaleCacheError
from mustafar_compile.lowering import ops
from mustafar_compile.lowering.format import CODES, Format, grown_capacity
from mustafar_compile.lowering.head_groups import HeadGroups
from reference import reference_attention, reference_weights

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
LARGEST_BATCH = 6

lengths = st.one_of(st.integers(1, 8), st.integers(25, 40), st.integers(50, 75))  # around blocks and capacities, too
rewinds = st.sampled_from([0, 0, 0, 0, 1, 3, 15, 16, 17, 40])
picks = st.lists(st.integers(0, LARGEST_BATCH - 1), min_size=1, max_size=LARGEST_BATCH)
MISPLACED = {
    "before the first": lambda live, count: -1,
    "far before": lambda live, count: -(2**40),
    "behind a gap": lambda live, count: live.tokens + 1,
    "past the end": lambda live, count: live.room - count + 1,
    "far past": lambda live, count: 2**40,
}
mask_kinds = st.sampled_from(["none", "boolean", "by head", "additive"])
shapes = st.builds(
    Shape,
    heads=st.integers(1, 3),
    group=st.integers(1, 5),
    key_dim=st.sampled_from([8, 16, 24, 40]),
    value_dim=st.sampled_from([8, 16, 32]),
    dtype=st.sampled_from(list(TOLERANCE)),
    key_sparsity=st.sampled_from([0.0, 0.5, 0.7]),
    value_sparsity=st.sampled_from([0.0, 0.5, 0.9]),
    window=st.integers(1, 12),
    key_code=st.sampled_from(CODES),
    value_code=st.sampled_from(CODES),
    key_strategy=st.sampled_from(["magnitude", "output-aware", "output-aware", "think"]),
    value_strategy=st.sampled_from(["magnitude", "think", "channel-magnitude", "channel-output-aware"]),
)


def saved_and_loaded(kv):
    file = io.BytesIO()
    torch.save(kv, file)
    file.seek(0)
    with torch.serialization.safe_globals(mustafar_compile.safe_globals()):
        return torch.load(file)


COPIES = [copy.deepcopy, torch.clone, lambda kv: kv.to("cpu", copy=True), saved_and_loaded]


def by_mask(rows):
    """A function that selects the rows of a batch that ``rows`` names, by a boolean mask."""
    return lambda x: x[torch.tensor([i in rows for i in range(x.shape[0])])]


SELECTIONS = {
    "index_select": lambda rows: lambda x: x.index_select(0, torch.tensor(rows)),
    "index": lambda rows: lambda x: x[torch.tensor(rows)],
    "boolean": by_mask,
    "repeat": lambda rows: lambda x: x.repeat_interleave(1 if x.shape[0] > LARGEST_BATCH // 2 else 2, 0),
}


def random_mask(kind, batch, heads, queries, tokens, seed):
    """A causal mask [B, 1 or heads, queries, tokens] with random holes; None where none is asked for."""
    if kind == "none":
        return None
    shape = (batch, heads if kind == "by head" else 1, queries, tokens)
    holes = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries) & ~holes
    return torch.where(mask, 0.25, float("-inf")) if kind == "additive" else mask


def by_groups(dense, sparsity, window, tokens, code, strategy, queries):
    """A cache in two groups of KV heads. They are alike, so it is what one without groups is."""
    heads, length = dense.shape[1], dense.shape[2]
    form = Format.of(dense.shape[3], sparsity, window, "rows", code, strategy)
    groups = HeadGroups.of([range(0, heads, 2), range(1, heads, 2)], [form, form])
    written, capacity = (length, grown_capacity(length)) if tokens is None else (tokens, length)
    buffers = ops.compress(dense, torch.tensor([written]), groups.encode(), capacity, queries)
    return CompressedKV.from_buffers(groups, buffers, length, tokens is None)


class Caches(RuleBasedStateMachine):
    """Growing and static caches under the custom ops, without a compiler."""

    caches = Bundle("caches")

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Live] = []

    def start(self, query, key, value, room):
        """K and V of a prompt, compressed."""
        shape, tokens = self.shape, None if room is None else key.shape[2]
        key, value = (x if room is None else F.pad(x, (0, 0, 0, room - tokens)) for x in (key, value))
        make = by_groups if self.grouped else CompressedKV.from_dense
        return [
            make(x, sparsity, shape.window, tokens, code, strategy, queries)
            for x, sparsity, code, strategy, queries in (
                (key, shape.key_sparsity, shape.key_code, shape.key_strategy, query),
                (value, shape.value_sparsity, shape.value_code, shape.value_strategy, None),
            )
        ]

    def step(self, query, key, value, past_key, past_value, position, mask, length=None):
        """More tokens, at ``position`` where the cache is static: (attention, K, V)."""
        scale, count = query.shape[3] ** -0.5, query.shape[2]
        if position is None:
            past_key.prepare(count)
            past_value.prepare(count)
        caches = past_key.buffers, past_value.buffers, past_key.format.encode(), past_value.format.encode()
        attended = ops.decode_attention(query, key, value, *caches, position, mask, None, scale, 0.0, length)
        if position is None:
            past_key, past_value = past_key.extended(count), past_value.extended(count)
        return attended, past_key, past_value

    def new_tokens(self, batch, tokens, seed):
        """Query, K and V."""
        shape = self.shape
        sizes = [
            (shape.heads * shape.group, shape.key_dim),
            (shape.heads, shape.key_dim),
            (shape.heads, shape.value_dim),
        ]
        return [randn(batch, h, tokens, d, seed=seed + i, dtype=shape.dtype) for i, (h, d) in enumerate(sizes)]

    def mask(self, kind, batch, queries, tokens, room, seed):
        mask = random_mask(kind, batch, self.shape.heads * self.shape.group, queries, tokens, seed)
        if mask is None:
            return None
        mask = mask.to(self.shape.dtype) if kind == "additive" else mask
        return mask if room is None else F.pad(mask, (0, room - tokens), value=False)

    def attention(self, query, mask, at):
        """The weights [B, H, n] with which a token attends to K as it sees it."""

        def of_token(keys):
            i, group = keys.shape[2] - at - 1, self.shape.group
            row = None if mask is None else mask[:, :, i : i + 1, : keys.shape[2]]
            return reference_weights(query[:, :, i : i + 1], keys, row).unflatten(1, (-1, group)).sum((2, 3))

        return of_token

    def add(self, live: Live) -> Live:
        self.live.append(live)
        return live

    @initialize(shape=shapes, grouped=st.booleans())
    def choose(self, shape, grouped):
        self.shape, self.grouped = shape, grouped and shape.heads > 1

    @rule(target=caches, batch=st.integers(1, 3), tokens=lengths, spare=st.none() | st.integers(0, 40), seed=seeds)
    def prefill(self, batch, tokens, spare, seed):
        query, *new = self.new_tokens(batch, tokens, seed)
        room = None if spare is None else tokens + spare
        return self.add(Live.filled(self.shape, *self.start(query, *new, room), new, query, room))

    @rule(live=caches, count=query_counts, back=rewinds, kind=mask_kinds, seed=seeds)
    def decode(self, live, count, back, kind, seed):
        """Steps of one or several tokens; what was rejected before is overwritten."""
        at = max(live.tokens - back, 0)
        position = None
        if live.room is not None:
            count = min(count, live.room)
            at = min(at, live.room - count)
            position = torch.tensor([at])
        elif back:
            live.crop(at)
        query, *new = self.new_tokens(live.batch, count, seed)
        mask = self.mask(kind, live.batch, count, at + count, live.room, seed)
        attended, *tensors = self.step(query, *new, *live.latest.tensors, position, mask)
        rows, seen = live.write(new, query, at, self.attention(query, mask, at), tensors[1])
        live.extend(*tensors, rows)
        for i, (keys, values) in enumerate(seen):
            row = None if mask is None else mask[:, :, i : i + 1, : keys.shape[2]]
            expected = reference_attention(query[:, :, i : i + 1], keys, values, 0, 0, 1, row)
            tolerance = TOLERANCE[query.dtype]
            torch.testing.assert_close(attended[:, :, i : i + 1], expected, rtol=tolerance, atol=tolerance)

    @rule(live=caches, count=query_counts, place=st.sampled_from(list(MISPLACED)), seed=seeds)
    def write_out_of_place(self, live, count, place, seed):
        """Refused, and the cache is as it was: the invariant looks."""
        if live.room is None:  # a growing cache is never given a position
            return
        count = min(count, live.room)
        position = torch.tensor([MISPLACED[place](live, count)])
        query, *new = self.new_tokens(live.batch, count, seed)
        with pytest.raises(RuntimeError, match="outside a compressed KV cache, or behind a gap"):
            self.step(query, *new, *live.latest.tensors, position, None, live.room)

    @rule(target=caches, live=caches, tokens=st.integers(1, 40), seed=seeds)
    def recompress(self, live, tokens, seed):
        """More tokens by way of dense tensors, as a chunk of a prompt comes in."""
        query, *new = self.new_tokens(live.batch, tokens, seed)
        rows = [torch.cat(both, 2) for both in zip(live.dense(live.latest.rows), new, strict=True)]
        room = None if live.room is None else live.room + tokens
        return self.add(Live.filled(self.shape, *self.start(query, *rows, room), rows, query, room))

    @rule(target=caches, live=caches, how=st.sampled_from(COPIES))
    def branch(self, live, how):
        packed = [packed.mapped(torch.clone) for packed in live.packed]
        return self.add(live.other(*map(how, live.latest.tensors), live.latest.rows, packed))

    @rule(target=caches, live=caches, how=st.sampled_from(list(SELECTIONS)), picks=picks)
    def select(self, live, how, picks):
        change = SELECTIONS[how]([pick % live.batch for pick in picks])
        packed = [packed.mapped(change) for packed in live.packed]
        return self.add(live.other(*map(change, live.latest.tensors), list(map(change, live.latest.rows)), packed))

    @rule(target=caches, live=caches, other=caches)
    def join(self, live, other):
        other = other if live.progress == other.progress else live
        if live.batch + other.batch > LARGEST_BATCH:
            return live
        parts = [x.tensors for x in (live.latest, other.latest)]
        key, value = (torch.cat(both) for both in zip(*parts, strict=True))
        rows = [torch.cat(both) for both in zip(live.latest.rows, other.latest.rows, strict=True)]
        packed = [a.joined(b, live.tokens) for a, b in zip(live.packed, other.packed, strict=True)]
        return self.add(live.other(key, value, rows, packed))

    @rule(live=caches, which=st.integers(0, 4))
    def go_back(self, live, which):
        """To an older handle, which is refused where the cache went on from it."""
        handle = live.handles[which % len(live.handles)]
        if handle.continuable:
            live.use(handle)
            return
        for tensor in handle.tensors:
            with pytest.raises(StaleCacheError):
                tensor.prepare(1)

    @rule(live=caches)
    def reset(self, live):
        if live.latest.newest:
            for tensor in live.latest.tensors:
                tensor.zero_()
            live.reset()
        else:
            with pytest.raises(CompressedWriteError):
                live.latest.key.zero_()

    @precondition(lambda self: self.live)
    @invariant()
    def caches_hold_what_plain_rows_hold(self):
        for live in self.live:
            live.check()


@pytest.mark.parametrize("shard", range(SHARDS))
def test_caches(shard):
    examples = sharded(settings().max_examples)
    run_state_machine_as_test(Caches, settings=settings(max_examples=examples, stateful_step_count=20))


def test_values_that_rank_by_attention_over_coded_keys():
    """Channels whose tokens rank so near to each other that a key rounded to bfloat16, or not, decides."""
    caches, codes = Caches(), {"key_code": "int8", "value_code": "none"}
    strategies = {"key_strategy": "magnitude", "value_strategy": "channel-output-aware"}
    sizes = {"heads": 1, "group": 5, "key_dim": 8, "value_dim": 8, "dtype": torch.bfloat16, "window": 3}
    caches.choose(Shape(**sizes, key_sparsity=0.0, value_sparsity=0.9, **codes, **strategies), grouped=False)
    live = caches.prefill(batch=1, seed=2, spare=None, tokens=35)
    caches.decode(live, count=5, back=3, kind="none", seed=0)
    caches.caches_hold_what_plain_rows_hold()
