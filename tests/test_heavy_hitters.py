"""Heavy hitters of the accuracy study: against one query after the other, each with the set of tokens that it reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from accuracy import eviction, teacher_forced
from accuracy.eviction import HeavyHitters

HEADS, GROUP, TOKENS, HEAD_DIM, WINDOW, SCALE = 2, 2, 24, 8, 3, 0.5


def tensors(seed: int = 0):
    """q, k, v and what is stored of k and v."""
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS * GROUP, HEADS, HEADS, HEADS, HEADS)
    return [torch.randn(2, n, TOKENS, HEAD_DIM, generator=generator, dtype=torch.float64) for n in heads]


def one_by_one(q, k, v, stored_k, stored_v, hitters):
    """A head of a group after the other, one query at a time, over lists of tokens."""
    result, reads = torch.empty_like(q), {}
    for batch in range(q.shape[0]):
        for head in range(HEADS):
            held, sums = [], [0.0] * TOKENS
            heads = range(head * GROUP, (head + 1) * GROUP)
            for t in range(TOKENS):
                held.append(t)
                reads[batch, head, t] = list(held)
                keys, values = (
                    torch.stack([(x if t - i < WINDOW else stored)[batch, head, i] for i in held])
                    for x, stored in ((k, stored_k), (v, stored_v))
                )
                for h in heads:
                    weights = (keys @ q[batch, h, t] * SCALE).softmax(0)
                    result[batch, h, t] = weights @ values
                    for i, weight in zip(held, weights.tolist(), strict=True):
                        sums[i] += weight
                steps = t + 1 - hitters.prompt
                if steps == 0 or (steps > 0 and steps % hitters.every == 0):
                    latest = [i for i in held if i > t - hitters.recent]
                    others = sorted((i for i in held if i not in latest), key=lambda i: -sums[i])
                    held = sorted([*latest, *others[: hitters.budget - hitters.recent]])
    return result, reads


@given(
    budget=st.integers(1, TOKENS + 2),
    recent=st.integers(1, TOKENS),
    every=st.integers(1, 7),
    prompt=st.integers(0, TOKENS),
)
@example(budget=6, recent=2, every=1, prompt=0)
@example(budget=6, recent=2, every=4, prompt=9)
@example(budget=6, recent=6, every=1, prompt=TOKENS)
def test_each_query_reads_what_has_not_left(budget, recent, every, prompt):
    hitters = HeavyHitters(budget, min(recent, budget), every, prompt)
    q, k, v, stored_k, stored_v = tensors()
    expected, reads = one_by_one(q, k, v, stored_k, stored_v, hitters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eviction, "_QUERIES", 5)
        actual = eviction.attention(q, k, v, stored_k, stored_v, WINDOW, SCALE, hitters)
        mask = eviction.readable(q, k, stored_k, WINDOW, SCALE, hitters)
    torch.testing.assert_close(actual, expected)
    for (batch, head, t), held in reads.items():
        assert mask[batch, head, t].nonzero().flatten().tolist() == held
        assert t < prompt or len(held) <= budget + every


def test_where_nothing_leaves_it_is_the_attention_of_the_study():
    everything = HeavyHitters(budget=TOKENS, recent=1)
    expected = teacher_forced.attention(*tensors(), WINDOW, SCALE)
    torch.testing.assert_close(eviction.attention(*tensors(), WINDOW, SCALE, everything), expected)


def test_no_query_knows_of_a_later_token():
    hitters, at = HeavyHitters(budget=6, recent=2), 15
    before, other = tensors(), tensors(seed=1)
    changed = [torch.cat([x[:, :, :at], y[:, :, at:]], 2) for x, y in zip(before, other, strict=True)]
    a, b = (eviction.attention(*x, WINDOW, SCALE, hitters) for x in (before, changed))
    assert torch.equal(a[:, :, :at], b[:, :, :at])
    assert not torch.equal(a[:, :, at:], b[:, :, at:])


@pytest.mark.parametrize("numbers", [(4, 5), (4, 0), (0, 1), (4, 2, 0), (4, 2, 1, -1)])
def test_numbers_that_contradict_each_other(numbers):
    with pytest.raises(ValueError, match="1 <= recent <= budget"):
        HeavyHitters(*numbers)
