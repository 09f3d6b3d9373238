"""What must not match, each with its reason. Everything here must also compute the same as eager."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import NothingMatchedError, _compat, explain
from mustafar_compile.patterns.attention import scores

pytestmark = pytest.mark.usefixtures("no_grad")


class Decode(nn.Module):
    """A decode step over a past [B, H, S, D]; subclasses vary one thing that matters."""

    head_dim = 16
    dtype = torch.float32

    def forward(self, q, k, v, past):
        keys, values = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.attend(q, keys, values), (keys, values)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def inputs(self):
        torch.manual_seed(0)
        shapes = [(2, 2, 1, self.head_dim)] * 3 + [(2, 2, 6, self.head_dim)] * 2
        q, k, v, *past = (torch.randn(s).to(self.dtype) for s in shapes)
        return q, k, v, tuple(past)


class Plain(Decode):
    reason = None


class Causal(Decode):
    reason = "is_causal=True with one query attends to the first key only"

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Dropout(Decode):
    reason = "dropout is active; call model.eval()"

    def attend(self, q, k, v):
        torch.manual_seed(3)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5).isfinite().float()


class OddHeadDim(Decode):
    reason = "head_dim 12 is not a multiple of 8"
    head_dim = 12


class Double(Decode):
    reason = "cache dtype float64 is not one of float32, float16, bfloat16"
    dtype = torch.float64


class LatentKeys(Decode):
    reason = "keys are computed from what is cached, as in latent attention"

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k @ torch.eye(16).flip(0), v)


class KeysRotatedLate(Decode):
    """OLMo, x-transformers: keys are cached as they are, and all of them rotated at each step."""

    reason = "keys are changed once they are cached, as by a rotary embedding; cache them as attention takes them"

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, self.rotated(k), v)

    def rotated(self, k):
        angles = torch.arange(k.shape[2])[:, None] * torch.linspace(0, 1, 16)
        first, second = k.chunk(2, dim=-1)
        return k * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class ChangedValues(Decode):
    reason = "values are changed once they are cached, as by a rotary embedding; cache them as attention takes them"

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v * torch.linspace(1, 2, 16))


class ScaledValues(Decode):
    reason = "values are scaled between their cache and the attention"

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v * 2)


class PartlyRead(Decode):
    reason = "the cache is changed between its update and the attention"

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k[:, :, 2:], v[:, :, 2:])


class FirstTokensRead(Decode):
    reason = "only a part of the cache is attended"

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5])


class TwoTokensForOneQuery(Decode):
    reason = "not one new token for each query"

    def inputs(self):
        q, _, _, past = super().inputs()
        return q, torch.randn(2, 2, 2, 16), torch.randn(2, 2, 2, 16), past


class ThreeDimensions(Decode):
    reason = "the query has 3 dimensions; accepted are [B, H, L, D]"

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, (2, 2))


class TiledHeads(Decode):
    reason = "query heads are not grouped over KV heads as [B, H, S, D] or [B, S, H, D] caches allow"

    def attend(self, q, k, v):
        q = q.repeat_interleave(2, dim=1)
        k = k[:, None].expand(2, 2, 2, 7, 16).reshape(2, 4, 7, 16)  # heads 0 1 0 1, not 0 0 1 1
        return F.scaled_dot_product_attention(q, k, v.repeat_interleave(2, dim=1))


class NotReturned(Decode):
    reason = "the updated cache does not leave the graph"

    def forward(self, q, k, v, past):
        out, _ = super().forward(q, k, v, past)
        return out


class SharedInTwoWays(Decode):
    reason = "its cache is read by several attention layers in different ways"

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q * 2, v, k)


class KeysAreValues(Decode):
    reason = "its keys are its values"

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, k)


class AlsoSummed(Decode):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v) + v.sum()

    line = attend.__code__.co_firstlineno + 1
    reason = f"the updated cache is also used by aten.sum.default at test_matching.py:{line}"


class SlidingWindow(Decode):
    reason = "cache is bounded by a sliding window of 5"

    def forward(self, q, k, v, past):
        out, (keys, values) = super().forward(q, k, v, past)
        return out, (keys[:, :, -4:], values[:, :, -4:])


class ManyQueries(Decode):
    reason = "its attention is not causal"

    def inputs(self):
        torch.manual_seed(0)
        return *(torch.randn(2, 2, 3, 16) for _ in range(3)), tuple(torch.randn(2, 2, 6, 16) for _ in range(2))


class CappedBehindTheMask(Decode):
    reason = "the scores are more than a scaled product, a softcap and an additive mask"

    def attend(self, q, k, v):
        scores = torch.tanh(q @ k.transpose(2, 3) / 5 + torch.linspace(-1, 1, 7)) * 5
        return scores.softmax(-1) @ v


class MultipliedScores(Decode):
    reason = CappedBehindTheMask.reason

    def attend(self, q, k, v):
        return (q @ k.transpose(2, 3) * torch.linspace(0, 1, 7)).softmax(-1) @ v


class MaskedByTheScores(Decode):
    """What is attended to follows from all the scores, which are never there at once."""

    reason = CappedBehindTheMask.reason

    def attend(self, q, k, v):
        scores = q @ k.transpose(2, 3)
        return scores.masked_fill(scores < scores.mean(-1, keepdim=True), float("-inf")).softmax(-1) @ v


class BiasedByTheScores(Decode):
    reason = CappedBehindTheMask.reason

    def attend(self, q, k, v):
        scores = q @ k.transpose(2, 3)
        return (scores + scores.sigmoid()).softmax(-1) @ v


class Floored(Decode):
    """Scores of -1 and less are raised."""

    reason = CappedBehindTheMask.reason

    def attend(self, q, k, v):
        return (q @ k.transpose(2, 3)).maximum(torch.tensor(-1.0)).softmax(-1) @ v


class WeaklyMasked(Decode):
    """A score of -1 is still attended to."""

    reason = CappedBehindTheMask.reason

    def attend(self, q, k, v):
        return (q @ k.transpose(2, 3)).masked_fill(torch.arange(7) < 3, -1.0).softmax(-1) @ v


class SoftmaxOverHeads(Decode):
    reason = None

    def attend(self, q, k, v):
        return (q @ k.transpose(2, 3)).softmax(1) @ v


class WeightsReturned(Decode):
    reason = (
        "the attention weights are used by more than the product with the values, as with output_attentions=True; "
        "they are never all computed over a compressed cache"
    )

    def attend(self, q, k, v):
        weights = (q @ k.transpose(2, 3)).softmax(-1)
        return weights @ v, weights


class ColumnDropped(Decode):
    reason = "a column is dropped from the attention weights that is not one of sinks"

    def attend(self, q, k, v):
        return (q @ F.pad(k, (0, 0, 0, 1)).transpose(2, 3)).softmax(-1)[..., :-1] @ v


class SinksOfTheQuery(Decode):
    reason = "the column of attention sinks is not one number for each query head"

    def attend(self, q, k, v):
        scores = torch.cat([q @ k.transpose(2, 3), q.sum(-1, keepdim=True)], dim=-1)
        return scores.softmax(-1)[..., :-1] @ v


class BatchMixed(Decode):
    """Every row attends to the cache of the other one."""

    reason = KeysRotatedLate.reason

    def attend(self, q, k, v):
        return (q @ k.flip(0).transpose(2, 3)).softmax(-1) @ v


class HeadsOutermost(Decode):
    """Products [H * B, L, S]: heads before rows."""

    reason = "query heads are not grouped over KV heads as [B, H, S, D] or [B, S, H, D] caches allow"

    def attend(self, q, k, v):
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
        return ((q @ k.transpose(1, 2)).softmax(-1) @ v).unflatten(0, (2, 2)).transpose(0, 1)


class OneRowForAll(Decode):
    """A cache of one row and one head that all rows of the batch attend to."""

    reason = HeadsOutermost.reason

    def inputs(self):
        q, *_ = super().inputs()
        return q, torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16), (torch.randn(1, 1, 6, 16),) * 2

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k.expand(2, 2, 7, 16), v.expand(2, 2, 7, 16))


class LinearAttention(Decode):
    reason = "the scores are more than a scaled product, a softcap and an additive mask"

    def attend(self, q, k, v):
        return q.softmax(-1) @ (k.softmax(-2).transpose(2, 3) @ v)


class NoCache(Decode):
    reason = "keys and values do not come from a KV cache"

    def forward(self, q, k, v, past):
        return self.attend(q, past[0] + 0, past[1] + 0)


class CrossAttention(Decode):
    reason = "no token enters its cache, as in cross-attention"

    def forward(self, q, k, v, past):
        return self.attend(q * 2, *past)


class BrokenOff(Decode):
    reason = "a graph break lies between its cache and the attention, whose query comes into the graph as it is"

    def forward(self, q, k, v, past):
        return self.attend(q.transpose(1, 2).transpose(1, 2), *past)


class FlatCache(Decode):
    """Heads along the batch, as in older models."""

    reason = "its cache has 3 dimensions; accepted are caches of four, [B, H, S, D] or [B, S, H, D]"

    def forward(self, q, k, v, past):
        flat = [torch.cat([cache, new.flatten(0, 1)], 1) for cache, new in zip(past, (k, v), strict=True)]
        return self.attend(q, *(x.view(2, 2, -1, 16) for x in flat)), flat

    def inputs(self):
        q, k, v, past = super().inputs()
        return q, k, v, tuple(x.flatten(0, 1) for x in past)


class FlatBuffer(FlatCache):
    def forward(self, q, k, v, past):
        for cache, new in zip(past, (k, v), strict=True):
            cache[:, 5:6] = new.flatten(0, 1)
        return self.attend(q, *(x.view(2, 2, -1, 16) for x in past))


class OneCacheForBoth(Decode):
    reason = "keys are a part of what its cache holds; cache keys and values apart"

    def forward(self, q, k, v, past):
        both = torch.cat([past, torch.cat([k, v], -1)], 2)
        return self.attend(q, *both.split(16, -1)), both

    def inputs(self):
        q, k, v, past = super().inputs()
        return q, k, v, torch.cat(past, -1)


class OneCacheOfFiveDimensions(Decode):
    reason = "its cache has 5 dimensions; accepted are caches of four, [B, H, S, D] or [B, S, H, D]"

    def forward(self, q, k, v, past):
        past[:, :, :, 5] = torch.stack([k, v]).squeeze(3)
        return self.attend(q, *past)

    def inputs(self):
        q, k, v, past = super().inputs()
        return q, k, v, torch.stack(past)


class Dropped(Decode):
    reason = "dropout is active; call model.eval()"

    def attend(self, q, k, v):
        return F.dropout((q @ k.transpose(2, 3) / 4).softmax(-1), 1e-9) @ v


class Gated(Decode):
    reason = "the attention weights are changed by aten.mul.Tensor before the product with the values"

    def attend(self, q, k, v):
        return ((q @ k.transpose(2, 3) / 4).softmax(-1) * torch.tensor([1.0, 2.0]).view(2, 1, 1)) @ v


class UnmaskedBuffer(Decode):
    reason = "the whole buffer is attended without a mask, also where nothing is written"

    def forward(self, q, k, v, past):
        past[0][:, :, torch.tensor([3])] = k
        past[1][:, :, torch.tensor([3])] = v
        return self.attend(q, *past)


class ParameterCache(UnmaskedBuffer):
    reason = "the cache is a parameter; make it a buffer"

    def inputs(self):
        *rest, past = super().inputs()
        return *rest, tuple(nn.Parameter(x, requires_grad=False) for x in past)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(1, 6, dtype=torch.bool))


class TokenAtManyPlaces(UnmaskedBuffer):
    """One token, repeated, the newest of its places not the first."""

    reason = "its cache is written by aten.index_put.default in a way that is not recognised"

    def forward(self, q, k, v, past):
        past[0][:, :, torch.tensor([3, 1])], past[1][:, :, torch.tensor([3, 1])] = k, v
        return F.scaled_dot_product_attention(q, *past, attn_mask=torch.arange(6)[None] < 4)


class DifferentPositions(UnmaskedBuffer):
    reason = "keys and values are written at different positions"

    def forward(self, q, k, v, past):
        past[0][:, :, torch.tensor([3])] = k
        past[1][:, :, torch.tensor([2])] = v
        return F.scaled_dot_product_attention(q, *past, attn_mask=torch.ones(1, 6, dtype=torch.bool))


class RandomPositions(DifferentPositions):
    """The same op with the same arguments, drawn twice."""

    def forward(self, q, k, v, past):
        past[0][:, :, torch.randint(3, 4, (1,))] = k
        past[1][:, :, torch.randint(3, 4, (1,))] = v
        return F.scaled_dot_product_attention(q, *past, attn_mask=torch.ones(1, 6, dtype=torch.bool))


class CrossPrefill(Decode):
    """The first step of an encoder-decoder: keys of the encoder's tokens enter a cache and never grow."""

    reason = "its keys are not those of the query's own tokens, as in cross-attention"

    def forward(self, q, k, v, past):
        keys, values = torch.cat([torch.tensor([]), past[0] * 2], -2), torch.cat([torch.tensor([]), past[1] * 2], -2)
        return self.attend(q, keys, values), (keys, values)


class Bidirectional(CrossPrefill):
    reason = "its attention is not causal"

    def inputs(self):
        _, *rest = super().inputs()
        return torch.randn(2, 2, 6, 16), *rest


class CrossPrefillOfEqualLength(nn.Module):
    """As many tokens of the encoder as queries, under a mask: only where they come from tells them apart."""

    reason = "its keys are not those of the query's own tokens, as in cross-attention"

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x, encoded):
        q, k, v = (
            project(t).unflatten(-1, (2, 16)).transpose(1, 2)
            for project, t in ((self.q, x), (self.k, encoded), (self.v, encoded))
        )
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), (k, v)

    def inputs(self):
        torch.manual_seed(0)
        return torch.randn(2, 5, 32), torch.randn(2, 5, 32)


class CausalOverPast(ManyQueries):
    reason = "is_causal=True over a past lets queries attend to the first keys only"

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class KeysOnly(Decode):
    reason = "keys and values are cached in different ways"

    def forward(self, q, k, v, past):
        keys, values = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2) * 2
        return self.attend(q, keys, values), (keys, values)


class CachedInDifferentWays(UnmaskedBuffer):
    reason = "keys and values are cached in different ways"

    def forward(self, q, k, v, past):
        keys = torch.cat([past[0], k], 2)
        past[1][:, :, torch.tensor([5])] = v
        return F.scaled_dot_product_attention(q, keys, past[1], attn_mask=torch.ones(1, 6, dtype=torch.bool)), keys

    def inputs(self):
        q, k, v, (keys, values) = super().inputs()
        return q, k, v, (keys[:, :, :5].clone(), values)


class OutOfPlaceBuffer(UnmaskedBuffer):
    reason = "the updated cache is a new tensor and is not written back to its buffer"

    def forward(self, q, k, v, past):
        keys, values = (p.index_copy(2, torch.tensor([3]), x) for p, x in zip(past, (k, v), strict=True))
        return (
            F.scaled_dot_product_attention(q, keys, values, attn_mask=torch.ones(1, 6, dtype=torch.bool)),
            keys,
            values,
        )


class WrongPart(UnmaskedBuffer):
    reason = (
        "a part of the buffer is attended without a mask, and nothing shows that it ends with the new tokens; give "
        "attention a mask, or write at a Python number and attend up to the last token written"
    )

    def forward(self, q, k, v, past):
        past[0][:, :, 3:4], past[1][:, :, 3:4] = k, v
        return self.attend(q, past[0][:, :, :5], past[1][:, :, :5])


class CutUnmasked(UnmaskedBuffer):
    """Written at a position that only the device knows."""

    reason = WrongPart.reason

    def inputs(self):
        return *super().inputs(), torch.tensor([3])

    def forward(self, q, k, v, past, position):
        past[0][:, :, position], past[1][:, :, position] = k, v
        return self.attended(q, past[0][:, :, :4], past[1][:, :, :4])

    def attended(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class CutUnderOneColumn(CutUnmasked):
    """A mask that is the same for all columns says of none that nothing is written there."""

    def attended(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(1, 1, 1, 1))


class CutAtRowsApart(CutUnmasked):
    """Places that numbers of the host make, other ones for each row."""

    def forward(self, q, k, v, past, position):
        position = torch.arange(2)[:, None] + 2
        for cache, new in zip(past, (k, v), strict=True):
            cache[torch.arange(2)[:, None], :, position] = new.transpose(1, 2)
        return self.attended(q, past[0][:, :, :3], past[1][:, :, :3])


class HeadsCut(CutUnmasked):
    """One of two KV heads, of which there are as many tokens as of the mask."""

    reason = "only a part of the cache is attended"

    def forward(self, q, k, v, past, position):
        past[0][:, :, position], past[1][:, :, position] = k, v
        mask = torch.arange(6)[None] <= position
        return F.scaled_dot_product_attention(q, past[0][:, :1], past[1][:, :1], attn_mask=mask, enable_gqa=True)


class ChannelsCut(HeadsCut):
    def forward(self, q, k, v, past, position):
        past[0][:, :, position], past[1][:, :, position] = k, v
        mask = torch.arange(6)[None] <= position
        return F.scaled_dot_product_attention(q[..., :8], past[0][..., :8], past[1], attn_mask=mask)


class BroadcastToken(UnmaskedBuffer):
    reason = "the new token is broadcast into the cache"

    def forward(self, q, k, v, past):
        here = (torch.arange(6) == 3).view(1, 1, -1, 1)
        past[0].copy_(torch.where(here, k[:, :1], past[0]))
        past[1].copy_(torch.where(here, v[:, :1], past[1]))
        return F.scaled_dot_product_attention(q, *past, attn_mask=torch.ones(1, 6, dtype=torch.bool))


class BufferRotatedLate(KeysRotatedLate):
    """The same in a buffer."""

    def forward(self, q, k, v, past):
        position = torch.tensor([3])
        past[0][:, :, position], past[1][:, :, position] = k, v
        mask = torch.arange(6)[None] <= position
        return F.scaled_dot_product_attention(q, self.rotated(past[0]), past[1], attn_mask=mask)


class ScaledBuffer(UnmaskedBuffer):
    """A blend that does not leave the other tokens as they are."""

    reason = "its cache is written by aten.add.Tensor in a way that is not recognised"

    def forward(self, q, k, v, past):
        here = F.one_hot(torch.tensor([3]), 6).float().view(1, 1, -1, 1)
        past[0].copy_(past[0] * (2 - here) + k * here)
        past[1].copy_(past[1] * (2 - here) + v * here)
        return F.scaled_dot_product_attention(q, *past, attn_mask=torch.ones(1, 6, dtype=torch.bool))


class UnknownMask(UnmaskedBuffer):
    """A choice by a mask that may be true anywhere."""

    reason = "its cache is written by aten.where.self in a way that is not recognised"

    def forward(self, q, k, v, past):
        here = (q[0, 0, 0, :6] > 0).view(1, 1, -1, 1)
        past[0].copy_(torch.where(here, k, past[0]))
        past[1].copy_(torch.where(here, v, past[1]))
        return F.scaled_dot_product_attention(q, *past, attn_mask=torch.ones(1, 6, dtype=torch.bool))


class MovedPast(Decode):
    """New tokens join a past that was changed on its way, so what leaves the graph is not the past with them behind."""

    reason = "its past is moved, cast or changed before the new tokens join it"

    def changed(self, past):
        return past.transpose(0, 1)

    def forward(self, q, k, v, past):
        return super().forward(q, k, v, tuple(map(self.changed, past)))


class MovedValues(MovedPast):
    def forward(self, q, k, v, past):
        return Decode.forward(self, q, k, v, (past[0], self.changed(past[1])))


class RoundedPast(MovedPast):
    def changed(self, past):
        return past.bfloat16().float()


class CastPast(MovedPast):
    def changed(self, past):
        return past.bfloat16()

    def inputs(self):
        q, k, v, past = super().inputs()
        return q.bfloat16(), k.bfloat16(), v.bfloat16(), past


class RepeatedPast(MovedPast):
    def changed(self, past):
        return past[:, :1].expand(2, 2, 6, 16)


class TokensMixed(MovedPast):
    """Heads and tokens change places: sizes alone do not tell."""

    def changed(self, past):
        return past.reshape(2, 6, 2, 16).transpose(1, 2)


class NotAttended(Decode):
    """A cache that takes up tokens in this graph and is attended to in another."""

    reason = "keys and values do not come from a KV cache"

    def forward(self, q, k, v, past):
        return self.attend(q, k * 1, v * 1), (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))


COUNTER_EXAMPLES = [c for c in Decode.__subclasses__() if c is not Plain]
COUNTER_EXAMPLES += [
    *UnmaskedBuffer.__subclasses__(),
    *CutUnmasked.__subclasses__(),
    ChannelsCut,
    BufferRotatedLate,
    RandomPositions,
    *MovedPast.__subclasses__(),
    Bidirectional,
    CrossPrefillOfEqualLength,
    CausalOverPast,
]


def run(model, **options):
    inputs = model.inputs()
    expected = model(*copy.deepcopy(inputs))
    with without_compiler(), explain() as report:
        actual = torch.compile(model, backend="mustafar", options={"window": 2} | options)(*inputs)
    return actual, expected, report


@pytest.mark.parametrize("counter_example", COUNTER_EXAMPLES, ids=lambda c: c.__name__)
def test_counter_example_runs_as_it_is_and_says_why(counter_example):
    actual, expected, report = run(counter_example())
    assert not report.matched
    assert {entry.reason for entry in report.missed} == ({counter_example.reason} - {None})
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_a_cache_that_one_of_two_attentions_cannot_share():
    class Shared(Decode):
        def attend(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v, is_causal=True)

    actual, expected, report = run(Shared())
    reasons = [entry.reason for entry in report.missed]
    assert reasons == [f"another attention that reads its cache does not match: {Causal.reason}", Causal.reason]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_the_plain_step_that_they_vary_matches():
    _, _, report = run(Plain())
    assert len(report.matched) == 1
    assert not report.missed


class Mapped(Decode):
    """A vmap in a vmap, over a write into a tensor and a constant, and one with two results."""

    def attend(self, q, k, v):
        def of_head(x):
            x = x * torch.tensor(2.0)
            x[0] = 1
            return x

        out = torch.vmap(torch.vmap(of_head))(super().attend(q, k, v))
        total, q = torch.vmap(lambda x, y: (x + y, y), in_dims=(0, None))(out, q[0])
        return total * q


def test_a_vmap_beside_attention():
    (actual, _), (expected, _), report = run(Mapped(), key_sparsity=0, value_sparsity=0)
    assert [entry.phases for entry in report.matched] == [("decode",)], str(report)
    torch.testing.assert_close(actual, expected)


class MappedAttention(Decode):
    def attend(self, q, k, v):
        return torch.vmap(super().attend)(q, k, v)


def test_attention_in_a_vmap_is_reported():
    actual, expected, report = run(MappedAttention())
    (entry,) = report.missed
    assert entry.reason.startswith("the graph could not be traced at test_matching.py:"), entry.reason
    assert entry.reason.endswith("there is attention in a vmap")
    torch.testing.assert_close(actual, expected)


class Derived(Decode):
    """A derivative, whose level a graph enters and leaves by calls of its own."""

    def attend(self, q, k, v):
        return torch.func.grad(lambda x: (x * q).sum())(super().attend(q, k, v))


def test_an_untraceable_graph_leaves_no_level_open():
    actual, expected, report = run(Derived())
    assert report.missed[0].reason.startswith("the graph could not be traced")
    assert _compat.tracing._functorch_depth() == 0
    torch.testing.assert_close(actual, expected)


class DerivedUnderAutocast(Derived):
    def attend(self, q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().attend(q, k, v)


def test_an_untraceable_graph_leaves_no_autocast_on():
    _, _, report = run(DerivedUnderAutocast())
    assert "the graph could not be traced" in report.missed[0].reason
    assert not torch.is_autocast_enabled("cpu")
    assert torch.ones(1, 1).matmul(torch.ones(1, 1)).dtype == torch.float32


class SpelledOut(Decode):
    """The eager attention of transformers. Tracing asserts the dtype of the weights before it casts them."""

    reason = None

    def attend(self, q, k, v):
        weights = F.softmax(q @ k.transpose(2, 3) * 0.25, dim=-1, dtype=torch.float32).to(q.dtype)
        return F.dropout(weights, p=0.0, training=False) @ v


def test_attention_spelled_out_matches():
    _, _, report = run(SpelledOut())
    assert len(report.matched) == 1
    assert not report.missed


class Nested(Decode):
    """Scores with themselves on both sides of each sum."""

    levels = 40

    def attend(self, q, k, v):
        scores = q @ k.mT
        for _ in range(self.levels):
            scores = scores + 0.1 * torch.tanh(scores)
        return scores.softmax(-1) @ v


def test_scores_are_read_once_each(monkeypatch):
    """However often they are used: reading them for each use took 2^levels reads."""
    reads, read = [], scores.read_product
    monkeypatch.setattr(scores, "read_product", lambda node: reads.append(node) or read(node))
    _, _, report = run(Nested())
    assert report.missed[0].reason.startswith("the scores are more than")
    assert Nested.levels < len(reads) == len(set(reads)) <= 3 * Nested.levels


@pytest.mark.parametrize("counter_example", [Causal, NotReturned])
def test_strict_raises_with_the_reason(counter_example):
    with pytest.raises(Exception, match=counter_example.reason) as caught:
        run(counter_example(), strict=True)
    assert NothingMatchedError.__name__ in str(caught.value)


def test_strict_judges_models_without_attention_but_not_helpers():
    with pytest.raises(Exception, match="this graph holds no attention"), without_compiler():
        torch.compile(nn.Linear(2, 2), backend="mustafar", options={"strict": True})(torch.zeros(1, 2))
    with without_compiler():
        torch.compile(torch.sin, backend="mustafar", options={"strict": True})(torch.zeros(2))


def test_gradients_pass_through_and_are_right():
    model = hf_model()
    twin = copy.deepcopy(model)
    with torch.enable_grad(), without_compiler(), explain() as report:
        compiled = torch.compile(model, backend="mustafar")
        compiled(**prompt(), labels=prompt()["input_ids"]).loss.backward()
        twin(**prompt(), labels=prompt()["input_ids"]).loss.backward()
    assert not report.matched
    assert all("gradients are enabled" in entry.reason for entry in report.missed)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_an_untraceable_graph_runs_and_is_reported(monkeypatch):
    from mustafar_compile import backend

    def trip(*_):
        raise RuntimeError("no way\nmore")

    monkeypatch.setattr(backend, "normalise", trip)
    actual, expected, report = run(Plain())
    assert [entry.reason for entry in report.missed] == ["the graph could not be traced: RuntimeError: no way"]
    torch.testing.assert_close(actual, expected)
