"""Values that are pruned by channel, in blocks of 32 tokens: the ops, models, and what users do with such caches."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cases import (
    NAN,
    Cache,
    Case,
    TokenByToken,
    assert_close,
    assert_same_rows,
    attention,
    compressed,
    decompressed,
    make_mask,
    make_sinks,
    query_counts,
    randn,
    seeds,
)
from channels import Blocks, summed_over_heads
from compilers import without_compiler
from models import BufferModel, TokensFirstModel, TupleModel, hf_model, prompt, pruned_steps, run_steps
from mustafar_compile import CompressedKV, SavedCacheError, explain
from mustafar_compile.integrations import teacher_forced
from mustafar_compile.lowering import ops
from mustafar_compile.lowering.buffers import CACHE_DTYPES
from mustafar_compile.lowering.format import CODES, Format
from mustafar_compile.lowering.layout import FormatError
from nightly import at_night
from ranked import Layer as RankedLayer
from ranked import ranked_generation
from reference import reference_weights
from test_portable_ops import HOST_READS, traced_targets

WINDOW, NEW_TOKENS, SPARSITY = 4, 40, 0.5
BATCH, HEADS, GROUP, KEY_DIM, VALUE_DIM = 2, 2, 2, 16, 8
STRATEGIES = ("channel-magnitude", "channel-output-aware")
WINDOWS = (1, 4, 20, 32, 40)


def value_cache(dense, tokens, strategy, window, capacity, sparsity=0.5, code="none", weights=None):
    """A compressed cache of values."""
    format = Format.of(dense.shape[3], sparsity, window, "rows", code, strategy)
    written = torch.tensor([tokens])
    return Cache(ops.compress(dense, written, format.encode(), capacity, attention=weights), format)


class Layer:
    """K and V of a layer beside their oracles."""

    def __init__(self, strategy, window, seed, dtype=torch.float32, code="none", prompt=0, room=600, device="cpu"):
        self.strategy, self.window, self.seed, self.dtype, self.code = strategy, window, seed, dtype, code
        self.tokens = 0
        query, *rows = self.new(max(prompt, 1))
        self.keys, mask = TokenByToken(8, window), torch.ones(prompt, prompt, dtype=torch.bool).tril()
        self.values = Blocks.of_prompt(strategy, 16, code, window, rows[1][:, :, :0])
        weights = ops.latest_weights(query, rows[0], None, None, True, 0.3) if prompt else None
        caches = (
            compressed(rows[0], prompt, 8, window, room, order="rows"),
            value_cache(rows[1], prompt, strategy, window, room, code=code, weights=weights),
        )
        self.device, self.caches = device, [cache.to(device) for cache in caches]
        if prompt:
            self.keys.write(rows[0], 0)
            attended = summed_over_heads(reference_weights(query, rows[0], mask, 0.3), HEADS)
            self.values = Blocks.of_prompt(strategy, 16, code, window, rows[1], attended, self.actual(prompt))
            self.tokens = prompt

    def new(self, count):
        """Query, K and V of more tokens."""
        self.seed += 3
        sizes = (HEADS * GROUP, KEY_DIM), (HEADS, KEY_DIM), (HEADS, VALUE_DIM)
        return [randn(BATCH, h, count, d, seed=self.seed + i, dtype=self.dtype) for i, (h, d) in enumerate(sizes)]

    def actual(self, tokens):
        return decompressed(self.caches[1], tokens).cpu()

    def step(self, count, back=0, mask=None, sinks=None):
        """More tokens, ``back`` behind the last: attention and the cache of V are those of the oracle."""
        at = max(self.tokens - back, 0)
        query, *new = self.new(count)
        given_mask = None if mask is None else make_mask("bool", (BATCH, 1, count, at + count), mask).tril(at)
        given = [x if x is None else x.to(self.device) for x in (torch.tensor([at]), given_mask, sinks)]
        out = attention(*(x.to(self.device) for x in (query, *new)), *self.caches, *given, 0.3).cpu()
        self.tokens = at + count
        for i in range(count):
            q, k, v = (x[:, :, i : i + 1] for x in (query, *new))
            (keys,) = self.keys.write(k, at + i)
            row = None if given_mask is None else given_mask[:, :, i : i + 1, : at + i + 1]
            weights = summed_over_heads(reference_weights(q, keys, row, 0.3, sinks=sinks), HEADS).squeeze(2)
            values = self.values.write(v, at + i, weights, self.actual(self.tokens))
            case = Case(q, keys, values, 0.0, 0.0, scale=0.3, mask=row, sinks=sinks)
            assert_close(out[:, :, i : i + 1], case, rounds_weights=True)
        self.check()

    def check(self):
        assert self.caches[1].counts.tolist() == BATCH * [[self.tokens, self.values.held, 0]]
        assert_same_rows(self.actual(self.tokens), self.values.dense(self.values.rows), self.code)


moves = st.lists(st.tuples(query_counts, st.sampled_from([0, 0, 0, 1, 7, 16, 17, 40, 90])), min_size=4, max_size=10)


@given(
    moves, st.sampled_from(STRATEGIES), st.sampled_from(WINDOWS), st.sampled_from([0, 0, 20, 70, 101]), seeds,
    st.sampled_from(CACHE_DTYPES), st.sampled_from(CODES),
)  # fmt: skip
@example([(16, 0)] * 4 + [(1, 40), (16, 0), (16, 0)], "channel-output-aware", 1, 0, 0, torch.float32, "none")
@example([(16, 0)] * 6 + [(16, 78)] + [(16, 0)] * 4, "channel-magnitude", 1, 0, 14, torch.float32, "none")
@example([(16, 0)] * 14 + [(16, 80), (16, 0)], "channel-magnitude", 40, 0, 2, torch.float32, "none")
@example([(1, 0)] * 34, "channel-output-aware", 32, 33, 1, torch.bfloat16, "none")
@example([(16, 0)] * 9, "channel-output-aware", 32, 0, 1, torch.float16, "int4")
def test_steps_and_rewinds_equal_tokens_one_by_one(moves, strategy, window, prompt, seed, dtype, code):
    layer = Layer(strategy, window, seed, dtype, code, prompt)
    layer.check()
    for count, back in moves:
        layer.step(count, back)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_and_sinks(strategy, device):
    layer = Layer(strategy, 4, 3, prompt=40, device=device)
    for i, count in enumerate([16, 1, 11, 16]):
        layer.step(count, mask=i, sinks=make_sinks(HEADS * GROUP, i))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_of_the_batch_go_their_own_ways(strategy):
    """Each as in a cache of its own, with blocks that leave at different steps."""
    whole = Layer(strategy, 4, 7, prompt=60)
    parts = [[cache.changed(lambda x, row=row: x[row : row + 1].clone()) for cache in whole.caches] for row in (0, 1)]
    places = torch.tensor([60, 44])
    for count in (16, 5, 16, 16):
        query, *new = whole.new(count)
        out = attention(query, *new, *whole.caches, places, scale=0.3)
        for row, caches in enumerate(parts):
            one = [x[row : row + 1] for x in (query, *new)]
            expected = attention(*one, *caches, places[row : row + 1], scale=0.3)
            torch.testing.assert_close(out[row : row + 1], expected)
            for mine, other in zip(whole.caches, caches, strict=True):
                assert torch.equal(mine.counts[row], other.counts[0])
                assert torch.equal(decompressed(mine, 120)[row], decompressed(other, 120)[0])
        places = places + count


@pytest.mark.parametrize("queries", [5, 40])
@pytest.mark.parametrize("kind", ["causal", "bool", "bias", "by head", "a part"])
def test_what_the_last_tokens_of_a_prompt_attend_to(kind, queries):
    query, keys = randn(2, 4, queries, 16, seed=1), randn(2, 2, 50, 16, seed=2)
    columns, heads = 44 if kind == "a part" else 50, 4 if kind == "by head" else 1
    mask = make_mask("bias" if kind == "bias" else "bool", (2, heads, queries, columns), 3)
    sinks, seen = make_sinks(4, 0), keys[:, :, :columns]
    if kind == "causal":
        expected = reference_weights(query, keys, torch.ones(queries, 50, dtype=torch.bool).tril(), 0.3, sinks=sinks)
        mask = None
    else:
        expected = reference_weights(query, seen, mask, 0.3, softcap=2.0, sinks=sinks)
    actual = ops.latest_weights(query, keys, mask, sinks, kind == "causal", 0.3, 0.0 if kind == "causal" else 2.0)
    assert actual.dtype == torch.float32
    before = max(32 - queries, 0)
    assert actual[:, :, :before].count_nonzero() == 0
    torch.testing.assert_close(actual[:, :, before:], summed_over_heads(expected, 2)[:, :, -32:])


def test_where_every_kept_element_stands():
    dense = randn(2, 1, 70, 24, seed=4, dtype=torch.bfloat16)
    cache = value_cache(dense, 70, "channel-magnitude", 5, 70, sparsity=0.7)
    assert cache.values.shape == (2, 1, 3, 24, 16)
    for b, block, channel in itertools.product(range(2), range(2), range(24)):
        x = dense[b, 0, 32 * block : 32 * block + 32, channel]
        tokens = sorted(x.abs().sort(descending=True, stable=True).indices[:16].tolist())
        assert cache.values[b, 0, block, channel].tolist() == x[tokens].tolist()
        word = sum(1 << 8 * (t % 4) + t // 4 for t in tokens)
        assert cache.bitmap[b, 0, block, channel].item() % 2**32 == word
    assert cache.counts.tolist() == [[70, 18, 0]] * 2, "5 and 16 and 31 tokens are in the ring"


def test_formats_by_channel():
    format = Format.of(128, 0.5, 32, "rows", strategy="channel-output-aware")
    assert format.encode() == "head_dim=128,kept=16,window=32,strategy=channel-output-aware"
    assert Format.decode(format.encode()) is format
    assert [buffer.name for buffer in format.buffers] == ["values", "bitmap", "window", "attention", "counts"]
    assert format.token_bytes(2) == 144, "as by token"
    assert format.described == "16/32 by channel-output-aware"
    assert format.ordered("rows") is format
    assert Format.of(128, 0.2, 32, "rows", strategy="channel-magnitude") is Format.of(128, 0.0, 32, "rows")
    assert [format.left(n) for n in (0, 32, 63, 64, 95, 96)] == [-32, 0, 0, 32, 32, 64]
    for wrong in ({"kept": 40}, {"kept": 32}, {"order": "rows"}):
        with pytest.raises(FormatError, match="cannot be; accepted"):
            dataclasses.replace(format, **wrong)


@pytest.mark.parametrize("wrong", ["keys by channel", "another window"])
def test_caches_that_a_step_does_not_take(wrong):
    layer = Layer("channel-magnitude", 4, 0, prompt=8)
    keys, values = layer.caches
    if wrong == "keys by channel":
        keys = values
    else:
        keys = compressed(randn(BATCH, HEADS, 8, KEY_DIM, seed=0), 8, 8, 5, 20, order="rows")
    with pytest.raises(ValueError, match="accepted are keys that are pruned by token, and values by channel with the"):
        attention(*layer.new(1), keys, values)


def test_nothing_waits_for_the_device():
    layer = Layer("channel-output-aware", 4, 0, prompt=40)
    texts = [cache.format.encode() for cache in layer.caches]

    def step(query, key, value, keys, values, position):
        return ops.decode_attention(query, key, value, keys, values, *texts, position, None, None, 0.3)

    def prompt(query, key, value, tokens):
        weights = ops.latest_weights(query, key, None, None, True, 0.3)
        return ops.decompress(ops.compress(value, tokens, texts[1], 64, attention=weights), texts[1], 50)

    targets = traced_targets(step, *layer.new(3), *map(list, layer.caches), torch.tensor([40]))
    targets |= traced_targets(prompt, *layer.new(50), torch.tensor([50]))
    assert len(targets) > 20
    assert not [target for target in targets if any(read in target for read in HOST_READS)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bad_value_is_kept_and_harms_what_attends_to_it_alone(strategy):
    """In its own channel; and what was never written does no harm."""
    layer = Layer(strategy, 4, 5)
    for buffer in layer.caches[1][:-1]:
        buffer.fill_(NAN if buffer.is_floating_point() and buffer.dim() == 5 else 0)
    layer.caches[1].window.fill_(NAN)
    layer.step(16)
    layer.step(16)
    query, key, value = layer.new(8)
    value[0, 1, 2, 3] = NAN
    out = attention(query, key, value, *layer.caches, torch.tensor([32]), scale=0.3)
    bad = torch.zeros_like(out, dtype=torch.bool)
    bad[0, GROUP:, 2:, 3] = True
    assert torch.equal(out.isnan(), bad)
    for at in (40, 56):
        out = attention(*layer.new(16), *layer.caches, torch.tensor([at]), scale=0.3)
    assert torch.equal(out.isnan().any(2), bad.any(2)), "of a block that left the window, too"


def test_saved_caches_are_checked_block_by_block():
    kv = CompressedKV.from_dense(randn(1, 2, 70, 16, seed=6), 0.5, 4, strategy="channel-output-aware")
    assert repr(kv).endswith("16 of 32 kept by channel-output-aware)")
    restore, (text, buffers, *rest) = kv.__reduce_ex__(4)
    assert torch.equal(restore(text, buffers, *rest).dense(), kv.dense())
    buffers[kv.format.place("bitmap")][0, 0, 1, 15] ^= 1
    with pytest.raises(SavedCacheError, match="the bitmap of some row does not keep 16 of 32"):
        restore(text, buffers, *rest)
    buffers[kv.format.place("bitmap")][0, 0, 1, 15] ^= 1
    buffers[kv.format.place("bitmap")][0, 0, 2] = -1  # where nothing is packed yet
    assert torch.equal(restore(text, buffers, *rest).dense(), kv.dense())


# ------------------------------------------------------------------------------------------------------------- models


def options(keys, values, **others):
    sparsities = {"key_sparsity": SPARSITY, "value_sparsity": SPARSITY}
    return {"key_strategy": keys, "value_strategy": values, "window": WINDOW, **sparsities, **others}


def generate(model, inputs, **how):
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **how)


WAYS = [
    ("magnitude", "channel-magnitude", "dynamic", "none"),
    ("output-aware", "channel-output-aware", "static", "none"),
    *at_night(
        [("think", "channel-output-aware", "dynamic", "int8"), ("magnitude", "channel-magnitude", "static", "int4")]
    ),
]


@pytest.mark.parametrize(("keys", "values", "cache", "code"), WAYS)
def test_tokens_are_those_of_the_oracle(keys, values, cache, code):
    model, inputs = hf_model("llama", num_hidden_layers=1), prompt(padded=True, length=40)
    with ranked_generation((keys, values), SPARSITY, WINDOW, ("none", code)) as layers:
        tokens = generate(model, inputs).sequences
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options=options(keys, values, value_code=code))
        result = generate(model, inputs, cache_implementation=cache)
    assert torch.equal(result.sequences, tokens)
    assert [entry.kernels for entry in report.matched] == ["PyTorch"]
    assert not report.notices
    layer, rows = result.past_key_values.layers[0], layers[0].stored(*layers[0].latest)
    assert (layer.keys.format.strategy, layer.values.format.strategy) == (keys, values)
    assert layers[0].blocks.packed.shape[2] == 64
    for kv, x in zip((layer.keys, layer.values), rows, strict=True):
        dense = kv.dense()[:, :, : x.shape[2]]
        assert torch.equal(dense != 0, x != 0)
        torch.testing.assert_close(dense, x)


@pytest.mark.nightly  # rewinding is tested step by step as well
def test_drafts_that_are_taken_back_leave_no_trace():
    """A block leaves the window for a draft, and again for what comes in its place."""
    model, inputs = hf_model("llama", num_hidden_layers=1), prompt(length=34)
    tokens = torch.randint(100, (2, 6), generator=torch.Generator().manual_seed(0))
    logits = []
    with torch.no_grad(), without_compiler():
        step = torch.compile(model, backend="mustafar", options=options("magnitude", "channel-output-aware"))
        for drafts in (0, 3):
            past = step(**inputs).past_key_values
            if drafts:
                past = step(tokens[:, :drafts].flip(1), past_key_values=past).past_key_values
                past.crop(-drafts)
            logits.append(torch.cat([step(t, past_key_values=past).logits for t in tokens.split(1, dim=1)], dim=1))
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("values", STRATEGIES)
def test_a_cache_of_the_caller_is_compressed_without_its_queries(values):
    """Then a notice says so; steps that are compiled are seen."""
    model = BufferModel(slots=80)
    inputs = [randn(2, count, 32, seed=count + i) for i, count in enumerate([40, *[1] * 30])]
    layer = RankedLayer(("magnitude", values), SPARSITY, WINDOW, ("none", "none"))

    def attend(q, k, v):
        return layer.attend(q, k, v, None, q.shape[3] ** -0.5)

    q, k, v = (t.transpose(1, 2) for t in model.project(inputs[0]))
    with torch.no_grad():
        layer.attend(q, k, v, None, 1.0)
        layer.blocks = Blocks.of_prompt(values, 16, "none", WINDOW, v)
        outputs = pruned_steps(model, inputs, attend)
        with without_compiler(), explain() as report:
            step = torch.compile(model.step, backend="mustafar", options=options("magnitude", values))
            results = run_steps(model, inputs, step)
    for result, output in zip(results, outputs, strict=True):
        torch.testing.assert_close(result, output, rtol=1e-4, atol=1e-5)
    notices = [notice for notice in report.notices if "without their queries, which were not seen" in notice]
    assert len(notices) == (values == "channel-output-aware")


@pytest.mark.parametrize("kind", [TupleModel, *at_night([TokensFirstModel])])
def test_own_loops(kind):
    model = kind()
    inputs = [randn(2, count, 32, seed=count + i) for i, count in enumerate([50, *[1] * 20])]
    layer = RankedLayer(("output-aware", "channel-output-aware"), SPARSITY, WINDOW, ("none", "none"))

    def attend(q, k, v, mask=None):
        return layer.attend(q, k, v, mask, q.shape[3] ** -0.5)

    with torch.no_grad():
        attend(*(t.transpose(1, 2) for t in model.project(inputs[0])), torch.ones(50, 50, dtype=torch.bool).tril())
        outputs = pruned_steps(model, inputs, attend)
        with without_compiler():
            step = torch.compile(
                model.step, backend="mustafar", options=options("output-aware", "channel-output-aware")
            )
            results = run_steps(model, inputs, step)
    assert layer.blocks.packed.shape[2] == 64, "a block left the window"
    for result, output in zip(results, outputs, strict=True):
        torch.testing.assert_close(result, output, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_a_prompt_in_chunks():
    """Blocks that are pruned stay as they are."""
    model, ids = hf_model("llama", num_hidden_layers=1), prompt(length=90)["input_ids"]
    with torch.no_grad(), without_compiler():
        call = torch.compile(model, backend="mustafar", options=options("magnitude", "channel-magnitude"))
        whole = call(ids).past_key_values.layers[0].values
        first = call(ids[:, :50]).past_key_values
        both = call(ids[:, 50:], past_key_values=first).past_key_values.layers[0].values
    assert torch.equal(both.dense() != 0, whole.dense() != 0)
    torch.testing.assert_close(both.dense(), whole.dense())


@pytest.mark.nightly
@pytest.mark.parametrize("values", STRATEGIES)
def test_a_compiled_model(values):
    """All the way, with Inductor."""
    model, inputs = hf_model("llama", num_hidden_layers=1), prompt(padded=True, length=40)
    with ranked_generation(("magnitude", values), SPARSITY, WINDOW) as layers:
        tokens = generate(model, inputs).sequences
    torch._dynamo.reset()
    with explain() as report:
        model.compile(backend="mustafar", options=options("magnitude", values))
        result = generate(model, inputs)
    assert torch.equal(result.sequences, tokens)
    assert [entry.kernels for entry in report.matched] == ["PyTorch"]
    kv, x = result.past_key_values.layers[0].values, layers[0].blocks.dense(layers[0].blocks.rows)
    assert torch.equal(kv.dense() != 0, x != 0)


@pytest.mark.parametrize("values", STRATEGIES)
@pytest.mark.parametrize("window", [4, 40])
def test_a_text_at_once_is_what_comes_token_by_token(values, window):
    layer = Layer(values, window, 8)
    query, key, value = layer.new(120)
    formats = [cache.format for cache in layer.caches]
    keys = teacher_forced.as_stored(key, formats[0])
    seen = teacher_forced.attention_to_blocks(query, key, keys, 0.3, formats[1])
    stored = keys, teacher_forced.as_stored(value, formats[1], attention=seen)
    actual = teacher_forced.attention(query, key, value, stored, 0.3, window, formats[1])
    steps = zip(*(x.split(1, 2) for x in (query, key, value)), strict=True)
    expected = [attention(*step, *layer.caches, torch.tensor([i]), scale=0.3) for i, step in enumerate(steps)]
    torch.testing.assert_close(actual, torch.cat(expected, 2), rtol=1e-4, atol=1e-5)
