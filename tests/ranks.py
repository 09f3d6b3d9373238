"""Processes that run a check together, as the ranks of a process group on a CPU."""

from __future__ import annotations

import fcntl
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from models import hf_model

SECONDS = 60
"""That a rank waits for another one."""

Check = Callable[..., Any]


def results_of(checks: Mapping[str, tuple], world: int = 2, on_gpus: bool = False) -> list[dict[str, Any]]:
    """What each rank got of the checks, by their names: the result, or the error as a text.

    checks: a function, which all ranks call, and its arguments. on_gpus: one for each rank; else they see none.
    """
    context = processes.get_context("forkserver")
    context.set_forkserver_preload(["mustafar_compile.backend", "transformers.models.llama.modeling_llama", "ranks"])
    how = {"nprocs": world, "start_method": "spawn" if on_gpus else "forkserver"}
    seen = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, seen):
        processes.start_processes(_rank, (world, folder, checks), **how)
        return [pickle.loads(_file(folder, rank).read_bytes()) for rank in range(world)]


def made_once(name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` makes, in one of the processes of pytest-xdist for all of them."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return make()
    with Path(tempfile.gettempdir(), f"{name}-{run}.pickle").open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not file.read(1):
            file.write(pickle.dumps(make()))
        file.seek(0)
        return pickle.load(file)


def _file(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.pickle"


def _rank(rank: int, world: int, folder: str, checks: Mapping[str, tuple]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    how = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=SECONDS)}
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=f"file://{folder}/store", **how)
    results: dict[str, Any] = {}
    for name, (check, *arguments) in checks.items():
        torch.manual_seed(0)
        with torch.no_grad():
            results[name] = _outcome(check, arguments)
        _file(folder, rank).write_bytes(pickle.dumps(results))
    os._exit(0)  # to take a group down takes all of its ranks, and some may be gone


def _outcome(check: Check, arguments: list[Any]) -> Any:
    try:
        return check(*arguments)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def device() -> str:
    """Of the ranks."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def sharded(family: str = "llama", **changes: Any) -> nn.Module:
    """A tiny HF model of whose layers this rank holds a part, as ``from_pretrained`` leaves it."""
    from transformers.distributed import DistributedConfig

    model = hf_model(family, **changes).to(device())
    config, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=dist.get_world_size()))
    return type(model).maybe_distribute_model(model, config, mesh)


def printed_by(function: Callable[[], Any]) -> str:
    """What ``function`` prints."""
    with redirect_stdout(StringIO()) as out:
        function()
    return out.getvalue()
