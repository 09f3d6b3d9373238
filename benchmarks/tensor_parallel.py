"""A decode step, and the time to first token, of models that N GPUs share by tensor parallelism.

    torchrun --nproc-per-node 1 benchmarks/tensor_parallel.py
    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --keep
    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --keep --shape 70b --layers 40 --only ours --ttft
    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --keep --only ours --one-shot --profile

hf     the model as Hugging Face shards and compiles it: a static cache, torch.compile with mode="reduce-overhead"
dense  the best dense step that could be built, as decode_step.py has it, over the same shards
op     the step of dense with our op over compressed caches in place of its attention
ours   the model of hf with backend="mustafar", over a compressed static cache
own    the model of examples/sharded_llama.py with backend="mustafar": like dense, it joins matrices with the same input

Weights are random and the same for any number of ranks. over_one is how many times faster a row is than that of one
rank, largest_batch what fits beside what one rank holds, by the memory that is free. Without a GPU it runs over gloo.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import io
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import decode_step
import llama
import torch
import torch.distributed as dist
from comparing import Row, add_ratios, in_order, key_of, rows_of
from profile_of_a_step import waits_of
from timing import DEVICE, ON_GPU, Function, cold, free, parser, save, show, write
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

import mustafar_compile

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from sharded_llama import ShardedLlama

NAME = "tensor_parallel"
SHAPES = {"8b": (llama.SHAPE, 32), "70b": (llama.SHAPE_70B, 80), "tiny": (llama.TINY, 2)}
SIZES = ("phase", "shape", "batch", "context", "layers", "ranks", "all_reduce")
_PATIENCE = 60  # seconds that a rank may take to leave


def join() -> None:
    """Join the ranks that torchrun started."""
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    here = torch.device("cuda", torch.cuda.current_device()) if ON_GPU else None
    dist.init_process_group("nccl" if ON_GPU else "gloo", device_id=here)
    torch.manual_seed(0)


def leave() -> None:
    """Take the process group down, within a minute: a rank that hangs prints where, and ends."""
    faulthandler.dump_traceback_later(_PATIENCE, exit=True)
    _forget()
    dist.destroy_process_group()


def _forget() -> None:
    """Give up all that was compiled and recorded."""
    mustafar_compile.release_recordings()
    torch._dynamo.reset()
    free()


def sum_in_one_shot() -> None:
    """Let Inductor sum up small tensors by reading those of all ranks, over memory that they share, and not by NCCL."""
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(dist.group.WORLD.group_name)
    torch._inductor.config._collective.auto_select = True
    torch._inductor.config._collective.one_shot_all_reduce_threshold_bytes = 2**20


def build(given: argparse.Namespace) -> Any:
    """The model, of which each rank holds its part. No rank ever holds more than one whole weight."""
    from transformers.distributed import DistributedConfig

    model = _on_paper(given)
    if given.ranks > 1:
        config, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=given.ranks))
        model = type(model).maybe_distribute_model(model, config, mesh)
    _fill(model)
    model.model.rotary_emb = _rotary(model)
    return model


def _on_paper(given: argparse.Namespace) -> Any:
    """The whole model without any memory."""
    with torch.device("meta"):
        return llama.model_of(SHAPES[given.shape][0], given.layers, given.context + 1)


def _fill(model: nn.Module) -> None:
    """Give ``model`` random weights, the same for any number of ranks."""
    torch.manual_seed(0)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_random(weight), requires_grad=False))


def _rotary(model: Any) -> nn.Module:
    with DEVICE:
        return type(model.model.rotary_emb)(model.config)


def _random(weight: torch.Tensor) -> torch.Tensor:
    """Ones for a norm, else random numbers, the same on all ranks; of those, what ``weight`` is the part of."""
    whole = torch.empty(weight.shape, dtype=weight.dtype, device=DEVICE)
    whole.fill_(1) if whole.dim() == 1 else whole.normal_(std=0.02)
    if not isinstance(weight, DTensor):
        return whole
    part = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
    return DTensor.from_local(part.to_local().clone(), weight.device_mesh, weight.placements, run_check=False)


def ours(given: argparse.Namespace, options: Row) -> Row:
    """The step of a model as Hugging Face shards it, over a compressed cache."""
    model = build(given)
    cache = llama.compressed_cache(model, given.batch, given.context, options)
    return _compressed(decode_step.hf_step(_compiled(model, options), cache, given.batch, given.context), cache, given)


def own(given: argparse.Namespace, options: Row) -> Row:
    """The step of a loop of one's own, whose layers have given up their dense caches."""
    whole = _on_paper(given)
    model = ShardedLlama(whole, given.batch, given.context)
    _fill(model)
    model.rotary = _rotary(whole)
    for layer in model.layers:
        layer.keys, layer.values = (torch.randn_like(x, device=DEVICE) for x in (layer.keys, layer.values))
    ids = torch.zeros(given.batch, 1, dtype=torch.int64, device=DEVICE)
    last = torch.full([1], given.context - 1, device=DEVICE)
    compiled = _compiled(model, options | {"release_dense": ON_GPU})
    return _compressed(lambda: compiled(ids, last), model, given)


def _compiled(model: Any, options: Row) -> Any:
    options = options | {"triton.cudagraphs": ON_GPU}
    return torch.compile(model, backend="mustafar", fullgraph=True, options=options)


def _compressed(step: Function, caches: Any, given: argparse.Namespace) -> Row:
    """Of a compiled step: a row, and whether all layers ran compressed and all ranks choose the same tokens."""
    with mustafar_compile.explain() as report:
        row = decode_step.measured(step, given) | decode_step.held(given)
    report.print_once(dist.group.WORLD)
    alike = "same tokens" if len(set(_of_all(str(step().argmax(-1).tolist())))) == 1 else "OTHER TOKENS"
    note = f"{decode_step.matched(report, given)}, {alike} on {given.ranks} ranks"
    sizes = [mustafar_compile.cache_stats(caches, group=group).stored_bytes for group in (None, dist.group.WORLD)]
    return row | {"cache_GB": sizes[0] / 1e9, "cache_of_all_GB": sizes[1] / 1e9, "note": note}


def _of_all(x: Any) -> list[Any]:
    """What each rank has."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def _over_ranks(row: Row) -> Row:
    """``row`` with the times of the slowest rank, and what the profiles of all of them say."""
    rows = _of_all(row)
    slowest = {name: max(of[name] for of in rows) for name in ("ms", "host_ms") if name in row}
    if "profile" not in row:
        return row | slowest
    profiles = [of["profile"] for of in rows]
    waits = waits_of(profiles)
    show("ranks in a step", waits)
    return row | slowest | {"profile": {"ranks": waits, "of_ranks": profiles}}


def _built_by_hand(way: str, given: argparse.Namespace, options: Row) -> Row:
    return decode_step.decode(way, build(given), given, options)


def _first_token(way: str, given: argparse.Namespace, options: Row) -> Row:
    return decode_step.PREFILL[way](build(given), given, options)


DECODE: dict[str, Callable[..., Row]] = {
    **{way: functools.partial(_built_by_hand, way) for way in ("hf", "dense", "op")},
    "ours": ours,
    "own": own,
}
PREFILL = {way: functools.partial(_first_token, way) for way in decode_step.PREFILL}


def run(way: str, given: argparse.Namespace) -> Row:
    """One row, from a model of its own. What fails ends all ranks."""
    tokens = given.prompt if given.ttft else given.context
    print(f"{way}, {given.ranks} ranks", flush=True)
    _forget()
    cold()  # its buffer is there from now on, and no row's memory
    given.reserved, given.allocated = decode_step.reserved_bytes(), torch.cuda.memory_allocated() if ON_GPU else 0
    sparsity = given.sparsity if way in ("op", "ours", "own") else None
    options = {} if sparsity is None else decode_step.options_of(sparsity)
    row = _over_ranks((PREFILL if given.ttft else DECODE)[way](given, options))
    phase = {"phase": "first token" if given.ttft else "decode step"}
    sizes = {
        "shape": given.shape,
        "batch": given.batch,
        "context": tokens,
        "layers": given.layers,
        "ranks": given.ranks,
        "all_reduce": given.all_reduce,
    }
    row = phase | sizes | {"way": way, "sparsity": sparsity} | row
    if ON_GPU and not given.ttft:
        row["largest_batch"] = _largest_batch(given, row)
    print({name: x for name, x in row.items() if name != "profile"}, flush=True)
    return row


def _largest_batch(given: argparse.Namespace, row: Row) -> int:
    """How many rows the slowest of the ranks has room for, if the cache alone grows with them."""
    shape = SHAPES[given.shape][0]
    elements = 2 * given.layers * shape["num_key_value_heads"] * given.context * shape["head_dim"] // given.ranks
    of_row = 1e9 * row["cache_GB"] / given.batch if "cache_GB" in row else 2 * elements
    room = torch.tensor([given.total - row["memory_GB"] * 1e9], device=DEVICE)
    dist.all_reduce(room, dist.ReduceOp.MIN)
    return given.batch + int(room.item() // of_row)


def with_ratios(rows: Iterable[Row]) -> list[Row]:
    """How many times faster each row is than the dense ones of the same sizes, and than itself on one rank."""
    rows = in_order(rows, SIZES, ["eager", *DECODE])
    dense = {f"over_{way}": {"way": way, "sparsity": None} for way in ("hf", "dense")}
    add_ratios(rows, SIZES, **dense)
    add_ratios(rows, [*SIZES[: SIZES.index("ranks")], "way", "sparsity"], over_one={"ranks": 1, "all_reduce": "none"})
    return rows


def arguments() -> argparse.Namespace:
    """What is asked for."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="8b")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--context", type=int, default=8192, help="tokens in the cache, the new one included")
    options.add_argument("--layers", type=int, help="default: all of the shape")
    options.add_argument("--sparsity", type=float, default=0.7)
    options.add_argument("--only", choices=DECODE, nargs="+", help="default: all")
    options.add_argument("--ttft", action="store_true", help="time to first token in place of a decode step")
    options.add_argument("--one-shot", action="store_true", help="sum up over shared memory and not by NCCL")
    options.add_argument("--profile", action="store_true", help="also which kernels a decode step runs, and how long")
    options.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt, with --ttft")
    options.add_argument("--keep", action="store_true", help="keep other rows of earlier runs in the results")
    given = options.parse_args()
    given.layers = given.layers or SHAPES[given.shape][1]
    return given


def add_ranks(given: argparse.Namespace) -> None:
    """How many ranks there are, how they sum up, and the memory of this one's device."""
    given.ranks = dist.get_world_size()
    given.all_reduce = "none" if given.ranks == 1 else "one-shot" if given.one_shot else dist.get_backend()
    given.total = torch.cuda.mem_get_info()[1] if ON_GPU else 0


def main() -> None:
    given = arguments()
    join()
    add_ranks(given)
    if given.all_reduce == "one-shot":
        sum_in_one_shot()
    silent = contextlib.nullcontext() if dist.get_rank() == 0 else contextlib.redirect_stdout(io.StringIO())
    with silent:
        fields = (*SIZES, "way", "sparsity")
        rows = rows_of(NAME, fields, given.keep)
        for way in given.only or (PREFILL if given.ttft else DECODE):
            row = run(way, given)
            rows[key_of(row, fields)] = row
            if dist.get_rank() == 0:
                save(NAME, with_ratios(rows.values()))  # what follows may fail
        if dist.get_rank() == 0:
            write(NAME, with_ratios(rows.values()))
    leave()


if __name__ == "__main__":
    with torch.no_grad():
        main()
