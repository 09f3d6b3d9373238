"""CUDA graphs on a CPU: what records and replays decode steps, over a stand-in for what CUDA does."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from mustafar_compile import backend
from mustafar_compile.calling import cuda_graphs


def record_on_a_cpu(monkeypatch) -> list[int]:
    """Decode steps on a CPU are recorded as on a GPU. Returns a list with an item for each recording."""
    made: list[int] = []

    def noted(*given):
        made.append(1)
        return _capture(*given)

    device = SimpleNamespace(lock=threading.Lock(), recording=None, active=nullcontext)
    monkeypatch.setattr(backend, "graph_device", lambda examples: torch.device("cpu"))
    monkeypatch.setattr(cuda_graphs, "_device", lambda index: device)
    monkeypatch.setattr(cuda_graphs, "capture", noted)
    for name, what in {
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: 0,
        "current_stream": lambda: "the stream",
        "graph_pool_handle": lambda: "the pool",
        "Event": lambda: SimpleNamespace(record=lambda: None, query=lambda: True),
    }.items():
        monkeypatch.setattr(torch.cuda, name, what)
    return made


def _capture(function, pool, stream):
    """As of a CUDA graph: what the function did is undone, and a replay does it."""
    tensors = [x for x in function.args if isinstance(x, torch.Tensor)]
    before = [(x, x.clone()) for x in tensors if 0 not in x.stride()]  # no step writes to one that is expanded
    results = function()
    for x, value in before:
        x.copy_(value)

    def replay():
        for kept, new in zip(results, function(), strict=True):
            if isinstance(kept, torch.Tensor) and kept is not new:
                kept.copy_(new)

    return results, replay
