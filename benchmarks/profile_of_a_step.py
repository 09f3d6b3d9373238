"""Where the time of a step goes: its kernels, how long none of them runs, and how long ranks wait for each other."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from timing import ON_GPU, Function, show, synchronize
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_RUNS = 5
_LONGEST = 25
_NAME = 110  # characters of the name of a kernel
_HEAD_START = 300_000_000  # cycles for which the device sleeps, 150 ms: enough to launch all steps
_COLLECTIVE = re.compile("nccl|_shot_all_reduce")


def profile_of(step: Function) -> dict[str, Any]:
    """What one step does on the device, as a mean of several in a row, in a row of results.

    kernels: launches and microseconds by name, of the longest; a collective waits for other ranks in its kernel. ms:
    from its first kernel to that of the next step. busy_ms: while some kernel runs. collectives_us: of each collective
    of all steps, in order. On a machine without a GPU it is of operators, which hold each other.

    All steps are launched while the device sleeps, so that no kernel waits for a host that profiling slows down. The
    first step is left out: in it a rank waits for the others to begin.
    """
    activity, device = (ProfilerActivity.CUDA, DeviceType.CUDA) if ON_GPU else (ProfilerActivity.CPU, DeviceType.CPU)
    synchronize()
    with profile(activities=[activity]) as profiler:
        if ON_GPU:
            torch.cuda._sleep(_HEAD_START)
        for _ in range(1 + _RUNS):
            step()
        synchronize()
    ran = sorted((e for e in profiler.events() if e.device_type == device), key=lambda event: event.time_range.start)
    ran = ran[-_RUNS * (len(ran) // (1 + _RUNS)) :]
    spans = [(event.time_range.start, event.time_range.end) for event in ran]
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event, (start, end) in zip(ran, spans, strict=True):
        kernel = kernels[event.name[:_NAME]]
        kernel[0] += 1 / _RUNS
        kernel[1] += (end - start) / _RUNS
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:_LONGEST]
    whole = (max(end for _, end in spans) - spans[0][0]) / _RUNS
    sums = [end - start for event, (start, end) in zip(ran, spans, strict=True) if _COLLECTIVE.search(event.name)]
    times = {"ms": whole / 1e3, "busy_ms": _covered(spans) / _RUNS / 1e3}
    return times | {"kernels": dict(longest), "collectives_us": sums}


def print_profile(title: str, found: dict[str, Any]) -> None:
    """What ``profile_of`` found, as a table."""
    rows = [{"us": us, "launches": round(count, 1), "kernel": name} for name, (count, us) in found["kernels"].items()]
    show(f"{title}: {found['ms']:.3f} ms a step, {found['busy_ms']:.3f} of them some kernel runs", rows)


def waits_of(profiles: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How long each rank waits for others in the collectives of a step. profiles: what each of them found.

    A collective ends on all ranks at once, and the rank that comes last does not wait. So the shortest time of a rank
    is what the collective takes (collectives_ms), and what others are in it beyond that is waiting (waiting_ms). last:
    the share of collectives to which the rank comes last. No clocks are compared.
    """
    count = min(len(found["collectives_us"]) for found in profiles)
    took = torch.tensor([found["collectives_us"][-count:] for found in profiles])  # [ranks, collectives of all steps]
    least, last = took.amin(0), took.argmin(0)
    return [
        {"rank": rank, "ms": found["ms"], "busy_ms": found["busy_ms"], "collectives_ms": _of_a_step(least)}
        | {"waiting_ms": _of_a_step(took[rank] - least), "last": (last == rank).float().mean().item()}
        for rank, found in enumerate(profiles)
    ]


def _of_a_step(us: torch.Tensor) -> float:
    return us.sum().item() / _RUNS / 1e3


def _covered(spans: list[tuple[float, float]]) -> float:
    """How much is in at least one of ``spans``, which are in order."""
    covered, until = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
