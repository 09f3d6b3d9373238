# SPDX-License-Identifier: Apache-2.0
"""A model on several GPUs: each rank holds some heads of each layer, and their part of the compressed KV cache.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --ways hf --model meta-llama/Llama-3.1-8B --sparsity 0.7

own  a loop of your own, as gpt-fast has it: slices of the weights, and an all-reduce behind attention and MLP
hf   a model that transformers shards, which needs the package accelerate, and its generate()

Both are compiled as on one GPU. It runs on CPUs as well, over gloo.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import mustafar_compile
from quickstart import TINY_MODEL, fact_prompts


class ShardedLayer(nn.Module):
    """The part of a Llama layer that this rank holds: heads, their cache [B, heads, slots, D], columns of the MLP."""

    def __init__(self, whole: nn.Module, batch: int, slots: int) -> None:
        super().__init__()
        attention, mlp = whole.self_attn, whole.mlp
        self.norm, self.mlp_norm = whole.input_layernorm, whole.post_attention_layernorm
        self.q, self.k, self.v = (_rows(m.weight) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
        self.gate, self.up = (_rows(m.weight) for m in (mlp.gate_proj, mlp.up_proj))
        self.out, self.down = (_columns(m.weight) for m in (attention.o_proj, mlp.down_proj))
        self.head_dim = attention.head_dim
        cache = self.k.new_zeros(batch, self.k.shape[0] // self.head_dim, slots, self.head_dim)
        self.register_buffer("keys", cache)
        self.register_buffer("values", cache.clone())

    def forward(self, x: Tensor, positions: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (F.linear(y, w).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.q, self.k, self.v))
        q, k = apply_rotary_pos_emb(q, k, *rotation)
        self.keys[:, :, positions] = k
        self.values[:, :, positions] = v
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)
        x = x + _summed(F.linear(y.transpose(1, 2).flatten(2), self.out))
        y = self.mlp_norm(x)
        return x + _summed(F.linear(F.silu(F.linear(y, self.gate)) * F.linear(y, self.up), self.down))


class ShardedLlama(nn.Module):
    """A Llama of whose layers this rank holds a part."""

    def __init__(self, whole: nn.Module, batch: int, slots: int) -> None:
        super().__init__()
        self.embedding, self.rotary, self.norm = whole.model.embed_tokens, whole.model.rotary_emb, whole.model.norm
        self.layers = nn.ModuleList(ShardedLayer(layer, batch, slots) for layer in whole.model.layers)
        self.head = whole.lm_head
        self.register_buffer("slots", torch.arange(slots, device=whole.device))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, vocabulary] behind the last of ``ids`` [B, L], which stand at ``positions`` [L]."""
        x = self.embedding(ids)
        rotation, mask = self.rotary(x, positions[None]), self.slots <= positions[:, None]
        for layer in self.layers:
            x = layer(x, positions, rotation, mask)
        return self.head(self.norm(x[:, -1]))


def _rows(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.chunk(dist.get_world_size(), 0)[dist.get_rank()].clone(), requires_grad=False)


def _columns(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.chunk(dist.get_world_size(), 1)[dist.get_rank()].clone(), requires_grad=False)


def _summed(x: Tensor) -> Tensor:
    """The sum over all ranks."""
    return all_reduce(x, "sum", dist.group.WORLD)


@torch.no_grad()
def generate(step: Callable[[Tensor, Tensor], Tensor], ids: Tensor, new_tokens: int) -> Tensor:
    """Greedy decoding: the new tokens [B, new_tokens]."""
    positions, tokens = torch.arange(ids.shape[1], device=ids.device), []
    for _ in range(new_tokens):
        ids = step(ids, positions).argmax(-1, keepdim=True)
        positions = positions[-1:] + 1
        tokens.append(ids)
    return torch.cat(tokens, 1)


def own(args: argparse.Namespace, ids: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    """Tokens of the dense and of the compressed model, and the cache of the latter."""
    whole = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(ids.device)
    slots = ids.shape[1] + args.new_tokens
    dense = generate(ShardedLlama(whole, len(ids), slots), ids, args.new_tokens)
    model = ShardedLlama(whole, len(ids), slots)
    options = settings | {"release_dense": ids.is_cuda}
    step = torch.compile(model, backend="mustafar", fullgraph=True, dynamic=False, options=options)
    return dense, generate(step, ids, args.new_tokens), model


def hf(args: argparse.Namespace, ids: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    """The same of a model that transformers shards."""
    from transformers.distributed import DistributedConfig

    sharding = DistributedConfig(tp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, distributed_config=sharding)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "return_dict_in_generate": True}
    how |= {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    dense = model.generate(ids, **how).sequences[:, ids.shape[1] :]
    mustafar_compile.prepare(model, **settings)
    out = model.generate(ids, **how)
    return dense, out.sequences[:, ids.shape[1] :], out.past_key_values


WAYS = {"own": own, "hf": hf}


def run(way: str, args: argparse.Namespace, ids: Tensor, tokenizer: Any) -> None:
    """Compare, and print on the first rank what all of them have."""
    settings = {"key_sparsity": args.sparsity, "value_sparsity": args.sparsity}
    with mustafar_compile.explain() as report:
        dense, compressed, cache = WAYS[way](args, ids, settings)
    report.print_once(dist.group.WORLD)
    mine, together = mustafar_compile.cache_stats(cache), mustafar_compile.cache_stats(cache, group=dist.group.WORLD)
    tokens: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(tokens, compressed.tolist())
    if dist.get_rank() == 0:
        print(f"\n{way}, dense:      {tokenizer.decode(dense[0])!r}")
        print(f"{way}, compressed: {tokenizer.decode(compressed[0])!r}")
        print(f"cache of one rank: {mine}\ncache of all:      {together}")
        print(f"tokens are the same on all ranks: {tokens.count(tokens[0]) == len(tokens)}\n", flush=True)


def join() -> torch.device:
    """Join the ranks that torchrun started. Returns the device of this one."""
    on_gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpus else "gloo", device_id=device if on_gpus else None)
    return device


def parse_args(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--model", default=str(TINY_MODEL), help="a Llama, by folder or Hub name (default: tiny_llama)")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.5)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Run each way that is asked for."""
    args = parse_args(given)
    device = join()
    args.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(fact_prompts()[0].text, add_special_tokens=False, return_tensors="pt").input_ids.to(device)
    for way in args.ways:
        run(way, args, ids, tokenizer)
    mustafar_compile.release_recordings()  # NCCL waits for CUDA graphs in which it is
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
