"""What groups of KV heads cost a decode step: one layer's op over as many bytes, in one format and in several.

    python benchmarks/head_groups.py
    python benchmarks/head_groups.py --shape 8,8,4,16384,128

A group has kernels of its own, so there are more launches, each over fewer heads. Timed whole, in a CUDA graph, with a
cold L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from attention import MAIN, WINDOW, Shape
from timing import DEVICE, DTYPES, cold, free, graphed, median_ms, parser, write
from torch import Tensor

from mustafar_compile.lowering import ops
from mustafar_compile.lowering.format import Format, order_for
from mustafar_compile.lowering.head_groups import HeadGroups
from mustafar_compile.lowering.layout import Layout

WAYS: dict[str, Callable[[int], list[float]]] = {
    "all alike": lambda heads: [0.5] * heads,
    "two groups, side by side": lambda heads: [0.25] * (heads // 2) + [0.75] * (heads // 2),
    "two groups, by turns": lambda heads: [0.25, 0.75] * (heads // 2),
    "four groups": lambda heads: [0.25, 0.75, 0.375, 0.625] * (heads // 4),
}
"""Sparsities of the heads. All take the same bytes."""


def layout_of(sparsities: Sequence[float], head_dim: int) -> Layout:
    """How a cache with these heads is laid out."""
    parts = {x: Format.of(head_dim, x, WINDOW, order_for(DEVICE)) for x in sparsities}
    if len(parts) == 1:
        return parts[sparsities[0]]
    return HeadGroups.of([[i for i, own in enumerate(sparsities) if own == x] for x in parts], list(parts.values()))


def step_ms(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> float:
    """The last token enters, and is attended to with all others."""
    tokens, text = key.shape[2], layout.encode()
    position = torch.tensor([tokens - 1], device=DEVICE)
    keys, values = (ops.compress(x, position, text, tokens) for x in (key, value))
    counts = [own[-1] for buffers in (keys, values) for own in layout.split(buffers)]
    start = [x.clone() for x in counts]
    new = [x[:, :, -1:].contiguous() for x in (key, value)]
    given = query, *new, keys, values, text, text, position, None, None, key.shape[3] ** -0.5

    def rewind() -> None:
        torch._foreach_copy_(counts, start)
        cold()

    return median_ms(graphed(lambda: ops.decode_attention(*given)), before=rewind)


def measure(shape: Shape) -> list[dict[str, Any]]:
    """One row for each way."""
    torch.manual_seed(0)
    how = {"dtype": DTYPES[shape.dtype], "device": DEVICE}
    key, value = (torch.randn(shape.batch, shape.kv_heads, shape.tokens, shape.head_dim, **how) for _ in range(2))
    query = torch.randn(shape.batch, shape.kv_heads * shape.gqa, 1, shape.head_dim, **how)
    rows: list[dict[str, Any]] = []
    for way, sparsities in WAYS.items():
        took = step_ms(query, key, value, layout_of(sparsities(shape.kv_heads), shape.head_dim))
        slower = took / rows[0]["ms"] if rows else 1.0
        rows.append(asdict(shape) | {"way": way, "ms": took, "over_alike": slower})
        free()
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", type=Shape.parse, action="append", help="batch,heads,gqa,tokens,head_dim[,float16]")
    shapes = options.parse_args().shape or MAIN
    write("head_groups", [row for shape in shapes for row in measure(shape)])


if __name__ == "__main__":
    with torch.no_grad():
        main()
