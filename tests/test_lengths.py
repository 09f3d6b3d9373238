"""Decode steps whose lengths change from step to step: one recording serves many, and what it computes stays right."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import explain
from mustafar_compile.calling import recordable
from mustafar_compile.calling.recordable import rounded
from mustafar_compile.patterns.graph.symbols import expression
from mustafar_compile.patterns.rewriting.free_of_lengths import FreeOfLengths
from mustafar_compile.patterns.rewriting.rounded_sizes import LengthError
from nightly import at_night, mostly_at_night
from reference import pruned_generation
from stand_in_graphs import record_on_a_cpu

WINDOW = 4
AS_GRAPHS = "decode steps run as CUDA graphs"
SLOTS, HEADS, DIM = 64, 2, 16


@pytest.fixture(autouse=True)
def recorded(monkeypatch, no_grad):
    """A list with an item for each recording. One serves eight steps."""
    monkeypatch.setattr(recordable, "_STEPS", 8)
    return record_on_a_cpu(monkeypatch)


def test_lengths_are_rounded_up():
    assert [rounded(n) for n in (1, 8, 9, 16, 17)] == [8, 8, 16, 16, 24]


@pytest.mark.parametrize("padded", [True, *at_night([False])], ids=["padded", "whole"])
@pytest.mark.parametrize("family", mostly_at_night(["llama", "gpt2", "gpt_neox", "opt", "phi", "qwen3"], 1))
def test_growing_caches_generate_what_the_oracle_does(family, padded, recorded):
    inputs, how = prompt(padded=padded), {"max_new_tokens": 24, "do_sample": False}
    with pruned_generation(0.5, 0.5, WINDOW):
        expected = hf_model(family).generate(**inputs, **how)
    model = hf_model(family)
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options={"window": WINDOW, "raise_errors": True})
        assert torch.equal(model.generate(**inputs, **how), expected)
    assert report.launching == [AS_GRAPHS]
    assert not report.notices
    assert 1 <= len(recorded) <= 5


@pytest.mark.nightly  # by day test_release.py has static caches of any length
def test_static_caches_of_any_length_are_recorded(recorded):
    model, how = hf_model(), {"max_new_tokens": 6, "do_sample": False}
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", options={"window": WINDOW, "raise_errors": True})
        for calls, length in enumerate((9, 20, 33, 41), 1):
            with pruned_generation(0.5, 0.5, WINDOW):
                expected = hf_model().generate(**prompt(length=length), **how)
            actual = model.generate(**prompt(length=length), **how, cache_implementation="static")
            assert torch.equal(actual, expected)
            assert len(recorded) == calls, "no step decompresses a cache to see how long it is"
    assert report.launching == [AS_GRAPHS]


def slots(n):
    return torch.arange(n)


TABLE = torch.randn(SLOTS, generator=torch.Generator().manual_seed(0))
CAUSAL = torch.tril(torch.ones(SLOTS, SLOTS, dtype=torch.bool))
MASKS = {  # of the tokens before and of all, [total]
    "compared with a number": lambda past, total: slots(total) <= past,
    "compared with a place": lambda past, total: slots(total) <= torch.arange(past, total),
    "a number in a tensor": lambda past, total: slots(total) <= torch.scalar_tensor(past, dtype=torch.int64),
    "filled": lambda past, total: slots(total) <= torch.full((1,), past),
    "scaled": lambda past, total: -0.1 * (2 * past + 1 - slots(total)).float(),
    "divided": lambda past, total: slots(total).float() / total,
    "a power": lambda past, total: (slots(total) * 0.1) ** (past - slots(total)),
    "a row and a part of a table": lambda past, total: CAUSAL[past : past + 1, :total],
    "a row of a table": lambda past, total: CAUSAL.select(0, past)[:total],
    "the end of a table": lambda past, total: TABLE[SLOTS - total :],
    "the end of a table, from its end": lambda past, total: TABLE[-total:],
    "one from the end of a table": lambda past, total: slots(total) * TABLE.select(0, -total),
    "indexed": lambda past, total: TABLE[past - slots(total)],
    "indexed from the end": lambda past, total: TABLE[:total][slots(total) - total],
    "gathered": lambda past, total: torch.gather(TABLE[None], 1, (past - slots(total))[None]),
    "selected": lambda past, total: torch.index_select(TABLE, 0, past - slots(total)),
    "embedded": lambda past, total: F.embedding(past - slots(total), TABLE[:, None]).view(1, 1, 1, total),
    "written into a table": lambda past, total: TABLE.slice_scatter(slots(total) * 1.0, 0, 0, total)[:total],
    "written into rows of tables": lambda past, total: (
        TABLE.expand(2, 3, SLOTS)
        .transpose(1, 2)
        .slice_scatter(slots(total)[:, None].expand(2, total, 3) * 1.0, 1, 3, total + 3)[:, :total]
        .transpose(1, 2)
    ),
    "summed so far": lambda past, total: torch.cumsum(TABLE[:total], 0) / total,
    "the last of a sum": lambda past, total: slots(total) * torch.cumsum(TABLE[:total], 0)[-1],
    "all but the last": lambda past, total: slots(total) != slots(total)[-1:],
    "a few of the first": lambda past, total: TABLE[:total][:2].sum() * slots(total),
    "spread": lambda past, total: slots(total)[None, :, None].expand(2, total, 3).permute(2, 0, 1).contiguous(),
    "chosen": lambda past, total: torch.where(slots(total) > past - 3, TABLE[:total], -1.0),
}
REFUSED = {
    "a sum": (lambda past, total: TABLE[:total] - TABLE[:total].sum(), "sum"),
    "joined": (lambda past, total: torch.cat([TABLE[:past], TABLE[:1]]), "cat"),
    "turned round": (lambda past, total: TABLE[:total].flip(0), "flip"),
    "two sizes in one": (lambda past, total: slots(2 * total).view(total, 2)[:, 0], "arange"),
    "in rows": (
        lambda past, total: TABLE.view(8, 8)[:, :, None].expand(8, 8, total).reshape(64 * total),
        "_unsafe_view|view",
    ),
    "transposed in a view": (
        lambda past, total: slots(total)[:, None].expand(total, 2).reshape(2, total),
        "_unsafe_view|view",
    ),
    "a square": (lambda past, total: TABLE[:total] + past * past, "add"),
    "every other one": (lambda past, total: TABLE[: 2 * total : 2], "slice"),
    "true ones": (lambda past, total: TABLE[:total][slots(total) > past], "index"),
}


def freed(mask, past=9):
    """The traced graph of a mask, free of the length: a function of a tensor [rounded length] and of true lengths."""
    trace = make_fx(lambda x: mask(x.shape[0], x.shape[0] + 1), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    module = trace(torch.empty(past))
    graph = module.graph
    (given,) = (node for node in graph.nodes if node.op == "placeholder")
    (size,) = given.meta["val"].shape
    with graph.inserting_after(given):
        values = graph.placeholder("lengths")
    values.meta["val"] = torch.empty(1, dtype=torch.int64)
    with graph.inserting_after(values):
        number = graph.call_function(torch.ops.aten.sym_size.int, (given, 0))
    number.meta["val"] = size
    freeing = FreeOfLengths(graph, {expression(size): number}, values)
    freeing.rules["output"] = lambda node: None  # which attention stands for
    freeing.run()
    graph.lint()
    module.recompile()
    return module


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_those_of_the_true_length(kind):
    mask = freed(MASKS[kind])
    for past in (1, 2, 7, 8, 9, 16, 40):
        expected = MASKS[kind](past, past + 1)
        for room in {rounded(past), past, past + 3}:
            actual = mask(torch.empty(room), torch.tensor([past]))
            assert actual.shape[-1] == room + 1
            torch.testing.assert_close(actual[..., : past + 1], expected)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_follows_from_all_of_a_length_is_refused(kind):
    mask, op = REFUSED[kind]
    with pytest.raises(LengthError, match=rf"aten\.({op})(\.\w+)? .*depends on the length"):
        freed(mask)


class Growing(nn.Module):
    """Attention over a cache that grows, under a mask [total] of its own."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x, past=None):
        """x: [B, HEADS, tokens, DIM]. Returns the result and the cache."""
        old = 0 if past is None else past[0].shape[2]
        keys, values = (x, 2 * x) if past is None else (torch.cat([c, x], 2) for c in past)
        if x.shape[2] > 1:
            return F.scaled_dot_product_attention(x, keys, values, is_causal=True), (keys, values)
        mask = self.mask(old, keys.shape[2])
        return F.scaled_dot_product_attention(x, keys, values, attn_mask=mask[None, None, None]), (keys, values)


def embeddings(steps=20, prefill=7, batch=1):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, HEADS, n, DIM, generator=generator) for n in (prefill, *[1] * steps)]


def results(step, inputs):
    past, made = None, []
    for x in inputs:
        out, past = step(x, past)
        made.append(out)
    return torch.cat(made, 2)


OPTIONS = {"key_sparsity": 0.0, "value_sparsity": 0.0, "window": WINDOW, "raise_errors": True}


def test_a_mask_of_a_loop_of_ones_own(recorded):
    model, inputs = Growing(MASKS["chosen"]), embeddings()
    with without_compiler(), explain() as report:
        actual = results(torch.compile(model, backend="mustafar", options=OPTIONS), inputs)
    torch.testing.assert_close(actual, results(model, inputs), rtol=1e-5, atol=1e-6)
    assert report.launching == [AS_GRAPHS]
    assert not report.notices
    assert 2 <= len(recorded) <= 5


def test_the_report_names_what_depends_on_the_length(recorded):
    model, inputs = Growing(REFUSED["a sum"][0]), embeddings(steps=6)
    with without_compiler(), explain() as report:
        actual = results(torch.compile(model, backend="mustafar", options=OPTIONS), inputs)
    torch.testing.assert_close(actual, results(model, inputs), rtol=1e-5, atol=1e-6)
    assert not recorded
    (line,) = report.launching
    assert re.fullmatch(
        r"decode steps run without CUDA graphs: aten\.sum at test_lengths\.py:\d+ depends on the length", line
    )


class Static(nn.Module):
    """A static cache, written and masked at a place that is a number."""

    def __init__(self):
        super().__init__()
        self.register_buffer("k", torch.zeros(1, HEADS, SLOTS, DIM))
        self.register_buffer("v", torch.zeros(1, HEADS, SLOTS, DIM))
        self.register_buffer("causal", torch.tril(torch.ones(SLOTS, SLOTS, dtype=torch.bool)))
        self.places = nn.Embedding(SLOTS, DIM)

    def forward(self, x, place: int):
        tokens = x.shape[2]
        x = x + self.places(torch.arange(place, place + tokens))
        self.k[:, :, place : place + tokens] = x
        self.v[:, :, place : place + tokens] = x
        return F.scaled_dot_product_attention(x, self.k, self.v, attn_mask=self.causal[place : place + tokens])


def test_a_place_that_is_a_number_is_no_part_of_a_recording(recorded):
    inputs = embeddings(steps=20, prefill=17)
    starts = [0, *range(17, 37)]
    torch.manual_seed(0)
    eager, model = Static(), Static()
    model.load_state_dict(eager.state_dict())
    with without_compiler(), explain() as report:
        step = torch.compile(model, backend="mustafar", options=OPTIONS)
        for x, start in zip(inputs, starts, strict=True):
            torch.testing.assert_close(step(x, start), eager(x, start), rtol=1e-5, atol=1e-6)
    assert torch.equal(model.k, eager.k), "the dense cache is written where the token goes"
    assert report.launching == [AS_GRAPHS]
    assert 2 <= len(recorded) <= 4


@pytest.mark.nightly
def test_numbers_of_tokens_that_differ_are_recorded_apart(recorded):
    torch.manual_seed(0)
    model, start = Static(), 0
    eager = copy.deepcopy(model)
    with without_compiler(), explain() as report:
        step = torch.compile(model, backend="mustafar", options=OPTIONS)
        for tokens in (17, 2, 3, 3, 3, 2, 2, 2, 4, 3, 3):
            x = torch.randn(1, HEADS, tokens, DIM)
            torch.testing.assert_close(step(x, start), eager(x, start), rtol=1e-5, atol=1e-6)
            start += tokens
    assert report.launching == [AS_GRAPHS]
    assert 2 <= len(recorded) <= 6


class Cut(Static):
    """Written at a place on the device; of keys, values and mask only the first part is used, up to a number."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x, places, upto: int):
        x = x + self.places(places)
        self.k[:, :, places] = x
        self.v[:, :, places] = x
        keys, values = self.k[:, :, :upto], self.v[:, :, :upto]
        return F.scaled_dot_product_attention(x, keys, values, attn_mask=self.mask(self, places, upto))


CUT_MASKS = {
    "cut": lambda model, places, upto: model.causal[places, :upto],
    "made": lambda model, places, upto: torch.where(slots(upto) <= places[:, None], 0.0, float("-inf")),
}


@pytest.mark.parametrize("kind", mostly_at_night(CUT_MASKS, 1))
def test_where_a_mask_is_cut_is_no_part_of_a_recording(kind, recorded):
    torch.manual_seed(0)
    model = Cut(CUT_MASKS[kind])
    eager = copy.deepcopy(model)
    with without_compiler(), explain() as report:
        step = torch.compile(model, backend="mustafar", options=OPTIONS)
        for x, start in zip(embeddings(steps=20, prefill=17), [0, *range(17, 37)], strict=True):
            given = x, torch.arange(start, start + x.shape[2]), start + x.shape[2]
            torch.testing.assert_close(step(*given), eager(*given), rtol=1e-5, atol=1e-6)
    assert report.launching == [AS_GRAPHS]
    assert 2 <= len(recorded) <= 4


def test_a_batch_that_changes_is_recorded_anew(recorded):
    model = Growing(MASKS["compared with a number"])
    with without_compiler(), explain() as report:
        step = torch.compile(model, backend="mustafar", options=OPTIONS)
        for batch in (2, 3, 4):
            inputs = embeddings(steps=6, batch=batch)
            torch.testing.assert_close(results(step, inputs), results(model, inputs), rtol=1e-5, atol=1e-6)
    assert report.launching == [AS_GRAPHS]
    assert len(recorded) >= 3
