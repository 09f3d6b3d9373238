# SPDX-License-Identifier: Apache-2.0
"""A model on several GPUs: each rank holds some heads of each layer, and their part of the compressed KV cache.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --ways hf --model meta-llama/Llama-3.1-8B --sparsity 0.7

own  a loop of your own over slices of the weights, ``sharded_llama.py``
hf   a model that transformers shards, which needs the package accelerate, and its generate()

Both are compiled as on one GPU. It runs on CPUs as well, over gloo.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mustafar_compile
from quickstart import TINY_MODEL, fact_prompts
from sharded_llama import ShardedLlama, generate


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
