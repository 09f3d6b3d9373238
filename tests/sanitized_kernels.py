"""Every kernel once on small caches, for ``compute-sanitizer``. ``test_gpu.py`` runs this in a process of its own.

python tests/sanitized_kernels.py memcheck | racecheck: the tool that watches.
"""

from __future__ import annotations

import functools
import sys

import torch

from cases import assert_close, decompressed, make_case, make_mask
from guarded import STEPS, step_at, step_inputs
from mustafar_compile.lowering import kernels, ops, portable


def check(variant, head_dim, group, mask, code="none", tokens=77):
    """A step, and the dense cache again. With 77 tokens the last block is partly filled."""
    how = {"group": group, "head_dim": head_dim, "value_dim": head_dim, "dtype": torch.bfloat16, "window": 4}
    how |= {"key_code": code, "value_code": code}
    case = make_case(tokens=tokens, device="cuda", **how)
    if mask:
        case.mask = make_mask(mask, (2, 1, 1, tokens), seed=5).cuda()
    keys, values = case.past("key"), case.past("value")
    decode = functools.partial(kernels.decode_attention, variant=variant)
    assert_close(case.step(keys, values, decode=decode), case, rounds_weights=True)
    assert torch.equal(decompressed(keys, tokens, by=ops), decompressed(keys, tokens, by=portable))


def check_outside(variant, queries, mask):
    """Positions, counts and bitmaps that no cache has: no index leaves a buffer. Each lies in memory of its own."""
    decode = functools.partial(kernels.decode_attention, variant=variant)
    inputs = step_inputs(queries, 4, mask, torch.bfloat16, "cuda")
    for place in STEPS:
        taken = step_at(decode, *inputs, place, lambda x: x.clone())
        assert variant == "tuned" or taken[0].isfinite().all()


if __name__ == "__main__":
    # The warps of a program read each other's rows, for nothing, where a bitmap has more bits than its row has values.
    # A coded row that is not there yet may have one, since its peak alone makes it count as empty. So racecheck sees
    # full blocks, 16 of them.
    coded = 77 if sys.argv[1] == "memcheck" else 16 * 32 + 4 + 1
    for variant in ("tuned", "portable"):
        check(variant, 128, 4, "bool")
        check(variant, 64, 8, None)
        check(variant, 128, 4, None, "int8", coded)
        check(variant, 64, 4, "bool", "int4", coded)
        if sys.argv[1] == "memcheck":
            check_outside(variant, 1, "bool")
            check_outside(variant, 3, None)
    check("portable", 40, 3, "bias")
