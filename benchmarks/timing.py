"""What the benchmarks share: times on a CUDA device with a cold L2 cache, bandwidth, results as JSON and as a table.

On a machine without a GPU everything runs on the CPU with the portable code. That is for trying the scripts out at tiny
shapes; the times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
OUT_VARIABLE = "BENCHMARK_OUT"
"""The environment variable that names another folder for results than ``out`` beside this file."""
OUT = Path(os.environ.get(OUT_VARIABLE) or Path(__file__).resolve().parent / "out")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SWEEP_BYTES = 256 * 2**20 if ON_GPU else 2**10  # five times the L2 cache of an H200
_WARM_UPS = 3

Function = Callable[[], Any]


def operations() -> Any:
    """The module with ``compress``, ``decompress`` and ``decode_attention`` for the device."""
    if ON_GPU:
        from mustafar_compile.lowering import kernels as module
    else:
        from mustafar_compile.lowering import portable as module
    return module


def synchronize() -> None:
    """Wait for the device."""
    if ON_GPU:
        torch.cuda.synchronize()


def free() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


@functools.cache
def _sweep_buffer() -> Tensor:
    return torch.ones(_SWEEP_BYTES // 4, device=DEVICE)


def cold() -> None:
    """Read more than the L2 cache holds.

    In a model the weights of a layer pass through the cache between two attentions, so a cache tensor is never found
    there. Reading leaves nothing to be written back while the measured function runs, and it takes long enough for
    the host to launch that function in the meantime.
    """
    _sweep_buffer().sum()


def median_ms(function: Function, runs: int = 50, before: Function = cold) -> float:
    """Median time of ``function``; ``before`` runs ahead of each call and is not counted."""
    for _ in range(_WARM_UPS):
        before()
        function()
    synchronize()
    return statistics.median(_events(function, runs, before) if ON_GPU else _walls(function, 3, before))


def _events(function: Function, runs: int, before: Function) -> list[float]:
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in marks:
        before()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def _walls(function: Function, runs: int, before: Function) -> list[float]:
    times = []
    for _ in range(runs):
        before()
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def in_a_row(function: Function, runs: int) -> tuple[float, float]:
    """Mean times of ``function``, ms: of the device, which is busy with it when the clock starts, and of the host."""
    function()
    begin, start = _moment(), time.perf_counter()
    for _ in range(runs):
        function()
    host, end = time.perf_counter() - start, _moment()
    synchronize()
    return (begin.elapsed_time(end) if ON_GPU else end - begin) / runs, 1e3 * host / runs


def _moment() -> Any:
    """When the device has done what was launched: an event, or without a GPU ms."""
    if not ON_GPU:
        return 1e3 * time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def graphed(function: Function) -> Function:
    """Capture ``function`` in a CUDA graph and return its replay. Raises what ``function`` raises.

    The replay keeps ``function``, and so the tensors that the graph reads.
    """
    if not ON_GPU:
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return functools.partial(_replay, graph, function)


def _replay(graph: torch.cuda.CUDAGraph, _: Function) -> None:
    graph.replay()


def kernel_us(function: Function, names: Sequence[str], before: Function = cold, runs: int = 10) -> dict[str, float]:
    """Mean microseconds of the kernels with these names, each launched once by ``function``. NaN without a GPU."""
    if not ON_GPU:
        return dict.fromkeys(names, float("nan"))
    from torch.profiler import ProfilerActivity, profile

    before()
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            before()
            function()
        torch.cuda.synchronize()
    found = {event.key: event.device_time_total / event.count for event in profiler.key_averages()}
    missing = [name for name in names if name not in found]
    if missing:
        raise RuntimeError(f"the profiler saw no kernel {missing}; it saw {sorted(found)}")
    return {name: found[name] for name in names}


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy: what a kernel bound by memory can hope for."""
    source = torch.ones(2**30 if ON_GPU else 2**20, dtype=torch.uint8, device=DEVICE)
    seconds = median_ms(source.clone, runs=20) / 1e3
    return 2 * source.nbytes / seconds


def environment() -> dict[str, str]:
    """Where the numbers come from."""
    return {"device": torch.cuda.get_device_name() if ON_GPU else "CPU"} | versions()


def versions() -> dict[str, str]:
    """The same but for the device, which is left alone."""
    return {
        "cuda": str(torch.version.cuda),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser whose help is a module's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def path_of(name: str) -> Path:
    """The file of the results ``name``."""
    return OUT / f"{name}.json"


def read(name: str) -> list[dict[str, Any]]:
    """The rows that ``write`` wrote, none if it never did."""
    path = path_of(name)
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def save(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Save rows, with environment and command line."""
    content = {"environment": environment(), "command": sys.argv, "copy_bandwidth": copy_bandwidth(), "rows": rows}
    OUT.mkdir(exist_ok=True)
    path_of(name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Save rows, with environment and command line, and print them as a table."""
    save(name, rows)
    show(name, rows)
    print(f"{environment()}\ncopy: {copy_bandwidth() / 1e12:.2f} TB/s. Written to {path_of(name)}", flush=True)


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table, without the columns that hold dicts."""
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict)))
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column.replace("_", "\n"), no_wrap=True)
    for row in rows:
        table.add_row(*(_text(row.get(column, "")) for column in columns))
    # A log file has no width, and 80 columns would break every number.
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
