"""Whole models and generate loops in the form that well-known repositories give them, written anew."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from compilers import without_compiler
from mustafar_compile import explain
from nightly import at_night

LAYERS, WIDTH, HEADS, KV_HEADS, DIM, SLOTS, VOCABULARY = 2, 32, 4, 2, 16, 32, 60
OPTIONS = {"key_sparsity": 0.0, "value_sparsity": 0.0, "window": 4}


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """[B, T, H, D] at ``positions`` [T]."""
    angles = positions[:, None, None] * torch.linspace(1, 0.1, x.shape[-1] // 2)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.exp(1j * angles)).flatten(-2)


class Block(nn.Module):
    """Attention of one layer and what is around it; subclasses keep the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (-1, DIM))
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        return rotated(q, positions), rotated(k, positions), v

    def forward(self, x: Tensor, positions: Tensor, *how) -> Tensor:
        y = self.attend(*self.project(x, positions), positions, *how)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    block: type[Block]

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(self.block() for _ in range(LAYERS))
        self.register_buffer("causal", torch.ones(SLOTS, SLOTS, dtype=torch.bool).tril(), persistent=False)

    def run(self, ids: Tensor, positions: Tensor, *how) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, positions, *how)
        return x[:, -1] @ self.embed.weight.T

    def generate(self, step, ids: Tensor, count: int) -> Tensor:
        """Greedy tokens. step: the forward, as it is or compiled."""
        start = 0
        for _ in range(count):
            logits = step(ids[:, start:], torch.arange(start, ids.shape[1]))
            start, ids = ids.shape[1], torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        return ids


def buffers(module: nn.Module, shape: tuple[int, ...], batch: int = 2) -> None:
    for name in ("k_cache", "v_cache"):
        module.register_buffer(name, torch.zeros(batch, *shape), persistent=False)


HEADS_FIRST, TOKENS_FIRST = (KV_HEADS, SLOTS, DIM), (SLOTS, KV_HEADS, DIM)


class GptFastBlock(Block):
    """Buffers written at positions, read whole under a block mask."""

    def __init__(self) -> None:
        super().__init__()
        buffers(self, HEADS_FIRST)

    def attend(self, q, k, v, positions, mask):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        self.k_cache[:, :, positions] = k
        self.v_cache[:, :, positions] = v
        return flex_attention(q, self.k_cache, self.v_cache, block_mask=mask, enable_gqa=True)


class GptFast(Decoder):
    """A block mask of all queries is made once; the compiled step takes its own rows of it."""

    block = GptFastBlock

    def generate(self, step, ids, count):
        blocks = create_block_mask(lambda b, h, q, kv: q >= kv, 1, 1, SLOTS, SLOTS, device="cpu", BLOCK_SIZE=16)
        return super().generate(functools.partial(step, blocks), ids, count)

    def forward(self, blocks, ids, positions):
        if ids.shape[1] > 1:
            mask = create_block_mask(blocks.mask_mod, 1, 1, ids.shape[1], SLOTS, device="cpu", BLOCK_SIZE=16)
        else:
            mask, first = blocks[:, :, positions // blocks.BLOCK_SIZE[0]], positions[0]
            mask.mask_mod = lambda b, h, q, kv: blocks.mask_mod(b, h, q + first, kv)
            mask.seq_lengths = (1, SLOTS)
        return self.run(ids, positions, mask)


class TorchchatBlock(GptFastBlock):
    """Written by an op that is called by its name."""

    def attend(self, q, k, v, positions, mask):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        keys = torch.ops.aten.index_put_(self.k_cache, [None, None, positions], k)
        values = torch.ops.aten.index_put_(self.v_cache, [None, None, positions], v)
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (keys, values))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


class Torchchat(Decoder):
    block = TorchchatBlock

    def forward(self, ids, positions):
        return self.run(ids, positions, self.causal[None, None, positions])


class LitgptBlock(GptFastBlock):
    """The rows in use of a larger buffer, copied into by index."""

    def attend(self, q, k, v, positions, mask, upto=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        keys = self.k_cache[: q.shape[0], ...].index_copy_(-2, positions, k)[..., :upto, :]
        values = self.v_cache[: q.shape[0], ...].index_copy_(-2, positions, v)[..., :upto, :]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=DIM**-0.5, enable_gqa=True)


class Litgpt(Decoder):
    """Caches are made within inference mode, and the loop runs in it."""

    block = LitgptBlock

    @torch.inference_mode()
    def generate(self, step, ids, count):
        for layer in self.layers:
            buffers(layer, HEADS_FIRST)
        return super().generate(step, ids, count)

    def forward(self, ids, positions):
        return self.run(ids, positions, self.causal.index_select(0, positions)[None, None])


class LitgptCut(Litgpt):
    """What is attended ends behind the furthest position, a number that is given with the positions."""

    def generate(self, step, ids, count):
        return super().generate(lambda ids, positions: step(ids, positions, int(positions[-1]) + 1), ids, count)

    def forward(self, ids, positions, upto):
        return self.run(ids, positions, self.causal.index_select(0, positions)[None, None, :, :upto], upto)


class History(nn.Module):
    """The cache of torchtune, which counts its tokens on the device."""

    def __init__(self) -> None:
        super().__init__()
        buffers(self, HEADS_FIRST)
        self.register_buffer("cache_pos", torch.arange(SLOTS), persistent=False)

    def update(self, k, v):
        tokens = k.shape[2]
        self.k_cache[:, :, self.cache_pos[:tokens]] = k
        self.v_cache[:, :, self.cache_pos[:tokens]] = v
        self.cache_pos.add_(tokens)
        return self.k_cache, self.v_cache


class TorchtuneBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.kv_cache = History()

    def attend(self, q, k, v, positions, mask):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        keys, values = (
            x.unsqueeze(2).expand(-1, -1, HEADS // KV_HEADS, -1, -1).flatten(1, 2) for x in self.kv_cache.update(k, v)
        )
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


class Torchtune(Decoder):
    block = TorchtuneBlock

    def generate(self, step, ids, count):
        for layer in self.layers:
            layer.kv_cache.cache_pos.copy_(torch.arange(SLOTS))
        return super().generate(step, ids, count)

    def forward(self, ids, positions):
        return self.run(ids, positions, self.causal[positions][None, None])


class MetaBlock(Block):
    """Buffers [B, S, H, D], plain attributes, written and read up to a position that is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.cache_k, self.cache_v = (torch.zeros(3, *TOKENS_FIRST) for _ in range(2))

    def attend(self, q, k, v, positions, start, mask):
        batch, tokens = q.shape[:2]
        self.cache_k[:batch, start : start + tokens] = k
        self.cache_v[:batch, start : start + tokens] = v
        keys, values = (
            x[:batch, : start + tokens].repeat_interleave(HEADS // KV_HEADS, dim=2).transpose(1, 2)
            for x in (self.cache_k, self.cache_v)
        )
        scores = q.transpose(1, 2) @ keys.transpose(2, 3) / DIM**0.5
        if mask is not None:
            scores = scores + mask
        return F.softmax(scores.float(), dim=-1).type_as(q) @ values


class Meta(Decoder):
    """The forward itself is decorated, and called with gradients enabled."""

    block = MetaBlock

    def generate(self, step, ids, count):
        with torch.enable_grad():
            return super().generate(lambda ids, positions: step(ids, int(positions[0])), ids, count)

    @torch.inference_mode()
    def forward(self, ids, start):
        tokens, mask = ids.shape[1], None
        if tokens > 1:
            mask = torch.full((tokens, tokens), float("-inf")).triu(diagonal=1)
            mask = torch.hstack([torch.zeros(tokens, start), mask])
        return self.run(ids, torch.arange(start, start + tokens), start, mask)


@dataclass
class Intermediates:
    """What a layer of x-transformers hands on."""

    cached_kv: Sequence[Tensor]


@dataclass
class LayerIntermediates:
    attn_intermediates: list[Intermediates]


class XBlock(Block):
    """A cache that grows, of keys as they are projected. rotary: whether all of them are rotated at each step."""

    rotary = False

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM, bias=False)

    def forward(self, x, cache):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (-1, DIM)).transpose(1, 2).chunk(3, dim=1)
        if cache is not None:
            k, v = (torch.cat((old, new), dim=-2) for old, new in zip(cache.cached_kv, (k, v), strict=True))
        made = Intermediates((k, v))
        if self.rotary:
            places = torch.arange(k.shape[2])
            q = rotated(q.transpose(1, 2), places[-q.shape[2] :]).transpose(1, 2)
            k = rotated(k.transpose(1, 2), places).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return x + self.out(y.transpose(1, 2).flatten(2)), made


class XRotaryBlock(XBlock):
    rotary = True


class XTransformers(Decoder):
    """Each step is given all ids, takes the last of them, and returns caches in objects, which the loop crops."""

    block = XBlock

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(SLOTS, WIDTH)

    def generate(self, step, ids, count):
        cache = None
        for _ in range(count):
            for made in cache.attn_intermediates if cache is not None else ():
                made.cached_kv = [x[..., -(SLOTS - 1) :, :] for x in made.cached_kv]
            logits, cache = step(ids, cache)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        return ids

    def forward(self, ids, cache):
        x, made = self.embed(ids) + self.places(torch.arange(ids.shape[1])), []
        caches = [None] * LAYERS if cache is None else cache.attn_intermediates
        x = x if cache is None else x[:, -1:]
        for layer, past in zip(self.layers, caches, strict=True):
            x, of_layer = layer(x, past)
            made.append(of_layer)
        return x[:, -1] @ self.embed.weight.T, LayerIntermediates(made)


class XRotary(XTransformers):
    block = XRotaryBlock


@pytest.mark.parametrize("form", [Torchtune, *at_night([GptFast, Torchchat, Litgpt, LitgptCut, Meta, XTransformers])])
def test_tokens_are_those_of_the_loop_as_it_is(form):
    torch.manual_seed(0)
    model = form()
    twin, prompts = copy.deepcopy(model), torch.randint(VOCABULARY, (2, 2, 7))
    with torch.no_grad(), without_compiler():
        step = torch.compile(model.forward, backend="mustafar", options=OPTIONS)
        with explain() as report:
            assert torch.equal(model.generate(step, prompts[0], 9), twin.generate(twin.forward, prompts[0], 9))
        assert [entry.phases for entry in report.matched] == [("prefill", "decode")] * LAYERS, str(report)
        assert report.missed == []
        assert report.graphs <= 3
        with explain() as report:
            assert torch.equal(model.generate(step, prompts[1], 9), twin.generate(twin.forward, prompts[1], 9))
        assert (report.graphs, report.calls) == (0, 9)


@pytest.mark.nightly
def test_keys_that_are_rotated_once_they_are_cached_stay_dense():
    torch.manual_seed(0)
    model, prompt = XRotary(), torch.randint(VOCABULARY, (2, 7))
    with torch.no_grad(), without_compiler(), explain() as report, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        step = torch.compile(model.forward, backend="mustafar", options=OPTIONS)
        assert torch.equal(model.generate(step, prompt, 9), model.generate(model.forward, prompt, 9))
    reason = "keys are changed once they are cached, as by a rotary embedding; cache them as attention takes them"
    assert {entry.reason for entry in report.missed} == {reason}
    assert not report.matched
    assert [str(x.message) for x in warned if "mustafar" in str(x.message)] == [
        f"mustafar: 2 of 2 attention layers of a graph run dense: {reason}"
    ]
