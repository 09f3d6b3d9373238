"""Small models in every form of cache that the backend matches, and how to drive them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "gemma3_text")

_COMMON = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256, "head_dim": 16,
    "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_SPECIAL = {
    "mistral": {"sliding_window": None},
    "phi3": {"rope_scaling": None, "sliding_window": None},
    "gemma2": {**_SLIDING, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 16},
    "gpt_oss": {**_SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1},
    "cohere2": _SLIDING,
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
}  # fmt: skip


def hf_model(family: str = "llama", seed: int = 0, attention: str = "sdpa", **changes):
    """A tiny random HF causal model in eval mode; ``changes`` override its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {k: v for k, v in (_COMMON | _SPECIAL.get(family, {}) | changes).items() if v is not None or k in changes}
    config.setdefault("eos_token_id", None)
    if family in ("mistral", "phi3"):
        config["sliding_window"] = changes.get("sliding_window")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), attn_implementation=attention)
    model.generation_config.eos_token_id = None
    return model.eval()


def encoder_decoder():
    """A tiny random T5 in eval mode."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=100, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None, **sizes)
    return T5ForConditionalGeneration(config).eval()


def full_attention_layers(model) -> int:
    """How many layers of an HF model keep an unbounded cache."""
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return sum(kind == "full_attention" for kind in types)


def prompt(batch: int = 2, length: int = 9, padded: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """Random ids, with the first row padded on the left by a third of its length where asked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 100, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : length // 3] = 0
        ids[0, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


class _Attention(nn.Module):
    """One attention layer over embeddings [B, T, E]; subclasses keep the cache."""

    def __init__(
        self, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, value_dim: int | None = None, width: int = 32
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.value_dim = heads, kv_heads, head_dim, value_dim or head_dim
        self.q = nn.Linear(width, heads * head_dim)
        self.k = nn.Linear(width, kv_heads * head_dim)
        self.v = nn.Linear(width, kv_heads * self.value_dim)
        self.o = nn.Linear(heads * self.value_dim, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, T, heads, head_dim or value_dim] each."""
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, self.head_dim)
        k = self.k(x).view(batch, tokens, self.kv_heads, self.head_dim)
        return q, k, self.v(x).view(batch, tokens, self.kv_heads, self.value_dim)

    def merge(self, y: Tensor) -> Tensor:
        """[B, heads, T, value_dim] -> [B, T, E]."""
        return self.o(y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1))


class BufferModel(_Attention):
    """gpt-fast: buffers [B, H, S, D] written by index_put, read whole under a boolean mask."""

    def __init__(self, batch: int = 2, slots: int = 48, dtype=torch.float32, **sizes) -> None:
        super().__init__(**sizes)
        self.register_buffer("k_cache", torch.zeros(batch, self.kv_heads, slots, self.head_dim, dtype=dtype))
        self.register_buffer("v_cache", torch.zeros(batch, self.kv_heads, slots, self.value_dim, dtype=dtype))
        self.register_buffer("causal", torch.tril(torch.ones(slots, slots, dtype=torch.bool)))

    def write(self, cache: Tensor, new: Tensor, positions: Tensor) -> None:
        cache[:, :, positions] = new

    def step(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        self.write(self.k_cache, k, positions)
        self.write(self.v_cache, v, positions)
        group = self.heads // self.kv_heads
        keys = self.k_cache.repeat_interleave(group, dim=1)
        values = self.v_cache.repeat_interleave(group, dim=1)
        return self.merge(F.scaled_dot_product_attention(q, keys, values, attn_mask=self.causal[None, None, positions]))


class WhereModel(BufferModel):
    """As above, but a decode step chooses between the new token and the old buffer."""

    def write(self, cache: Tensor, new: Tensor, positions: Tensor) -> None:
        if new.shape[2] > 1:
            super().write(cache, new, positions)
        else:
            cache.copy_(self.chosen(cache, new, torch.arange(cache.shape[2]), positions))

    def chosen(self, cache: Tensor, new: Tensor, slots: Tensor, position: Tensor) -> Tensor:
        return torch.where((slots == position).view(1, 1, -1, 1), new, cache)


class WhereNotModel(WhereModel):
    """Chosen the other way round, under a mask of full shape."""

    def chosen(self, cache: Tensor, new: Tensor, slots: Tensor, position: Tensor) -> Tensor:
        return torch.where(~(position == slots)[None, None, :, None].expand_as(cache), cache, new)


class OneHotModel(WhereModel):
    """Blended by a one-hot vector."""

    def chosen(self, cache: Tensor, new: Tensor, slots: Tensor, position: Tensor) -> Tensor:
        here = F.one_hot(position, slots.shape[0]).to(new.dtype).view(1, 1, -1, 1)
        return cache * (1 - here) + here * new


class SliceModel(_Attention):
    """meta-llama: buffers [B, S, H, D] written by slices at an int, softmax spelled out."""

    def __init__(self, batch: int = 2, slots: int = 48, dtype=torch.float32, **sizes) -> None:
        super().__init__(**sizes)
        self.k_cache = torch.zeros(batch, slots, self.kv_heads, self.head_dim, dtype=dtype)
        self.v_cache = torch.zeros(batch, slots, self.kv_heads, self.value_dim, dtype=dtype)

    def repeat(self, x: Tensor) -> Tensor:
        batch, tokens, kv_heads, head_dim = x.shape
        group = self.heads // self.kv_heads
        x = x[:, :, :, None, :].expand(batch, tokens, kv_heads, group, head_dim)
        return x.reshape(batch, tokens, kv_heads * group, head_dim).transpose(1, 2)

    def step(self, x: Tensor, start: int, mask: Tensor | None) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.project(x)
        self.k_cache[:batch, start : start + tokens] = k
        self.v_cache[:batch, start : start + tokens] = v
        keys = self.repeat(self.k_cache[:batch, : start + tokens])
        values = self.repeat(self.v_cache[:batch, : start + tokens])
        scores = torch.matmul(q.transpose(1, 2), keys.transpose(2, 3)) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        return self.merge(torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), values))


class TupleModel(_Attention):
    """nanoGPT: the past comes and goes as a tuple, grown by torch.cat."""

    def step(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
        causal = x.shape[1] > 1
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)), (k, v)


class TokensFirstModel(_Attention):
    """As flash attention takes it: a tuple of [B, S, H, D], transposed only to attend."""

    def step(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.project(x)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        q, *cached = (t.transpose(1, 2) for t in (q, k, v))
        causal = x.shape[1] > 1
        return self.merge(F.scaled_dot_product_attention(q, *cached, is_causal=causal, enable_gqa=True)), (k, v)


def run_steps(model: _Attention, inputs: list[Tensor], step=None) -> list[Tensor]:
    """Feed ``inputs`` [B, T, E] one after the other through ``step`` (default: the model's own, eager)."""
    step = step or model.step
    outputs, past, start = [], None, 0
    for x in inputs:
        tokens = x.shape[1]
        if isinstance(model, TupleModel | TokensFirstModel):
            out, past = step(x, past)
        elif isinstance(model, SliceModel):
            mask = torch.full((tokens, tokens), float("-inf"), dtype=x.dtype).triu(1) if tokens > 1 else None
            out = step(x, start, mask)
        else:
            out = step(x, torch.arange(start, start + tokens))
        outputs.append(out)
        start += tokens
    return outputs


def run_from(step, inputs: list[Tensor], past=None):
    """Outputs of ``step`` for ``inputs`` [B, T, E], one after the other from ``past`` on, and the past after them."""
    outputs = []
    for x in inputs:
        out, past = step(x, past)
        outputs.append(out)
    return outputs, past


def pruned_steps(model: _Attention, inputs: list[Tensor], attention) -> list[Tensor]:
    """The oracle for ``run_steps``: ``attention(q, k, v)`` gives a decode step over all keys and values so far."""
    outputs, keys, values = [], [], []
    for x in inputs:
        q, k, v = (t.transpose(1, 2) for t in model.project(x))
        keys.append(k)
        values.append(v)
        k, v = torch.cat(keys, 2), torch.cat(values, 2)
        if x.shape[1] == 1 and len(keys) > 1:
            out = attention(q, k, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, enable_gqa=True)
        outputs.append(model.merge(out))
    return outputs
