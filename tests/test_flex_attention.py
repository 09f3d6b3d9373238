"""flex_attention over a cache: its functions and its lists of blocks must come out as scores and one mask."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from compilers import without_compiler, without_inductor
from models import BufferModel, TupleModel, full_attention_layers, hf_model, prompt, pruned_steps, run_steps
from mustafar_compile import CompressedKV, explain
from nightly import at_night
from reference import pruned_cache, pruned_generation, reference_attention

pytestmark = pytest.mark.usefixtures("no_grad")
BATCH, HEADS, KV_HEADS, PAST, DIM, WINDOW = 2, 4, 2, 300, 16, 4
TOKENS = PAST + 1
HIDDEN = torch.tensor([7, 140])  # tokens at the front that each row must not see


def step(q, k, v, past, block_mask, **how):
    k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True, **how), (k, v)


def inputs():
    torch.manual_seed(0)
    q = torch.randn(BATCH, HEADS, 1, DIM)
    k, v = torch.randn(2, BATCH, KV_HEADS, 1, DIM)
    return q, k, v, tuple(torch.randn(2, BATCH, KV_HEADS, PAST, DIM))


def compiled(block_mask, forward=step, sparsity=0.5):
    options = {"window": WINDOW, "key_sparsity": sparsity, "value_sparsity": sparsity}
    with without_compiler(), explain() as report:
        out, caches = torch.compile(forward, backend="mustafar", options=options)(*inputs(), block_mask)
    return out, caches, report


def joined(past, new):
    """K and V with the new token."""
    return [torch.cat(pair, dim=2) for pair in zip(past, new, strict=True)]


def check(block_mask, visible):
    """``visible``: boolean, broadcastable to [B, Hq, 1, S]."""
    out, caches, report = compiled(block_mask)
    assert [entry.phases for entry in report.matched] == [("decode",)], str(report)
    assert all(isinstance(x, CompressedKV) for x in caches)
    q, k, v, past = inputs()
    k, v = joined(past, (k, v))
    torch.testing.assert_close(out, reference_attention(q, k, v, 0.5, 0.5, WINDOW, visible))


def behind_padding(b, h, q, kv):
    return kv >= HIDDEN[b]


def of_each_head(b, h, q, kv):
    return (kv + h) % 3 > 0


def masked(mask_mod, **how):
    return create_block_mask(mask_mod, BATCH, HEADS, 1, TOKENS, device="cpu", **how)


def test_a_mask_that_reads_a_tensor():
    tokens = torch.arange(TOKENS)
    check(masked(behind_padding), (tokens >= HIDDEN[:, None])[:, None, None])


def test_a_mask_for_each_head():
    tokens, heads = torch.arange(TOKENS), torch.arange(HEADS)[:, None, None]
    check(masked(of_each_head, BLOCK_SIZE=32), (tokens + heads) % 3 > 0)


def test_blocks_that_are_not_listed_are_masked():
    """The function alone would allow all of them; unused places of a list hold anything."""
    counts = torch.tensor([2, 1], dtype=torch.int32).view(BATCH, 1, 1)
    blocks = torch.tensor([[0, 2, 1], [1, 0, 2]], dtype=torch.int32).view(BATCH, 1, 1, 3)
    block_mask = BlockMask.from_kv_blocks(counts, blocks, seq_lengths=(1, TOKENS), compute_q_blocks=False)
    block = torch.arange(TOKENS) // 128
    check(block_mask, torch.stack([block != 1, block == 1])[:, None, None])


def test_the_function_is_not_asked_in_full_blocks():
    counts, blocks = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 3, dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(
        counts, blocks, counts, blocks + 2, mask_mod=of_each_head, seq_lengths=(1, TOKENS), compute_q_blocks=False
    )
    tokens, heads = torch.arange(TOKENS), torch.arange(HEADS)[:, None, None]
    check(block_mask, ((tokens + heads) % 3 > 0) & (tokens < 128) | (tokens >= 256))


SLOPES, BIAS = torch.linspace(0.01, 0.1, HEADS), torch.linspace(-1, 1, TOKENS)


def halved(score, b, h, q, kv):
    return score / 2


def capped(score, b, h, q, kv):
    return 2.0 * torch.tanh(score / 2.0)


def alibi(score, b, h, q, kv):
    return score - SLOPES[h] * (PAST + q - kv)


def capped_biased_and_masked(score, b, h, q, kv):
    score = 2.0 * torch.tanh(score / 2.0) + BIAS[kv]
    return torch.where((kv + h) % 5 > 0, score, -float("inf"))


@pytest.mark.parametrize(
    ("score_mod", "sparsity"),
    [
        (capped_biased_and_masked, 0.5),
        *at_night([(halved, 0.5), (capped, 0.5), (alibi, 0.5), (capped_biased_and_masked, 0.0)]),
    ],
)
def test_a_function_of_scores(score_mod, sparsity):
    """The oracle is flex attention itself, over a pruned cache."""

    def forward(*args):
        return step(*args, score_mod=score_mod)

    out, caches, report = compiled(masked(behind_padding), forward, sparsity)
    assert [entry.phases for entry in report.matched] == [("decode",)], str(report)
    assert all(isinstance(x, CompressedKV) for x in caches)
    q, k, v, past = inputs()
    k, v = (pruned_cache(x, sparsity, WINDOW) for x in joined(past, (k, v)))
    expected = flex_attention(q, k, v, score_mod, masked(behind_padding), enable_gqa=True)
    torch.testing.assert_close(out, expected)
    plain = flex_attention(q, k, v, None, masked(behind_padding), enable_gqa=True)
    assert not torch.allclose(out, plain, atol=1e-2), "else this test would say nothing"


def of_its_size(score, b, h, q, kv):
    return score + torch.sigmoid(score)


def of_the_head(score, b, h, q, kv):
    return score * SLOPES[h]


def unless_small(score, b, h, q, kv):
    return torch.where(score > 0, score, -float("inf"))


def with_a_tensor_of_its_own(score, b, h, q, kv):
    return score + torch.tensor([1.0, 2.0, 3.0, 4.0])[h]


NOT_READ = "the function of flex_attention is more than a scale, a softcap, a mask and what is added"
TABLE = torch.ones(4, 5)


def row_of_table(b, h, q, kv):
    return TABLE[kv % 4].sum() > 0


@pytest.mark.parametrize(
    ("mask_mod", "score_mod", "reason"),
    [
        (behind_padding, of_its_size, NOT_READ),
        (behind_padding, of_the_head, NOT_READ),
        (behind_padding, unless_small, NOT_READ),
        (
            behind_padding,
            with_a_tensor_of_its_own,
            "a function of flex_attention makes a tensor; accepted are tensors from outside",
        ),
        (row_of_table, None, "a function of flex_attention calls aten.index.Tensor, which is not supported"),
    ],
)
def test_what_is_not_written_out(mask_mod, score_mod, reason):
    def forward(*args):
        return step(*args, score_mod=score_mod)

    out, _, report = compiled(masked(mask_mod), forward)
    assert {entry.reason for entry in report.missed} == {reason}
    torch.testing.assert_close(out, forward(*inputs(), masked(mask_mod))[0])


def causal(b, h, q, kv):
    return q >= kv


def shifted(mask_mod, offset):
    return lambda b, h, q, kv: mask_mod(b, h, q + offset, kv)


class IndexedBlocks(BufferModel):
    """gpt-fast: of the mask of all queries a step takes the row of blocks of its own, and shifts the function."""

    def __init__(self) -> None:
        super().__init__(batch=1, slots=3 * 128)
        self.blocks = create_block_mask(causal, 1, 1, 3 * 128, 3 * 128, device="cpu")

    def step(self, x, positions):
        if x.shape[1] > 1:
            return super().step(x, positions)
        mask = self.blocks[:, :, positions // self.blocks.BLOCK_SIZE[0]]
        mask.mask_mod = shifted(causal, positions[0])
        mask.seq_lengths = (1, self.k_cache.shape[2])
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        self.write(self.k_cache, k, positions)
        self.write(self.v_cache, v, positions)
        return self.merge(flex_attention(q, self.k_cache, self.v_cache, block_mask=mask, enable_gqa=True))


class BlocksMadeInTheStep(TupleModel):
    """The mask of a growing cache, made where it is used."""

    def step(self, x, past):
        if past is None:
            return super().step(x, past)
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        tokens = k.shape[2]
        mask = create_block_mask(lambda b, h, q, kv: q + tokens - 1 >= kv, 1, 1, 1, tokens, device="cpu")
        return self.merge(flex_attention(q, k, v, block_mask=mask, enable_gqa=True)), (k, v)


@pytest.mark.parametrize("form", [IndexedBlocks, *at_night([BlocksMadeInTheStep])])
def test_a_mask_that_is_made_in_the_graph(form):
    """Where blocks are listed, also when a mask is indexed, torch counts them in a vmap."""
    torch.manual_seed(0)
    model = form()
    inputs = [torch.randn(1, n, 32) for n in (200, 1, 1, 1)]
    attention = functools.partial(reference_attention, key_sparsity=0.5, value_sparsity=0.5, window=WINDOW)
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options={"window": WINDOW})
        torch.testing.assert_close(run_steps(model, inputs, step), pruned_steps(model, inputs, attention))
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")], str(report)
    assert report.graphs == 2


@pytest.mark.nightly
def test_generation():
    """With a growing cache: transformers itself does not generate over a static one."""
    how = {"max_new_tokens": 4, "do_sample": False}
    with pruned_generation(0.5, 0.5, WINDOW):
        expected = hf_model().generate(**prompt(padded=True), **how)
    model = hf_model()
    model.set_attn_implementation("flex_attention")
    with without_inductor(), explain() as report:
        model.compile(backend="mustafar", options={"window": WINDOW})
        assert torch.equal(model.generate(**prompt(padded=True), **how), expected)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")] * full_attention_layers(model)
