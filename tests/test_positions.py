"""Where a decode step may write, and what its mask may admit: asserted on the device, before anything is changed."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cases import (
    Cache,
    assert_same_bits,
    assert_same_cache,
    attention,
    compressed,
    decompressed,
    make_case,
    randn,
    seeds,
)
from compilers import without_inductor
from models import BufferModel, hf_model, prompt
from mustafar_compile import explain
from mustafar_compile.lowering.checks import OUT_OF_PLACE, UNWRITTEN

OPTIONS = {"key_sparsity": 0.0, "value_sparsity": 0.0, "window": 4}
WRITTEN, SLOTS = 9, 16

# --------------------------------------------------------------------------------------------------------- the op


def refused(case, message, position=None, **how):
    """The step raises with ``message`` and leaves the caches as they were."""
    caches = [case.past("key"), case.past("value")]
    before = [x.clone() for x in caches]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        case.step(*caches, position, **how)
    for mine, other in zip(caches, before, strict=True):
        for x, y in zip(mine, other, strict=True):
            assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))


@given(st.integers(-40, 40), st.integers(1, 3), st.sampled_from([None, SLOTS]))
def test_positions(position, queries, length):
    case = make_case(tokens=WRITTEN + queries, queries=queries, spare=20, key_sparsity=0.0, value_sparsity=0.0)
    at = torch.tensor([position])
    if 0 <= position <= WRITTEN and position + queries <= (length or 1000):
        case.step(position=at, length=length)
    else:
        refused(case, OUT_OF_PLACE, at, length=length)


@pytest.mark.parametrize("position", [None, torch.tensor([SLOTS - 1])])
def test_a_full_static_cache_takes_no_token_behind_its_last(position):
    case = make_case(tokens=SLOTS)
    case.step(position=position, length=SLOTS)
    if position is None:
        refused(make_case(tokens=SLOTS + 1), OUT_OF_PLACE, length=SLOTS)
    refused(make_case(tokens=SLOTS + 1), OUT_OF_PLACE, torch.tensor([SLOTS]), length=SLOTS)


def mask_of(kind, shape, allowed):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., :allowed] = True
    return mask if kind == "boolean" else torch.zeros(shape).masked_fill(~mask, kind)


@pytest.mark.parametrize("kind", ["boolean", float("-inf"), torch.finfo(torch.float32).min, -1e4])
@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1), (2, 4, 1), (1, 4, 2)])
def test_masks_of_a_static_cache(kind, shape):
    queries = 2
    tokens = WRITTEN + queries
    case = make_case(tokens=tokens, queries=queries, spare=20)
    case.mask = mask_of(kind, (*shape, SLOTS), tokens)
    case.step(length=SLOTS)
    case.mask[(-1,) * len(shape) + (SLOTS - 1,)] = True if kind == "boolean" else 0.5
    refused(case, UNWRITTEN, length=SLOTS)
    case.step()  # a growing cache has no token behind its last, whatever the mask has there


# ----------------------------------------------------------------------------------------------- rows of their own


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 3), st.booleans(), seeds)
def test_each_row_of_the_batch_has_tokens_of_its_own(first, second, queries, given_position, seed):
    """A batch of two gives what each row alone gives."""
    alone = []
    for i, tokens in enumerate((first, second)):
        dense = randn(1, 2, 60, 24, seed=seed + i)
        alone.append([compressed(dense, tokens, 8, 4, 80), compressed(2 * dense, tokens, 16, 4, 80)])
    together = [Cache(map(torch.cat, zip(*x, strict=True)), x[0].format) for x in zip(*alone, strict=True)]
    query, key, value = (randn(2, heads, queries, 24, seed=seed + heads) for heads in (4, 2, 2))
    at = torch.tensor([first // 2, second]) if given_position else None
    out = attention(query, key, value, *together, at, scale=0.2)
    for i, caches in enumerate(alone):
        row, where = slice(i, i + 1), None if at is None else at[i : i + 1]
        expected = attention(query[row], key[row], value[row], *caches, where, scale=0.2)
        torch.testing.assert_close(out[row], expected, rtol=1e-5, atol=1e-6)
        for mine, other in zip(together, caches, strict=True):
            assert_same_cache(mine.changed(lambda x, row=row: x[row]), other)
            assert_same_bits(decompressed(mine, 70)[row], decompressed(other, 70))


# -------------------------------------------------------------------------------------------------- compiled models


def masked(model, positions, slots):
    return (torch.arange(slots) <= positions[:, None])[None, None]


class Static(BufferModel):
    """Attends to its whole buffer under ``mask``."""

    def __init__(self, mask=masked):
        super().__init__(slots=SLOTS)
        self.mask = mask

    def step(self, x, positions):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        self.write(self.k_cache, k, positions)
        self.write(self.v_cache, v, positions)
        keys, values = (cache.repeat_interleave(2, dim=1) for cache in (self.k_cache, self.v_cache))
        mask = self.mask(self, positions, SLOTS)
        return self.merge(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask))


class Copied(Static):
    def write(self, cache, new, positions):
        cache.index_copy_(2, positions, new)


class Chosen(Static):
    def write(self, cache, new, positions):
        if new.shape[2] > 1:
            cache[:, :, positions] = new
        else:
            cache.copy_(torch.where((torch.arange(SLOTS) == positions).view(1, 1, -1, 1), new, cache))


class LastSlot(Static):
    """Writes one token by a slice that counts from the end."""

    def write(self, cache, new, positions):
        if new.shape[2] > 1:
            cache[:, :, positions] = new
        else:
            cache[:, :, -1:] = new


def run(step, starts, counts):
    """Outputs, and the error that ended them."""
    outputs = []
    for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
        try:
            outputs.append(step(randn(2, count, 32, seed=i), torch.arange(start, start + count)))
        except Exception as error:
            return outputs, error
    return outputs, None


def compare(model, starts, counts):
    """Outputs that are equal as far as both go, and the errors of eager code and of ours."""
    torch.manual_seed(0)
    model = model().eval()
    with torch.no_grad(), without_inductor():
        expected, error = run(copy.deepcopy(model).step, starts, counts)
        with explain() as report:
            outputs, ours = run(torch.compile(model.step, backend="mustafar", options=OPTIONS), starts, counts)
    assert len(report.matched) == 1, str(report)
    for mine, other in zip(outputs, expected, strict=False):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    return len(expected), error, len(outputs), ours


@pytest.mark.parametrize("model", [Static, Copied])
def test_the_end_of_a_static_cache(model):
    expected, error, steps, ours = compare(model, [0, *range(8, 19)], [8] + [1] * 11)
    assert (error is not None, ours is not None) == (True, True)
    assert steps == expected == 1 + 8


def test_a_masked_write_behind_the_end_or_before_the_start_is_refused():
    """Eager code writes nothing then; a compressed cache has no step without a token."""
    for starts in ([0, *range(8, 19)], [0, 8, -1]):
        *_, steps, ours = compare(lambda: Chosen(lambda m, p, s: masked(m, p.abs().clamp(max=s - 1), s)), starts,
                                  [8] + [1] * (len(starts) - 1))  # fmt: skip
        assert steps == (9 if len(starts) > 3 else 2)
        assert OUT_OF_PLACE in str(ours)


def test_positions_from_the_end():
    """A full buffer whose last slot is overwritten, named by a tensor of -1 and by a slice."""
    everything = lambda m, p, s: torch.ones(1, 1, len(p), s, dtype=torch.bool)  # noqa: E731
    for model, starts in ((Static, [0, -1, -1, 15]), (LastSlot, [0, 15, 15, 15])):
        _, error, steps, ours = compare(lambda model=model: model(everything), starts, [16, 1, 1, 1])
        assert (error, steps, ours) == (None, 4, None)


def test_a_gap_is_refused():
    *_, steps, ours = compare(Static, [0, 8, 12], [8, 1, 1])
    assert steps == 2
    assert OUT_OF_PLACE in str(ours)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_mask_that_admits_unwritten_slots_is_refused(kind):
    def mask(model, positions, slots):
        shape = 1, 1, len(positions), slots
        return torch.ones(shape, dtype=torch.bool) if kind == "boolean" else torch.zeros(shape)

    *_, steps, ours = compare(lambda: Static(mask), [0, 8, 9], [8, 1, 1])
    assert steps == 1
    assert UNWRITTEN in str(ours)


def test_a_mask_that_is_the_same_for_all_slots_does_not_match():
    def mask(model, positions, slots):
        return torch.zeros(1, 1, len(positions), 1)

    torch.manual_seed(0)
    model = Static(mask).eval()
    with torch.no_grad(), without_inductor(), explain() as report:
        run(torch.compile(model.step, backend="mustafar", options=OPTIONS), [0, 8], [8, 1])
    assert "also where nothing is written" in report.missed[0].reason


@pytest.mark.native
def test_the_end_of_a_static_cache_of_transformers():
    from transformers import StaticCache

    def steps(compiled):
        model = hf_model(num_hidden_layers=1)
        cache = StaticCache(config=model.config, max_cache_len=SLOTS)
        forward = torch.compile(model.forward, backend="mustafar", options=OPTIONS) if compiled else model.forward
        outputs, ids = [], prompt(2, 8)["input_ids"]
        tokens = torch.randint(1, 100, (2, 12), generator=torch.Generator().manual_seed(5))
        for i in range(13):
            given = ids if i == 0 else tokens[:, i - 1 : i]
            try:
                outputs.append(forward(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1])
            except Exception as error:
                return outputs, error
        return outputs, None

    with torch.no_grad(), without_inductor():
        (expected, error), (outputs, ours) = steps(False), steps(True)
    assert error is not None
    assert ours is not None
    assert len(outputs) == len(expected) == 1 + 8
    torch.testing.assert_close(torch.stack(outputs), torch.stack(expected), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- try again


class Failing(torch.nn.Module):
    """Two layers over tuples, and between them an embedding that fails for a tag out of its range."""

    def __init__(self):
        from models import TupleModel

        super().__init__()
        self.first, self.second, self.tags = TupleModel(), TupleModel(), torch.nn.Embedding(10, 32)

    def step(self, x, past, tag):
        first, second = past or (None, None)
        y, first = self.first.step(x, first)
        y, second = self.second.step(y + self.tags(tag), second)
        return y, (first, second)


@pytest.mark.native
def test_a_step_that_failed_can_be_tried_again():
    torch.manual_seed(0)
    model = Failing().eval()
    good, bad = torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1), 99)

    def generate(step, failing):
        past, outputs = None, []
        for i, count in enumerate((8, 1, 1, 1, 1)):
            x = randn(2, count, 32, seed=i)
            if i in failing:
                with pytest.raises(Exception, match="index"):
                    step(x, past, bad)
            y, past = step(x, past, good)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    with torch.no_grad(), without_inductor():
        expected = generate(model.step, ())
        step = torch.compile(model.step, backend="mustafar", options=OPTIONS)
        for failing in ((), (2,), (1, 4)):
            torch.testing.assert_close(generate(step, failing), expected, rtol=1e-4, atol=1e-5)
