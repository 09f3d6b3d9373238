# SPDX-License-Identifier: Apache-2.0
"""A model that keeps its own cache, in the style of gpt-fast: buffers of fixed size, written at ``input_pos``.

    python examples/own_cache.py

Nothing in the model knows of compression. On a GPU ``release_dense`` frees the buffers once they are compressed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mustafar_compile

DIM, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 256, 8, 2, 64, 512


class KVCache(nn.Module):
    """K and V of one layer, [B, KV heads, S, D]."""

    def __init__(self, batch: int, slots: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(batch, KV_HEADS, slots, HEAD_DIM), persistent=False)
        self.register_buffer("values", torch.zeros(batch, KV_HEADS, slots, HEAD_DIM), persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[:, :, input_pos] = k
        self.values[:, :, input_pos] = v
        return self.keys, self.values


class Block(nn.Module):
    """Attention and a feed-forward network, with rotary positions left out for brevity."""

    def __init__(self, batch: int, slots: int) -> None:
        super().__init__()
        self.q = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.k, self.v = (nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False) for _ in range(2))
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)
        self.feed_forward = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.norm = nn.RMSNorm(DIM)
        self.cache = KVCache(batch, slots)

    def forward(self, x: Tensor, input_pos: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (linear(y).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        k, v = self.cache.update(input_pos, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


class Transformer(nn.Module):
    """Weights are random: load yours."""

    def __init__(self, layers: int, batch: int, slots: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList(Block(batch, slots) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(DIM), nn.Linear(DIM, VOCABULARY, bias=False)
        self.register_buffer("causal", torch.ones(slots, slots, dtype=torch.bool).tril(), persistent=False)

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        """Logits [B, vocabulary] behind the last of ids [B, L], which stand at input_pos [L]."""
        x, mask = self.embed(ids), self.causal[input_pos]
        for block in self.blocks:
            x = block(x, input_pos, mask)
        return self.head(self.norm(x[:, -1]))


@torch.no_grad()
def generate(step, ids: Tensor, new_tokens: int) -> Tensor:
    """Greedy decoding: the new tokens [B, new_tokens]."""
    input_pos, tokens = torch.arange(ids.shape[1], device=ids.device), []
    for _ in range(new_tokens):
        ids = step(ids, input_pos).argmax(-1, keepdim=True)
        input_pos = input_pos[-1:] + 1
        tokens.append(ids)
    return torch.cat(tokens, dim=1)


def main(layers: int = 2, prompt: int = 500, new_tokens: int = 64) -> Tensor:
    """Generate, and print what each layer's cache takes. Returns the tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Transformer(layers, batch=2, slots=prompt + new_tokens).to(device)
    ids = torch.randint(VOCABULARY, (2, prompt), device=device)
    options = {"key_sparsity": 0.5, "value_sparsity": 0.7, "release_dense": device == "cuda"}
    step = torch.compile(model, backend="mustafar", dynamic=False, fullgraph=True, options=options)
    with mustafar_compile.explain() as report:
        tokens = generate(step, ids, new_tokens)
    print(report, mustafar_compile.cache_stats(model), sep="\n")
    return tokens


if __name__ == "__main__":
    main()
