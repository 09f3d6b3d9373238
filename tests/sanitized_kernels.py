"""Every kernel once on small caches, for ``compute-sanitizer``. ``test_gpu.py`` runs this in a process of its own."""

from __future__ import annotations

import torch

from cases import assert_close, make_case, make_mask
from mustafar_compile.lowering import kernels, ops, portable


def check(variant, head_dim, group, mask):
    """A step whose last block is partly filled, and the dense cache again."""
    how = {"group": group, "head_dim": head_dim, "value_dim": head_dim, "dtype": torch.bfloat16, "window": 4}
    case = make_case(tokens=77, device="cuda", **how)
    if mask:
        case.mask = make_mask(mask, (2, 1, 1, 77), seed=5).cuda()
    keys, values = case.past("key"), case.past("value")
    out = case.step(keys, values, decode=lambda *a: kernels.decode_attention(*a, variant=variant))
    assert_close(out, case, rounds_weights=True)
    assert torch.equal(ops.decompress(*keys, 77), portable.decompress(*keys, 77))


if __name__ == "__main__":
    for variant in ("tuned", "portable"):
        check(variant, 128, 4, "bool")
        check(variant, 64, 8, None)
    check("portable", 40, 3, "bias")
