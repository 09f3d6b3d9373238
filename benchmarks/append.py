"""What taking in one token costs: the kernel ``append`` alone, for all layers of a model.

    python benchmarks/append.py
    python benchmarks/append.py --batch 32 --step-ms 11.5

The kernel writes the new token into the window, prunes and packs the one that leaves it, and attends to the window. In
a decode step it runs beside the attending kernel; here it is timed by itself, so its share is an upper bound.
With --step-ms, the time of a whole decode step of the model, its share of that step is shown.
"""

from __future__ import annotations

from typing import Any

import torch
from attention import Compressed
from timing import DEVICE, free, kernel_us, parser, write

KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128


def measure(batch: int, context: int, sparsity: float, layers: int) -> dict[str, Any]:
    """The kernel's time for one layer and for all."""
    torch.manual_seed(0)
    how = {"dtype": torch.bfloat16, "device": DEVICE}
    key, value = (torch.randn(batch, KV_HEADS, context, HEAD_DIM, **how) for _ in range(2))
    query = torch.randn(batch, KV_HEADS * GROUP, 1, HEAD_DIM, **how)
    ours = Compressed(query, key, value, sparsity)
    taken = kernel_us(ours.step_in_turn, ["append"], before=ours.rewind, runs=50)["append"]
    sizes = {"batch": batch, "context": context, "sparsity": sparsity, "kept": ours.format.kept}
    return sizes | {"append_us": taken, "layers": layers, "all_layers_ms": layers * taken / 1e3}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, action="append", help="default: 8, 32 and 64")
    options.add_argument("--context", type=int, default=4096, help="cached tokens; the time hardly depends on it")
    options.add_argument("--sparsity", type=float, action="append", help="default: 0.5 and 0.7")
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--step-ms", type=float, help="time of a whole decode step, as decode_step.py gives it")
    given = options.parse_args()
    rows = []
    for batch in given.batch or (8, 32, 64):
        for sparsity in given.sparsity or (0.5, 0.7):
            row = measure(batch, given.context, sparsity, given.layers)
            if given.step_ms:
                row["share_of_step"] = row["all_layers_ms"] / given.step_ms
            rows.append(row)
            free()
    write("append", rows)


if __name__ == "__main__":
    with torch.no_grad():
        main()
