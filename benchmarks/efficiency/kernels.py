"""Where a decode step's time goes, by kind of kernel."""

from __future__ import annotations

import re

KINDS = {
    "attention": r"attend|append|combine|weigh_queries|flash|fmha|sdpa|attention|batchdecode|mustafar",
    "matmul": r"^(?!triton_(poi|red|per)).*(gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|triton_tem|addmm|::mm|matmul)",
}
REST = "rest"


def by_kind(kernels: dict[str, float]) -> dict[str, float]:
    """Milliseconds of a step by kernel -> by kind. Kernels of two streams may run side by side."""
    found = dict.fromkeys([*KINDS, REST], 0.0)
    for name, ms in kernels.items():
        found[kind_of(name)] += ms
    return found


def kind_of(kernel: str) -> str:
    """What a kernel of this name does."""
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), REST)
