"""Settings that differ from KV head to KV head: what is accepted, which head gets what, and what becomes of caches."""

from __future__ import annotations

import copy

import pytest
import torch

import mustafar_compile
from cases import randn
from compilers import without_compiler
from models import BufferModel, SliceModel, TokensFirstModel, TupleModel, hf_model, prompt, pruned_steps, run_steps
from mustafar_compile import CompressedKV, Settings, UnknownHeadError, cache_stats, explain
from mustafar_compile.cache.tensor import restored
from mustafar_compile.errors import SavedCacheError
from mustafar_compile.integrations.teacher_forced import teacher_forced
from mustafar_compile.lowering import head_groups, ops
from mustafar_compile.lowering.format import Format
from mustafar_compile.lowering.head_groups import HeadGroups
from mustafar_compile.lowering.layout import FormatError
from mustafar_compile.planning.footprint import measure
from mustafar_compile.planning.memory import compressed_plan
from mustafar_compile.settings import merged_options, read_options
from nightly import at_night
from ranked import Heads, Layer, generation_by
from reference import kept_count, pruned_cache, reference_attention
from test_fuzz_cache import saved_and_loaded

pytestmark = pytest.mark.usefixtures("no_grad")
WINDOW, NEW_TOKENS = 4, 40
FOUR_HEADS = {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4}
BY_HEAD = {0: {0: 0.25, "default": 0.5}, "default": 0.5}


# What is accepted


@pytest.mark.parametrize("given", [BY_HEAD, {"0": {"0": 0.25, "default": 0.5}, "default": 0.5}])
def test_a_mapping_has_a_value_for_each_head(given):
    settings = Settings(key_sparsity=given, value_code=[["none", "int8"], "int4"])
    assert settings == Settings(key_sparsity=BY_HEAD, value_code={0: {1: "int8", 0: "none"}, 1: "int4"})
    (k0, v0), (k1, v1) = settings.ways(0, 2)
    assert (k0.sparsity, k1.sparsity, v0.code, v1.code) == (0.25, 0.5, "none", "int8")
    assert settings.ways(1, 3) == 3 * [((0.5, "none", "magnitude"), (0.5, "int4", "magnitude"))]
    assert (settings.by_head(), Settings(key_sparsity={0: 0.5}).by_head()) == (["key_sparsity", "value_code"], [])
    options, _ = merged_options("prepare", None, None, {"key_sparsity": BY_HEAD})
    assert options == {"key_sparsity": {"0": {"0": 0.25, "default": 0.5}, "default": 0.5}}, "JSON takes it"
    assert read_options(None, options)[0].key_sparsity == settings.key_sparsity


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {0: {}},
            r"key_sparsity\[0\]=\{\} is not accepted; by KV head it must be a list with an entry for each KV head",
        ),
        ([{"first": 0.5}], r"key_sparsity\[0\]=.* a mapping of KV head numbers from 0 on and \"default\" to values$"),
        ({0: {1: 1.5, 0: 0.5}}, r"key_sparsity\[0\]\[1\]=1.5 is not accepted; it must be a number in"),
        ({"default": [0.5, [0.5]]}, r"key_sparsity\['default'\]\[1\]=\[0.5\] is not accepted; it must be a number"),
    ],
)
def test_what_is_no_setting_by_head(given, words):
    with pytest.raises(ValueError, match=words):
        Settings(key_sparsity=given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([0.5], "0"),
        ([0.5, 0.5, 0.7], "0, 1, 2"),
        ({1: 0.7}, "1"),
        ({2: 0.7, "default": 0.5}, '2 and "default"'),
    ],
)
def test_other_heads_than_the_layer_has(given, named):
    with pytest.raises(UnknownHeadError) as error:
        Settings(value_sparsity={"default": given}).ways(3, 2)
    assert str(error.value) == (
        f"value_sparsity of layer 3 has values for the KV heads {named}, but the layer has 2 KV heads. Accepted is a "
        'value for each of 0 to 1, by its number or by "default", and for no other'
    )


def test_heads_that_are_not_there_end_the_prompt():
    """Before there is a cache."""
    model = hf_model(num_hidden_layers=1)
    model.compile(backend="mustafar", options={"key_code": {0: ["int8", "int8", "none"]}})
    with without_compiler(), pytest.raises(Exception, match="key_code of layer 0 has values for the KV heads 0, 1, 2,"):
        model(**prompt())


# Formats


@pytest.mark.parametrize(
    "text",
    [
        "0.1:head_dim=16,kept=8,window=4;2.3:head_dim=16,kept=16,window=5",
        "0:head_dim=16,kept=8,window=4;2:head_dim=16,kept=16,window=4",
        "0.1:head_dim=16,kept=8,window=4;1:head_dim=16,kept=16,window=4",
        "1.0:head_dim=16,kept=8,window=4;2:head_dim=16,kept=16,window=4",
        "0:head_dim=16,kept=8,window=4;1:head_dim=32,kept=16,window=4",
        "0:head_dim=16,kept=8,window=4;:head_dim=16,kept=16,window=4",
        "0:head_dim=16,kept=8,window=4;1",
        "0:1:head_dim=16,kept=8,window=4",
        "a:head_dim=16,kept=8,window=4",
    ],
)
def test_texts_that_name_no_groups(text):
    with pytest.raises(FormatError):
        head_groups.decode(text)


def groups_of(sparsities: list[float], head_dim: int = 16, code: str = "none") -> HeadGroups:
    """Two or more groups, of the heads with the same sparsity."""
    heads = {x: [i for i, other in enumerate(sparsities) if other == x] for x in sparsities}
    return HeadGroups.of(list(heads.values()), [Format.of(head_dim, x, WINDOW, "rows", code) for x in heads])


def test_a_text_names_groups():
    groups = groups_of([0.5, 0.0, 0.5])
    assert head_groups.decode(groups.encode()) is groups
    assert copy.deepcopy(groups) is groups
    assert groups.described == "8/16 (2 heads) + 16/16 (1 head)"
    assert groups.ordered("blocks").parts[0].order == "blocks"


def test_keys_and_values_come_in_the_same_groups():
    q, k = randn(1, 6, 1, 16, seed=0), randn(1, 3, 1, 16, seed=1)
    forms = [groups_of([0.5, 0.0, 0.5]), groups_of([0.5, 0.5, 0.0]), Format.of(16, 0.5, WINDOW, "rows")]
    caches = [ops.compress(randn(1, 3, 9, 16, seed=2), torch.tensor([9]), form.encode(), 64) for form in forms]
    for mine, other in ((0, 1), (0, 2), (2, 0)):
        pair = caches[mine], caches[other], forms[mine].encode(), forms[other].encode()
        with pytest.raises(ValueError, match=r"accepted are (both in )?the same( groups|$)"):
            ops.decode_attention(q, k, k, *pair, None, None, None, 0.25)


AWARE = [Format.of(16, sparsity, WINDOW, "rows", strategy="output-aware") for sparsity in (0.25, 0.5)]


@pytest.mark.parametrize("count", [1, 3])
def test_an_op_does_what_it_does_for_each_head(count):
    """With all that it may be given, and over the state of a cache that was continued."""
    groups, each = ((0, 2), (1,)), [AWARE[0], AWARE[1], AWARE[0]]
    form = HeadGroups.of(groups, AWARE)
    x, more, q = randn(2, 3, 30, 16, seed=0), randn(2, 3, count, 16, seed=1), randn(2, 6, 30, 16, seed=2)
    first, all_tokens = torch.tensor([20]), torch.tensor([30, 28])
    state = form.state_of(ops.compress(x[:, :, :20], first, form.encode(), 40, q[:, :, :20]))
    whole = [ops.compress(x, all_tokens, form.encode(), 40, q[:, :, 20:], state) for _ in range(2)]
    rest = {
        "position": torch.tensor([30, 27]),
        "mask": torch.rand(2, 6, count, 40, generator=torch.Generator().manual_seed(3)) < 0.8,
        "sinks": randn(6, seed=4),
    }
    rest["mask"][..., 27:] = False  # not every row has these
    new = randn(2, 6, count, 16, seed=5)
    result = ops.decode_attention(
        new, more, more, *whole, form.encode(), form.encode(), **rest, scale=0.25, softcap=5.0
    )
    for head, own in enumerate(each):
        at, of_head = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        before = own.state_of(ops.compress(x[:, of_head, :20], first, own.encode(), 40, q[:, at, :20]))
        alone = [ops.compress(x[:, of_head], all_tokens, own.encode(), 40, q[:, at, 20:], before) for _ in range(2)]
        given = rest | {"mask": rest["mask"][:, at], "sinks": rest["sinks"][at]}
        tokens = new[:, at], more[:, of_head], more[:, of_head]
        expected = ops.decode_attention(*tokens, *alone, own.encode(), own.encode(), **given, scale=0.25, softcap=5.0)
        torch.testing.assert_close(result[:, at], expected)
        group = next(i for i, heads in enumerate(groups) if head in heads)
        place = groups[group].index(head)
        for mine, other in zip(form.split(whole[0])[group], alone[0], strict=True):
            assert torch.equal(mine if mine.dim() == 2 else mine[:, place : place + 1], other)


# What heads get


def way(strategies=("magnitude", "magnitude"), sparsity=0.5, codes=("none", "none")) -> Layer:
    return Layer(strategies, sparsity, WINDOW, codes)


CASES = {
    "two groups": lambda: [way(sparsity=0.0), way(), way(sparsity=0.0), way()],
    "codes and strategies": lambda: [
        way(("output-aware", "magnitude")),
        way(codes=("int8", "none")),
        way(("output-aware", "channel-output-aware")),
        way(("think", "channel-magnitude"), codes=("none", "int4")),
    ],
}  # fmt: skip


def settings_of(ways: list[Layer]) -> dict:
    named = {}
    for i, role in enumerate(("key", "value")):
        named[f"{role}_sparsity"] = [[x.sparsity for x in ways]]
        named[f"{role}_code"] = [[x.codes[i] for x in ways]]
        named[f"{role}_strategy"] = [[x.strategies[i] for x in ways]]
    return {**named, "window": WINDOW}


@pytest.mark.parametrize(
    ("case", "cache"),
    [
        ("two groups", "static"),
        ("codes and strategies", "dynamic"),
        *at_night([("two groups", "dynamic"), ("codes and strategies", "static")]),
    ],
)
def test_tokens_are_those_of_the_oracle(case, cache):
    model, inputs = hf_model(**FOUR_HEADS), prompt(padded=True, length=14)
    how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    with generation_by(lambda: Heads(CASES[case]())) as layers:
        tokens = model.generate(**inputs, **how).sequences
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options=settings_of(CASES[case]()))
        result = model.generate(**inputs, **how, cache_implementation=cache)
    assert torch.equal(result.sequences, tokens)
    assert len(report.matched) == 1
    assert not report.notices
    layer = result.past_key_values.layers[0]
    for kv, x in zip((layer.keys, layer.values), layers[0].stored(*layers[0].latest), strict=True):
        dense = kv.dense()[:, :, : x.shape[2]]
        assert torch.equal(dense != 0, x != 0)
        torch.testing.assert_close(dense, x)


SPARSITIES = [0.0, 0.75, 0.0]


def by_heads(q, k, v, window=WINDOW):
    """Attention over keys and values whose heads are pruned to ``SPARSITIES``."""
    heads = zip(q.chunk(3, 1), k.split(1, 1), v.split(1, 1), SPARSITIES, strict=True)
    return torch.cat([reference_attention(*x, sparsity, sparsity, window) for *x, sparsity in heads], 1)


@pytest.mark.parametrize("kind", [TokensFirstModel, BufferModel, *at_night([TupleModel, SliceModel])])
def test_caches_of_ones_own(kind):
    """Growing ones, of both orders of dimensions, and dense ones of the caller with state beside them."""
    model = kind(heads=6, kv_heads=3)
    steps = 20 if kind in (BufferModel, SliceModel) else 70  # of a growing cache so many that it needs more room
    inputs = [randn(2, count, 32, seed=count + i) for i, count in enumerate([11, *[1] * steps])]
    options = {"key_sparsity": {"default": SPARSITIES}, "value_sparsity": {0: SPARSITIES}, "window": WINDOW}
    with without_compiler(), explain() as report:
        model.forward = model.step
        step = torch.compile(Numbered(model), backend="mustafar", options=options)
        results = run_steps(model, inputs, step.__call__)
    assert not report.missed
    for result, output in zip(results, pruned_steps(model, inputs, by_heads), strict=True):
        torch.testing.assert_close(result, output, rtol=1e-5, atol=1e-5)
    if kind is BufferModel:
        assert cache_stats(model).kept == 2 * ("16/16 (2 heads) + 8/16 (1 head)",)


class Numbered(torch.nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layers = torch.nn.ModuleList([layer])

    def forward(self, *given):
        return self.layers[0](*given)


def test_keys_and_values_of_other_groups_run_dense():
    model, x = TupleModel(), randn(2, 9, 32, seed=0)
    model.forward = model.step
    by_head = {"key_sparsity": [[0.0, 0.5]], "window": WINDOW}
    with without_compiler(), explain() as report:
        (_, (keys, _)), (_, (_, values)) = (
            torch.compile(Numbered(model), backend="mustafar", options=options)(x, None)
            for options in (by_head, {"window": WINDOW})
        )
        step = torch.compile(Numbered(model), backend="mustafar", options={"window": WINDOW})
        out, _ = step(x[:, :1], (keys, values))
    assert [entry.reason for entry in report.missed] == [
        "keys and values are compressed by different groups of KV heads"
    ]
    expected, _ = model.step(x[:, :1], (keys.dense(), values.dense()))
    torch.testing.assert_close(out, expected)


def test_a_text_at_once_is_what_steps_make_of_it():
    model, ids = hf_model(**FOUR_HEADS), prompt(batch=1, length=40)["input_ids"]
    ways = CASES["two groups"]()
    with generation_by(lambda: Heads(ways)):
        from transformers import DynamicCache

        past = DynamicCache(config=model.config)
        expected = torch.cat([model(x, past_key_values=past).logits for x in ids.split(1, dim=1)], dim=1)
    with teacher_forced(model, Settings(**settings_of(ways))):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


# What is said of them


def test_reports_and_plans_count_the_groups():
    model, options = hf_model(**FOUR_HEADS), settings_of(CASES["two groups"]()) | {"value_sparsity": 0.5}
    plan = compressed_plan(measure(model.config, torch.float32), options, 1)
    with without_compiler(), explain() as report:
        mustafar_compile.prepare(model, **options)
        past = model(**prompt(length=30)).past_key_values
    (entry,) = report.matched
    assert entry.kept == ("16/16 (2 heads) + 8/16 (2 heads)", "8/16")
    assert entry.kernels == "PyTorch"
    stats = cache_stats(past)
    assert stats.kept == ("16/16 (2 heads) + 8/16 (2 heads)", "8/16")
    assert stats.stored_bytes == entry.stored_bytes == plan.parts(2, 30)["prompt"]["cache"]
    assert "16 of 16 kept, 8 of 16 kept" in repr(past.layers[0].keys)


# What becomes of caches; see also test_fuzz_cache


def grouped(rows, sparsities, tokens=None):
    """A cache with these exact rows [B, H, n, D], growing where ``tokens`` is None."""
    form, length = groups_of(sparsities, rows.shape[3]), rows.shape[2]
    written = torch.tensor([length if tokens is None else tokens])
    buffers = ops.compress(rows, written, form.encode(), length)
    return CompressedKV.from_buffers(form, buffers, length, tokens is None)


def test_a_cache_holds_what_its_heads_would():
    x = randn(3, 3, 50, 24, seed=0)
    kv, expected = (
        grouped(x, SPARSITIES),
        torch.cat(
            [pruned_cache(head, sparsity, WINDOW) for head, sparsity in zip(x.split(1, 1), SPARSITIES, strict=True)], 1
        ),
    )
    assert [kept_count(24, sparsity) for sparsity in SPARSITIES] == [24, 8, 24]
    assert torch.equal(kv.dense(), expected)
    assert torch.equal(
        kv[:, :, :47].dense(),
        torch.cat([expected[:, :, :43], x[:, :, 43:47]], 2)[:, :, :47].where(
            torch.arange(47).view(-1, 1) >= 43, expected[:, :, :47]
        ),
    )
    assert torch.equal(saved_and_loaded(kv)[[2, 0]].dense(), expected[[2, 0]])
    assert torch.equal(kv.ordered("blocks").ordered("rows").dense(), expected)


def buffer_of(part: int, name: str, change):
    """Change a buffer of a group."""

    def craft(form, buffers):
        parts = form.split(buffers)
        place = form.parts[part].place(name)
        parts[part][place] = change(parts[part][place])
        return [x for own in parts for x in own]

    return craft


CRAFTED = {
    "a bit too many": buffer_of(1, "bitmap", lambda x: x | 0xFFFF),
    "tokens of one group": buffer_of(0, "counts", lambda x: torch.tensor([[49, 30, 0]])),
    "room of one group": buffer_of(0, "values", lambda x: x[:, :, :1]),
    "a batch of one group": buffer_of(1, "counts", lambda x: x.expand(2, 3)),
    "a head too many": buffer_of(1, "window", lambda x: x.repeat(1, 2, 1, 1)),
    "a buffer too few": lambda form, buffers: buffers[:-1],
    "groups that stand in each other's places": lambda form, buffers: [
        x for own in form.split(buffers)[::-1] for x in own
    ],
}


@pytest.mark.parametrize("craft", CRAFTED.values(), ids=CRAFTED)
@pytest.mark.parametrize("grows", [True, False])
def test_crafted_caches_are_refused(craft, grows):
    kv = grouped(randn(1, 3, 50, 16, seed=0), SPARSITIES, None if grows else 50)
    good = [buffer.clone() for buffer in kv.buffers]
    rest = 50, grows, 2
    assert torch.equal(restored(kv.format.encode(), good, *rest).dense(), kv.dense())
    with pytest.raises(SavedCacheError):
        restored(kv.format.encode(), craft(kv.format, good), *rest)
