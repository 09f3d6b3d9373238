"""Processes that run a check together, as the ranks of a process group, on CPUs or on GPUs."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from models import hf_model

SECONDS = 60
"""That a rank waits for another one."""

ALL_SECONDS = 300
"""That all checks of ranks may take together."""

_GRACE = 40
"""Seconds that processes may take to end when they are asked to: torchrun gives its ranks 30."""

_TOLD = 6000
"""Characters of what a rank printed that an error holds."""

Check = Callable[..., Any]


def results_of(
    checks: Mapping[str, tuple], world: int = 2, on_gpus: bool = False, seconds: int = ALL_SECONDS
) -> list[dict[str, Any]]:
    """What each rank got of the checks, by their names: the result, or the error as a text.

    checks: a function, which all ranks call, and its arguments. on_gpus: one for each rank; else they see none.
    seconds: for all checks. Raises RuntimeError, with what the ranks printed and where they are, for one that ends or
    takes longer.
    """
    context = processes.get_context("forkserver")
    context.set_forkserver_preload(["mustafar_compile.backend", "transformers.models.llama.modeling_llama", "ranks"])
    how = {"nprocs": world, "start_method": "spawn" if on_gpus else "forkserver", "join": False}
    seen = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, seen):
        _wait(processes.start_processes(_rank, (world, folder, checks, seconds), **how), folder, seconds)
        return [pickle.loads(_file(folder, rank).read_bytes()) for rank in range(world)]


def _wait(started: Any, folder: str, seconds: int) -> None:
    """Wait until all ranks have ended."""
    end = time.monotonic() + seconds
    try:
        while not started.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"ranks took longer than {seconds} s")
    except Exception as error:
        for process in started.processes:
            process.kill()
        told = [f"--- rank {i}:\n{_output(folder, i).read_text()[-_TOLD:]}" for i in range(len(started.processes))]
        raise RuntimeError("\n".join([str(error), *told])) from error


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


def outcomes(commands: Sequence[tuple[Sequence[Any], dict[str, str]]], seconds: int) -> list[tuple[int, str]]:
    """Exit codes of processes that run side by side, and what they print.

    commands: with what they have in their environment besides. Raises TimeoutError, with what was printed, where one
    takes longer than ``seconds``; they are asked to end then, as torchrun ends its ranks, and else are killed.
    """
    end = time.monotonic() + seconds
    with ExitStack() as stack:  # files, as a pipe would be waited for until the last child has ended
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        started = [
            subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | own, start_new_session=True)
            for (command, own), file in zip(commands, files, strict=True)
        ]
        late = [process for process in started if not _ends(process, end)]
        for process in late:
            process.terminate()
        for process in late:
            if not _ends(process, end + _GRACE):
                process.kill()
        for file in files:
            file.seek(0)
        told = [file.read() for file in files]
    if late:
        raise TimeoutError(f"processes took longer than {seconds} s:\n" + "\n---\n".join(told))
    return [(process.returncode, text) for process, text in zip(started, told, strict=True)]


def _ends(process: subprocess.Popen, end: float) -> bool:
    """Whether it has ended at a time."""
    try:
        process.wait(max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return False
    return True


def _file(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.pickle"


def _output(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.txt"


def _rank(rank: int, world: int, folder: str, checks: Mapping[str, tuple], seconds: int) -> None:
    with _output(folder, rank).open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    faulthandler.dump_traceback_later(0.9 * seconds)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    how = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=SECONDS)}
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=f"file://{folder}/store", **how)
    results: dict[str, Any] = {}
    for name, (check, *arguments) in checks.items():
        print(f"{time.strftime('%X')} {name}", file=sys.stderr, flush=True)
        torch.manual_seed(0)
        with torch.no_grad():
            results[name] = _outcome(check, arguments)
        _file(folder, rank).write_bytes(pickle.dumps(results))
    os._exit(0)  # to take a group down takes all of its ranks, and some may be gone


def _outcome(check: Check, arguments: list[Any]) -> Any:
    try:
        return check(*arguments)
    except (Exception, pytest.fail.Exception) as error:
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
