# SPDX-License-Identifier: Apache-2.0
"""A Llama whose layers ranks share, in plain PyTorch: slices of the weights, an all-reduce behind attention and MLP.

``tensor_parallel.py`` runs it. Matrices that read the same input are one here, as in gpt-fast: a GPU multiplies by one
large matrix sooner than by several small ones, above all where ranks make them smaller still. So queries and keys are
rotated together, too. The cache is written and the mask is made so that the graph of a decode step shows that the mask
says nothing new: then no layer reads it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from transformers.models.llama.modeling_llama import rotate_half


class ShardedLayer(nn.Module):
    """The part of a Llama layer that this rank holds: heads, their cache [B, heads, slots, D], columns of the MLP."""

    def __init__(self, whole: nn.Module, batch: int, slots: int) -> None:
        super().__init__()
        attention, mlp = whole.self_attn, whole.mlp
        self.norm, self.mlp_norm = whole.input_layernorm, whole.post_attention_layernorm
        self.qkv = _rows(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        self.gate_up = _rows(mlp.gate_proj.weight, mlp.up_proj.weight)
        self.out, self.down = _columns(attention.o_proj.weight), _columns(mlp.down_proj.weight)
        self.head_dim, ranks = attention.head_dim, dist.get_world_size()
        heads, kv_heads = (len(m.weight) // self.head_dim // ranks for m in (attention.q_proj, attention.k_proj))
        self.heads = heads, kv_heads  # of queries, and of keys or values
        cache = self.qkv.new_zeros(batch, kv_heads, slots, self.head_dim)
        self.register_buffer("keys", cache)
        self.register_buffer("values", cache.clone())

    def forward(self, x: Tensor, positions: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        joined = F.linear(self.norm(x), self.qkv).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q_k, v = joined.split((sum(self.heads), self.heads[1]), dim=1)
        q, k = _rotated(q_k, *rotation).split(self.heads, dim=1)
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)
        x = x + _summed(F.linear(y.transpose(1, 2).flatten(2), self.out))
        gate, up = F.linear(self.mlp_norm(x), self.gate_up).chunk(2, -1)
        return x + _summed(F.linear(F.silu(gate) * up, self.down))


class ShardedLlama(nn.Module):
    """A Llama of whose layers and vocabulary this rank holds a part."""

    def __init__(self, whole: nn.Module, batch: int, slots: int) -> None:
        super().__init__()
        self.embedding, self.rotary, self.norm = whole.model.embed_tokens, whole.model.rotary_emb, whole.model.norm
        self.layers = nn.ModuleList(ShardedLayer(layer, batch, slots) for layer in whole.model.layers)
        self.vocabulary = len(whole.lm_head.weight)
        self.head = _rows(F.pad(whole.lm_head.weight, (0, 0, 0, -self.vocabulary % dist.get_world_size())))
        self.slots = slots

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, vocabulary] behind the last of ``ids`` [B, L], which stand at ``positions`` [L]."""
        x = self.embedding(ids)
        rotation = self.rotary(x, positions[None])
        mask = torch.arange(self.slots, device=x.device) <= positions[:, None]
        for layer in self.layers:
            x = layer(x, positions, rotation, mask)
        return _joined(F.linear(self.norm(x[:, -1]), self.head))[:, : self.vocabulary]


def _rows(*weights: Tensor) -> nn.Parameter:
    """This rank's rows of each, as one matrix."""
    ours = [weight.chunk(dist.get_world_size(), 0)[dist.get_rank()] for weight in weights]
    return nn.Parameter(torch.cat(ours), requires_grad=False)


def _columns(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.chunk(dist.get_world_size(), 1)[dist.get_rank()].clone(), requires_grad=False)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, L, D] by the angles of its positions, whose cosines and sines are [1, L, D]."""
    return x * cos + rotate_half(x) * sin


def _summed(x: Tensor) -> Tensor:
    """The sum over all ranks."""
    return all_reduce(x, "sum", dist.group.WORLD) if dist.get_world_size() > 1 else x


def _joined(x: Tensor) -> Tensor:
    """The columns of all ranks beside each other: [B, share] -> [B, ranks * share]."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return x
    joined = x.new_empty(ranks * x.shape[0], x.shape[1])
    dist.all_gather_into_tensor(joined, x)
    return joined.view(ranks, *x.shape).transpose(0, 1).flatten(1)


@torch.no_grad()
def generate(step: Callable[[Tensor, Tensor], Tensor], ids: Tensor, new_tokens: int) -> Tensor:
    """Greedy decoding: the new tokens [B, new_tokens]."""
    positions, tokens = torch.arange(ids.shape[1], device=ids.device), []
    for _ in range(new_tokens):
        ids = step(ids, positions).argmax(-1, keepdim=True)
        positions = positions[-1:] + 1
        tokens.append(ids)
    return torch.cat(tokens, 1)
