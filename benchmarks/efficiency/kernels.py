"""Where a decode step's time goes: by kernel, and by kind of kernel."""

from __future__ import annotations

import re

from timing import ON_GPU, Function, synchronize
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "attention": r"attend|append|combine|weigh_queries|flash|fmha|sdpa|attention|batchdecode|mustafar",
    "matmul": r"gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|triton_tem|addmm|::mm|matmul|linear",
}
REST = "rest"
_STEPS = 5
_LONGEST = 160  # characters of a name: those of templates have thousands
_LEAST = 0.002  # of the whole: what takes less is not named


def by_kernel(step: Function) -> dict[str, float]:
    """Milliseconds of a step by kernel; on a CPU by op. Kernels of two streams may run side by side."""
    step()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]) as profiler:
        for _ in range(_STEPS):
            step()
        synchronize()
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        taken = event.self_device_time_total if ON_GPU else event.self_cpu_time_total
        found[event.key[:_LONGEST]] = found.get(event.key[:_LONGEST], 0) + taken / 1e3 / _STEPS
    whole = sum(found.values())
    named = {name: ms for name, ms in found.items() if ms >= _LEAST * whole}
    return dict(sorted(named.items(), key=lambda item: -item[1])) | {"others": whole - sum(named.values())}


def by_kind(kernels: dict[str, float]) -> dict[str, float]:
    """The same summed up by kind."""
    found = dict.fromkeys([*KINDS, REST], 0.0)
    for name, ms in kernels.items():
        found[kind_of(name)] += ms
    return found


def kind_of(kernel: str) -> str:
    """What a kernel of this name does."""
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), REST)
