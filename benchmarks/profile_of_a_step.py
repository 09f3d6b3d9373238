"""Where the time of a step goes: its kernels, and how long none of them runs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from timing import ON_GPU, Function, show, synchronize
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_RUNS = 5
_LONGEST = 25
_NAME = 110  # characters of the name of a kernel


def profile_of(step: Function) -> dict[str, Any]:
    """What one step does on the device, as a mean of several in a row, in a row of results.

    kernels: launches and microseconds by name, of the longest; a collective waits for other ranks in its kernel. ms:
    from its first kernel to that of the next step. busy_ms: while some kernel runs. On a machine without a GPU it is of
    operators, which hold each other.
    """
    activity, device = (ProfilerActivity.CUDA, DeviceType.CUDA) if ON_GPU else (ProfilerActivity.CPU, DeviceType.CPU)
    synchronize()
    with profile(activities=[activity]) as profiler:
        for _ in range(_RUNS):
            step()
        synchronize()
    ran = [event for event in profiler.events() if event.device_type == device]
    spans = sorted((event.time_range.start, event.time_range.end) for event in ran)
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in ran:
        kernel = kernels[event.name[:_NAME]]
        kernel[0] += 1 / _RUNS
        kernel[1] += (event.time_range.end - event.time_range.start) / _RUNS
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:_LONGEST]
    whole = (max(end for _, end in spans) - spans[0][0]) / _RUNS
    return {"ms": whole / 1e3, "busy_ms": _covered(spans) / _RUNS / 1e3, "kernels": dict(longest)}


def print_profile(title: str, found: dict[str, Any]) -> None:
    """What ``profile_of`` found, as a table."""
    rows = [{"us": us, "launches": round(count, 1), "kernel": name} for name, (count, us) in found["kernels"].items()]
    show(f"{title}: {found['ms']:.3f} ms a step, {found['busy_ms']:.3f} of them some kernel runs", rows)


def _covered(spans: list[tuple[float, float]]) -> float:
    """How much is in at least one of ``spans``, which are in order."""
    covered, until = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
