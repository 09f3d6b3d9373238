"""Static caches of which attention is given the first part alone: keys, values and mask are cut at a Python number."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from compilers import without_compiler
from models import BufferModel, pruned_steps
from mustafar_compile import explain
from mustafar_compile.lowering.checks import UNWRITTEN
from nightly import at_night, mostly_at_night
from pairwise import pairwise
from ragged_models import RaggedModel, steps_at
from reference import reference_attention
from test_own_loops import WINDOW, assert_close, options

pytestmark = pytest.mark.usefixtures("seeded", "no_grad")
SLOTS, PROMPT = 48, 7
INF = float("inf")


def compared(model, positions, n):
    return torch.arange(n) <= positions[:, None]


MASKS = {
    "cut": lambda model, positions, n: model.causal[None, None, positions][..., :n],
    "compared": compared,
    "additive": lambda *given: torch.where(compared(*given), 0.0, -INF)[None, None],
    "bias": lambda model, positions, n: (torch.arange(n) - positions[:, None]).float().masked_fill(
        ~compared(model, positions, n), -INF
    ).expand(2, 4, -1, -1),
    "integers": lambda *given: -50000 * ~compared(*given),
}  # fmt: skip


class CutModel(BufferModel):
    """Written by an index_copy at positions on the device."""

    mask = staticmethod(MASKS["cut"])

    def place(self, start, end):
        """What a step takes as the place of its tokens."""
        return torch.arange(start, end)

    def write(self, cache, new, positions):
        cache.index_copy_(2, positions, new)

    def step(self, x, positions, n):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        self.write(self.k_cache, k, positions)
        self.write(self.v_cache, v, positions)
        return self.merge(self.attend(q, *self.cut(n), positions, n))

    def cut(self, n):
        return self.k_cache[:, :, :n], self.v_cache[:, :, :n]

    def attend(self, q, keys, values, positions, n):
        mask = self.mask(self, positions, n)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)


class SpelledOut(CutModel):
    def attend(self, q, keys, values, positions, n):
        keys, values = (x.repeat_interleave(2, dim=1) for x in (keys, values))
        mask = self.mask(self, positions, n)
        scores = q @ keys.transpose(2, 3) / 4
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ values


class Flex(CutModel):
    def attend(self, q, keys, values, positions, n):
        mask = create_block_mask(lambda b, h, row, column: column <= positions[row], None, None, q.shape[2], n, "cpu")
        return flex_attention(q, keys, values, block_mask=mask, enable_gqa=True)


class TokensFirst(CutModel):
    """Buffers [B, S, H, D], written by index_put."""

    def __init__(self):
        super().__init__()
        self.k_cache, self.v_cache = (x.transpose(1, 2).contiguous() for x in (self.k_cache, self.v_cache))

    def write(self, cache, new, positions):
        cache[:, positions] = new.transpose(1, 2)

    def cut(self, n):
        return (x[:, :n].transpose(1, 2) for x in (self.k_cache, self.v_cache))


class RowsInUse(CutModel):
    """litgpt: the rows in use of a larger buffer; what the write returns is cut."""

    def __init__(self):
        super().__init__(batch=3)

    def step(self, x, positions, n):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        keys = self.k_cache[: len(x)].index_copy_(-2, positions, k)[..., :n, :]
        values = self.v_cache[: len(x)].index_copy_(-2, positions, v)[..., :n, :]
        return self.merge(self.attend(q, keys, values, positions, n))


class Sliced(CutModel):
    """Written at a Python number, too."""

    def place(self, start, end):
        return start

    def step(self, x, start, n):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        end = start + x.shape[1]
        self.k_cache[:, :, start:end], self.v_cache[:, :, start:end] = k, v
        return self.merge(self.attend(q, *self.cut(n), torch.arange(start, end), n))


def embeddings(starts, counts=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, 32, generator=generator) for n in counts or (PROMPT, *[1] * (len(starts) - 1))]


def run(model, inputs, starts, upto, step=None):
    """Outputs of steps that begin at ``starts``. upto: from the end of a step to where all is cut."""
    step, outputs = step or model.step, []
    for x, start in zip(inputs, starts, strict=True):
        end = start + x.shape[1]
        outputs.append(step(x, model.place(start, end), upto(end)))
    return outputs


def exactly(end):
    return end


def rounded(end):
    return -(-end // 8) * 8


def compiled(model, sparsity=0.0):
    return torch.compile(model.step, backend="mustafar", options=options(sparsity))


ODD = (SpelledOut, "integers", rounded, 0.7), (Flex, "compared", exactly, 0.0), (Flex, "compared", rounded, 0.7)
CASES = pairwise([CutModel, TokensFirst, RowsInUse, SpelledOut], list(MASKS)[:4], (exactly, rounded), (0.7, 0.0))


@pytest.mark.parametrize(("form", "mask", "upto", "sparsity"), [*mostly_at_night(CASES, 1), *at_night(ODD)])
def test_outputs_are_those_of_eager_code_and_of_the_oracle(form, mask, upto, sparsity):
    model, starts = form(), [0, *range(PROMPT, 20)]
    model.mask = MASKS[mask]
    inputs = embeddings(starts)
    attention = functools.partial(reference_attention, key_sparsity=sparsity, value_sparsity=sparsity, window=WINDOW)
    with without_compiler():
        expected = run(copy.deepcopy(model), inputs, starts, upto)  # what the prompt attends to is never pruned
        if sparsity:
            expected[1:] = pruned_steps(model, inputs, functools.partial(attended, attention, mask))[1:]
        with explain() as report:
            assert_close(run(model, inputs, starts, upto, compiled(model, sparsity)), expected)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")], str(report)
    assert not report.missed
    assert report.graphs <= 3


def attended(attention, mask, q, k, v):
    """The step of the oracle, whose keys end with the newest token."""
    return attention(q, k, v, mask=torch.arange(1.0 - k.shape[2], 1) if mask == "bias" else None)


@pytest.mark.parametrize("cut", [5, *at_night([1])])
@pytest.mark.parametrize("form", [CutModel, *at_night([Sliced])])
def test_what_was_written_behind_the_cut_is_not_attended(form, cut):
    model, starts = form(), [0, *range(PROMPT, 12), 2, 3, 4, 5]
    inputs, twin = embeddings(starts), copy.deepcopy(model)
    with without_compiler(), explain() as report:
        actual = run(model, inputs, starts, lambda end: cut, compiled(model))
        assert_close(actual, run(twin, inputs, starts, lambda end: cut))
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")], str(report)
    assert torch.equal(model.k_cache, twin.k_cache)


@pytest.mark.nightly
@pytest.mark.parametrize("form", [CutModel, Sliced])
def test_steps_of_several_tokens_and_rewinding(form):
    starts, counts = [0, 7, 8, 11, 10, 12, 3, 4], [7, 1, 3, 2, 3, 1, 1, 3]
    model, inputs = form(), embeddings(starts, counts)
    with without_compiler(), explain() as report:
        expected = run(copy.deepcopy(model), inputs, starts, rounded)
        assert_close(run(model, inputs, starts, rounded, compiled(model)), expected)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")], str(report)
    assert not report.missed


class CutRows(RaggedModel):
    """Rows at positions of their own, all cut behind the furthest of them."""

    def step(self, x, positions, n):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        self.write(self.k_cache, k, positions)
        self.write(self.v_cache, v, positions)
        mask = self.mask(positions)[..., :n]
        return self.merge(self.attend(q, self.k_cache[:, :, :n], self.v_cache[:, :, :n], mask))


@pytest.mark.nightly
def test_rows_at_positions_of_their_own():
    model, places = CutRows(batch=3), [(2, 7, 9), (0, 4, 10), (1, 5, 11), (2, 3, 12), (3, 4, 2)]
    steps = [(x, at, rounded(int(at.max()) + 1)) for x, at in steps_at(places, prompt=9)]
    twin = copy.deepcopy(model)
    with without_compiler(), explain() as report:
        step = compiled(model)
        assert_close([step(*given) for given in steps], [twin.step(*given) for given in steps])
    assert [entry.form for entry in report.matched] == ["static (index_put by row)"], str(report)


POSITIONS = {  # that are tensors made of a number
    "arange": lambda start, tokens: torch.arange(start, start + tokens),
    "arange moved": lambda start, tokens: torch.arange(tokens) + start,
    "list": lambda start, tokens: torch.tensor([start + i for i in range(tokens)]),
    "full": lambda start, tokens: torch.arange(start, start + tokens) if tokens > 1 else torch.full((1,), start),
    "number": lambda start, tokens: torch.tensor(start).view(1) + torch.arange(tokens),
}


class Unmasked(CutModel):
    """All that is written is attended, which needs no mask."""

    def step(self, x, start, position):
        tokens = x.shape[1]
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        positions = position(start, tokens)
        self.write(self.k_cache, k, positions)
        self.write(self.v_cache, v, positions)
        keys, values = self.cut(start + tokens)
        return self.merge(F.scaled_dot_product_attention(q, keys, values, is_causal=tokens > 1, enable_gqa=True))


@pytest.mark.parametrize("position", mostly_at_night(POSITIONS, 1))
def test_a_length_that_is_that_of_the_written_tokens_needs_no_mask(position):
    model, starts = Unmasked(), [0, *range(PROMPT, 16)]
    inputs, twin, position = embeddings(starts), copy.deepcopy(model), POSITIONS[position]
    with without_compiler(), explain() as report:
        step = compiled(model)
        actual = [step(x, start, position) for x, start in zip(inputs, starts, strict=True)]
        assert_close(actual, [twin.step(x, start, position) for x, start in zip(inputs, starts, strict=True)])
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")], str(report)
    assert not report.missed
    assert report.graphs <= 3


def begun(model, x, positions, n, caches=None):
    """A step over caches that the prompt allocates."""
    caches = caches or tuple(torch.zeros(2, 2, SLOTS, 16) for _ in range(2))
    model.k_cache, model.v_cache = caches
    out = model.step(x, positions, n)
    return out, (model.k_cache, model.v_cache)


@pytest.mark.nightly
def test_caches_that_are_held_compressed_alone():
    model, starts = CutModel(), [0, *range(PROMPT, 16)]
    del model.k_cache, model.v_cache
    outputs = []
    with without_compiler(), explain() as report:
        compiled_step = torch.compile(begun, backend="mustafar", options=options(0.0))
        for step in (begun, compiled_step):
            caches = None

            def going_on(*given, step=step):
                nonlocal caches
                out, caches = step(model, *given, caches)
                return out

            outputs.append(run(model, embeddings(starts), starts, rounded, going_on))
    assert_close(*outputs)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")], str(report)


@pytest.mark.nightly
def test_a_mask_that_admits_unwritten_slots_before_the_cut_is_refused():
    model, starts = CutModel(), [0, PROMPT, PROMPT + 1]
    model.mask = lambda model, positions, n: torch.ones(1, 1, len(positions), n, dtype=torch.bool)
    with without_compiler(), pytest.raises(RuntimeError, match=UNWRITTEN[:40]):
        run(model, embeddings(starts), starts, rounded, compiled(model))
