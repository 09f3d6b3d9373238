"""A rank of ``test_parallel.py``: a model generates on two of them, and the second one is killed meanwhile."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from compilers import without_compiler
from models import prompt
from ranks import device, sharded

TIMEOUT = timedelta(seconds=30)
TOKENS = 8
"""That are there when the second rank ends, so that steps run as CUDA graphs where there are GPUs."""


def kill_the_second(ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
    """A criterion for stopping: none, but the second rank is killed at the last of ``TOKENS``."""
    if dist.get_rank() == 1 and ids.shape[1] == prompt()["input_ids"].shape[1] + TOKENS:
        print(f"{time.strftime('%X')} the second rank is killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def main() -> None:
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group("nccl" if on_gpus else "gloo", os.environ.get("STORE"), timeout=TIMEOUT, **place)
    model = sharded(num_hidden_layers=1)
    inputs = {name: x.to(device()) for name, x in prompt().items()}
    how = {"max_new_tokens": 64, "do_sample": False, "cache_implementation": "static"}
    with nullcontext() if on_gpus else without_compiler():
        model.compile(backend="mustafar", fullgraph=True)
        model.generate(**inputs, **how, stopping_criteria=[kill_the_second])
    print("the first rank went on")


if __name__ == "__main__":
    with torch.no_grad():
        main()
