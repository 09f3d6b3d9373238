"""Where a decode step's time goes, by kind of kernel."""

from __future__ import annotations

import re

KINDS = {
    "attention": r"attend|append|combine|weigh_queries|flash|fmha|sdpa|attention|batchdecode|mustafar",
    "matmul": r"^(?!triton_(poi|red|per)).*(gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|triton_tem|addmm|::mm|matmul)",
}
REST = "rest"


def by_kind(kernels: dict[str, float], busy_ms: float) -> dict[str, float]:
    """Milliseconds of a step by kernel -> by kind. busy_ms: while some kernel runs.

    A token is taken in beside attention, on a stream of its own: where kernels take longer than some kernel runs, the
    rest is such time of attention that would count twice.
    """
    found = dict.fromkeys([*KINDS, REST], 0.0)
    for name, ms in kernels.items():
        found[kind_of(name)] += ms
    twice = max(0.0, sum(found.values()) - busy_ms)
    return found | {"attention": max(0.0, found["attention"] - twice)}


def kind_of(kernel: str) -> str:
    """What a kernel of this name does."""
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), REST)
