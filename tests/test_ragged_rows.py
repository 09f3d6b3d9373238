"""Batches whose rows write a static cache at positions of their own: each row is what it would be alone."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from compilers import without_compiler, without_inductor
from mustafar_compile import CompressedKV, explain
from mustafar_compile.lowering.checks import OUT_OF_PLACE, UNWRITTEN
from nightly import at_night, mostly_at_night
from ragged_models import (
    FORMS,
    RaggedModel,
    RaggedTokensFirstModel,
    RowByRowModel,
    RowsChosenModel,
    dense,
    pruned,
    run,
    steps_at,
)
from test_own_loops import WINDOW, assert_close, options

pytestmark = pytest.mark.usefixtures("seeded", "no_grad")
SLOTS = 48
REWOUND = [(2, 7, 9), (0, 4, 10), (1, 5, 11), (2, 3, 12), (3, 4, 2), (0, 5, 3), (1, 6, 4)]
"""After a prompt of nine tokens, padded at its end: rows go on, are rewound by some or many, and begin again."""

WRITES = {
    "index_put": "index_put", "one token": "index_put", "tokens first": "index_put", "sliced rows": "index_put",
    "scatter": "scatter", "repeated index": "scatter", "tokens first, scatter": "scatter",
    "where": "masked write", "one-hot": "masked write", "row by row": "index_copy",
}  # fmt: skip
BY_ROW = "as torch.arange counts them, and a token of each at one place for all heads"


def compiled(step, sparsity: float = 0.0):
    return torch.compile(step, backend="mustafar", options=options(sparsity))


# ------------------------------------------------------------------------------------------------------- histories

EVERY_DAY = [("index_put", 0.0), ("where", 0.5)]
OTHERS = [(form, sparsity) for form in FORMS for sparsity in (0.0, 0.5) if (form, sparsity) not in EVERY_DAY]


@pytest.mark.parametrize(("form", "sparsity"), [*EVERY_DAY, *at_night(OTHERS)])
def test_rows_go_on_are_rewound_and_begin_again(form, sparsity):
    model, steps = FORMS[form](batch=3), steps_at(REWOUND, prompt=9)
    exact, expected = dense(model, steps), pruned(model, steps, options(sparsity))
    with without_compiler(), explain() as report:
        assert_close(run(compiled(model.step, sparsity), steps), expected)
    assert (sparsity == 0) == torch.allclose(torch.cat(expected, 1), torch.cat(exact, 1), atol=1e-6)
    (entry,) = report.matched
    assert (entry.form, entry.phases) == (f"static ({WRITES[form]} by row)", ("prefill", "decode"))
    assert not report.missed


@pytest.mark.nightly
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_other_batches(form, batch):
    """Indexed assignment hands leading dimensions of size 1 on as dropped."""
    model, steps = FORMS[form](batch=batch), steps_at([at[:batch] for at in REWOUND], prompt=9)
    expected = dense(model, steps)
    with without_compiler(), explain() as report:
        assert_close(run(compiled(model.step), steps), expected)
    assert len(report.matched) == 1, str(report)


class RowsInUse(RowByRowModel):
    """litgpt: the rows in use are sliced off, and what the write returns is read."""

    def step(self, x, positions):
        q, *new = (t.transpose(1, 2) for t in self.project(x))
        caches = [cache[: len(x)] for cache in (self.k_cache, self.v_cache)]
        for cache, rows in zip(caches, new, strict=True):
            self.write(cache, rows, positions)
        return self.merge(self.attend(q, *caches, self.mask(positions)))


@pytest.mark.nightly
@pytest.mark.parametrize("spare", [0, 1])
def test_rows_in_use(spare):
    model, steps = RowsInUse(batch=3 + spare), steps_at(REWOUND, prompt=9)
    expected = dense(model, steps)
    with without_compiler(), explain() as report:
        assert_close(run(compiled(model.step), steps), expected)
    assert len(report.matched) == 1, str(report)


def step_over(model, x, positions, keys, values):
    """A step over a cache that is given."""
    model.k_cache, model.v_cache = keys, values
    return model.step(x, positions)


def without_cache(form=RaggedModel):
    model = form(batch=3)
    del model.k_cache, model.v_cache
    return model


@pytest.mark.nightly
def test_a_batch_and_a_length_that_change():
    model = without_cache()
    with without_compiler(), explain() as report:
        step = compiled(step_over)
        for batch, slots in ((2, 32), (3, 40), (4, 48)):
            steps = steps_at([(3, 0, 5, 1)[:batch], (4, 1, 2, 0)[:batch]])
            caches = [torch.zeros(batch, 2, slots, 16) for _ in range(4)]
            expected = [step_over(model, *given, *caches[:2]) for given in steps]
            assert_close([step(model, *given, *caches[2:]) for given in steps], expected)
    assert len(report.matched) == 1, str(report)
    assert report.graphs == 2


@pytest.mark.nightly
@pytest.mark.native
def test_with_the_kernels_of_this_device():
    model, steps = RaggedModel(batch=3), steps_at(REWOUND, prompt=9)
    expected = pruned(model, steps, options(0.5))
    with without_inductor():
        assert_close(run(compiled(model.step, 0.5), steps), expected)


class DraftsModel(RaggedModel):
    """Steps of several tokens: each row is told where its first goes."""

    def step(self, x, start):
        return super().step(x, start.unsqueeze(1) + torch.arange(x.shape[1]).unsqueeze(0))


class ScatteredDraftsModel(DraftsModel):
    def write(self, cache, new, positions):
        cache.scatter_(2, positions[:, None, :, None].expand_as(new), new)


@pytest.mark.parametrize("form", [DraftsModel, *at_night([ScatteredDraftsModel])])
def test_steps_of_several_tokens(form):
    """Each row takes back as many drafts as it likes."""
    model = form(batch=3)
    steps = [(torch.randn(3, 3, 32), at[:, 0]) for _, at in steps_at(REWOUND)]
    expected = dense(model, steps)
    with without_compiler(), explain() as report:
        assert_close(run(compiled(model.step), steps), expected)
    assert [entry.phases for entry in report.matched] == [("decode",)]


# ------------------------------------------------------------------------------------------------ a row is replaced


class SlotsModel(RaggedModel):
    def prompt(self, x, row: int):
        """A prompt [1, T, E] for one row of the batch."""
        q, *new = (t.transpose(1, 2) for t in self.project(x))
        caches, count = (self.k_cache, self.v_cache), x.shape[1]
        for cache, rows in zip(caches, new, strict=True):
            self.fill(cache, rows, row)
        keys, values = (cache[row : row + 1, :, :count] for cache in caches)
        return self.merge(self.attend(q, keys, values, torch.ones(count, count, dtype=torch.bool).tril()))

    def fill(self, cache, new, row):
        cache[row, :, : new.shape[2]] = new[0]


class ViewedSlotsModel(SlotsModel):
    """The row is sliced off and written like a cache of its own."""

    def fill(self, cache, new, row):
        cache[row : row + 1].index_copy_(2, torch.arange(new.shape[2]), new)


def serve(model, prompt, step):
    """Steps of all rows, between which prompts take some of them."""
    prompts = {0: (0, 9), 2: (2, 5), 5: (2, 7)}
    generator, at, outputs = torch.Generator().manual_seed(1), torch.zeros(3, 1, dtype=torch.int64), []
    for i in range(7):
        if i in prompts:
            row, count = prompts[i]
            outputs.append(prompt(torch.randn(1, count, 32, generator=generator), row)[:, -1:].expand(3, -1, -1))
            at[row] = count
        outputs.append(step(torch.randn(3, 1, 32, generator=generator), at))
        at = at + 1
    return outputs


@pytest.mark.parametrize("form", [SlotsModel, *at_night([ViewedSlotsModel])])
def test_a_prompt_takes_a_row_while_others_go_on(form):
    model = form(batch=3)
    twin = copy.deepcopy(model)
    expected = serve(twin, twin.prompt, twin.step)
    with without_compiler(), explain() as report:
        assert_close(serve(model, compiled(model.prompt), compiled(model.step)), expected)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")], str(report)


@pytest.mark.nightly
def test_a_row_does_not_take_a_step_by_itself():
    model, x = SlotsModel(batch=3), torch.randn(1, 1, 32)
    with without_compiler(), explain() as report:
        torch.testing.assert_close(compiled(model.prompt)(x, 1), copy.deepcopy(model).prompt(x, 1))
    assert [entry.reason for entry in report.missed] == ["some rows of the batch take a step by themselves"]


def write_a_row(cache, row):
    cache[row, :, :6] = torch.ones(2, 6, 16)


def test_a_prompt_does_not_take_a_row_of_a_compressed_cache():
    cache = CompressedKV.from_dense(torch.randn(3, 2, SLOTS, 16), 0.0, WINDOW, 9)
    with without_compiler(), pytest.raises(Exception, match="writes into a compressed KV cache"):
        torch.compile(write_a_row, backend="mustafar", options={"raise_errors": True})(cache, 1)


# ---------------------------------------------------------------------------------------- caches that are compressed


@pytest.mark.parametrize("form", [RaggedModel, *at_night([RowsChosenModel, RowByRowModel])])
def test_compressed_caches_of_different_lengths_go_on_together(form):
    """Static caches joined along the batch, a step, a chunk of a prompt in each row, and a step."""
    model, lengths = without_cache(form), (7, 20, 12)
    starts = torch.tensor(lengths).unsqueeze(1)
    unwritten = (torch.arange(SLOTS) >= starts).view(3, 1, SLOTS, 1)
    rows = [torch.randn(3, 2, SLOTS, 16).masked_fill(unwritten, 0) for _ in range(2)]
    caches = [
        torch.cat([CompressedKV.from_dense(x[i : i + 1], 0.0, WINDOW, n) for i, n in enumerate(lengths)]) for x in rows
    ]
    chunk = torch.randn(3, 6, 32), starts - 2 + torch.arange(6)
    steps = [*steps_at([lengths]), chunk, *steps_at([(11, 24, 3)])]
    expected = [step_over(model, *given, *rows) for given in steps]
    with without_compiler(), explain() as report:
        step = compiled(step_over)
        assert_close([step(model, *given, *caches) for given in steps], expected)
    assert [entry.phases for entry in report.matched] == [("decode", "prefill")]
    assert caches[0].counts[:, 0].tolist() == [12, 25, 4]


# --------------------------------------------------------------------------------------------------- what is refused

OUTSIDE = [(5, -1, 5), (5, 5, -SLOTS - 1), (5, SLOTS, 5), (2**40, 5, 5), (5, 7, 5)]


def outcome(step, given):
    """What a step returns, and the error that ended it."""
    try:
        return step(*given), ""
    except Exception as error:
        return None, str(error)


@pytest.mark.parametrize("form", ["scatter", "row by row", *at_night(["index_put", "where"])])
def test_a_row_out_of_place_ends_as_in_eager_code_or_is_refused(form):
    model = FORMS[form](batch=3)
    with without_compiler():
        step = compiled(model.step)
        for place in OUTSIDE:
            for cache in (model.k_cache, model.v_cache):
                cache.zero_()
            good, bad = steps_at([(5, 5, 5), place])
            torch.testing.assert_close(step(*good), copy.deepcopy(model).step(*good))
            twin, before = copy.deepcopy(model), model.k_cache.clone()
            actual, error = outcome(step, bad)
            if error:
                assert OUT_OF_PLACE in error or "ind" in error, (place, error)
                assert torch.equal(model.k_cache, before)
            else:
                torch.testing.assert_close(actual, twin.step(*bad))
                assert torch.equal(model.k_cache, twin.k_cache)


class FromTheEndModel(RaggedModel):
    """Positions may count from the end of a full buffer."""

    def mask(self, positions):
        return super().mask(positions % self.k_cache.shape[2])


@pytest.mark.nightly
def test_rows_at_positions_from_the_end():
    model, steps = FromTheEndModel(batch=2, slots=8), steps_at([(-1, 3), (7, -5), (-1, 4)], prompt=8)
    expected = dense(model, steps)
    with without_compiler():
        assert_close(run(compiled(model.step), steps), expected)


class OpenMaskModel(RaggedModel):
    """Every row sees what the longest has."""

    def mask(self, positions):
        return super().mask(positions.amax(0, keepdim=True).expand_as(positions))


def test_a_mask_that_admits_slots_which_a_row_never_wrote_is_refused():
    model = OpenMaskModel(batch=2)
    even, uneven = steps_at([(5, 5), (6, 3)])
    expected = dense(model, [even])
    with without_compiler():
        step = compiled(model.step)
        assert_close([step(*even)], expected)
        with pytest.raises(RuntimeError, match=re.escape(UNWRITTEN)):
            step(*uneven)


class RowsSwapped(RaggedModel):
    """All rows, in another order."""

    reason = BY_ROW

    def write(self, cache, new, positions):
        cache[torch.arange(len(new)).flip(0), :, positions[:, 0]] = new[:, :, 0].flip(0)


class NamedRows(RaggedModel):
    """Which rows these are comes from outside."""

    reason = BY_ROW

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("rows", torch.arange(2))

    def write(self, cache, new, positions):
        cache[self.rows, :, positions[:, 0]] = new[:, :, 0]


class Added(RaggedTokensFirstModel):
    reason = BY_ROW

    def write(self, cache, new, positions):
        cache.index_put_((torch.arange(2).unsqueeze(1), positions), new.transpose(1, 2), accumulate=True)


class TokenAtTwoPlaces(RaggedModel):
    reason = BY_ROW

    def write(self, cache, new, positions):
        cache[torch.arange(2).unsqueeze(1), :, torch.cat([positions, positions + 1], 1)] = new.transpose(1, 2)


class RowsAcross(RaggedModel):
    """Rows are counted along the tokens."""

    reason = BY_ROW

    def step(self, x, positions):
        return super().step(x.expand(-1, 2, -1), positions + torch.arange(2))

    def write(self, cache, new, positions):
        cache[torch.arange(2).unsqueeze(0), :, positions] = new.transpose(1, 2)


class HeadsApart(RaggedModel):
    """Each head has a place of its own."""

    reason = BY_ROW

    def write(self, cache, new, positions):
        index = torch.cat([positions, positions - 1], 1)[:, :, None, None]
        cache.scatter_(2, index.expand_as(new), new)


class PlacesCut(RaggedModel):
    """The first of several positions of each row."""

    reason = BY_ROW

    def write(self, cache, new, positions):
        index = torch.cat([positions, positions + 1], 1)[:, None, :, None]
        cache.scatter_(2, index[:, :, :1].expand_as(new), new)


class PlacesSwapped(RaggedModel):
    """Rows and tokens the wrong way round."""

    reason = BY_ROW

    def write(self, cache, new, positions):
        index = torch.cat([positions, positions + 1], 1)[:, None, :, None].transpose(0, 2)
        new = new.expand(-1, -1, 2, -1)
        cache.scatter_(2, index.expand_as(new), new)


class OneRowLeftOut(RowByRowModel):
    reason = "some rows of the batch take a step by themselves"

    def write(self, cache, new, positions):
        super().write(cache, new, positions[:1])


class WrittenTwice(RowByRowModel):
    reason = BY_ROW

    def write(self, cache, new, positions):
        super().write(cache, new, positions)
        cache[0].index_copy_(1, positions[0] + 1, new[0])


class ActiveRows(RowsChosenModel):
    """Rows that are not active keep what they have."""

    reason = "its cache is written by aten.where.self in a way that is not recognised"

    def chosen(self, cache, new, slots, positions):
        here = (slots == positions) & (positions > 3)
        return torch.where(here[:, None, :, None], new, cache)


class ManyPlaces(RowsChosenModel):
    """Slots are compared with as many positions."""

    reason = "its cache is written by aten.where.self in a way that is not recognised"

    def chosen(self, cache, new, slots, positions):
        here = slots == slots // positions[:, 0].amax() * positions[:, 0].amax()
        return torch.where(here[None, None, :, None], new, cache)


class BooleanIndex(RaggedModel):
    """One place for all rows, which the graph does not tell."""

    reason = "its cache is written by aten.index_put.default in a way that is not recognised"

    def write(self, cache, new, positions):
        cache[:, :, torch.arange(SLOTS) == positions[0]] = new


NOT_MATCHED = (
    RowsAcross, TokenAtTwoPlaces, HeadsApart, RowsSwapped, OneRowLeftOut, NamedRows, Added, PlacesCut, PlacesSwapped,
    WrittenTwice, ActiveRows, ManyPlaces, BooleanIndex,
)  # fmt: skip


@pytest.mark.parametrize("form", mostly_at_night(NOT_MATCHED, 3))
def test_what_is_not_known_to_write_a_token_of_each_row_does_not_match(form):
    model, steps = form(batch=2), steps_at([(5, 5), (6, 6)])
    expected = dense(model, steps)
    with without_compiler(), explain() as report:
        assert_close(run(compiled(model.step), steps), expected)
    (entry,) = report.missed
    assert entry.reason.endswith(form.reason)
