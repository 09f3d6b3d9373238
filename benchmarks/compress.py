"""Pruning and compressing K and V of one layer after prefill, against a plain copy of the two.

    python benchmarks/compress.py
    python benchmarks/compress.py --shape 4,8192,128,bfloat16,rows

A copy reads and writes every byte once; a compression reads the same and writes about half of it or less.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timing import DEVICE, DTYPES, free, graphed, median_ms, operations, parser, write
from torch import Tensor

from mustafar_compile.lowering.format import CODES, Format

HEADS = 8
WINDOW = 32
SPARSITIES = (0.5, 0.7)
ORDERS = ("heads", "rows")


@dataclass(frozen=True)
class Shape:
    """order: "heads" lie in memory as [B, H, S, D]; "rows" as [B, S, H, D], which is how a projection leaves them."""

    batch: int
    tokens: int
    head_dim: int = 128
    dtype: str = "bfloat16"
    order: str = "heads"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "4,8192,128,bfloat16,rows"."""
        try:
            batch, tokens, head_dim, dtype, order = text.split(",")
            shape = cls(int(batch), int(tokens), int(head_dim), dtype, order)
        except ValueError as error:
            raise argparse.ArgumentTypeError("batch,tokens,head_dim,dtype,order are needed") from error
        if dtype not in DTYPES or order not in ORDERS:
            raise argparse.ArgumentTypeError(f"dtype is one of {[*DTYPES]}, order one of {[*ORDERS]}")
        return shape

    def tensor(self) -> Tensor:
        """Random K or V."""
        how = {"dtype": DTYPES[self.dtype], "device": DEVICE}
        if self.order == "heads":
            return torch.randn(self.batch, HEADS, self.tokens, self.head_dim, **how)
        return torch.randn(self.batch, self.tokens, HEADS, self.head_dim, **how).transpose(1, 2)


SHAPES = [
    Shape(8, 16384),
    Shape(8, 16384, dtype="float16"),
    Shape(8, 16384, order="rows"),
    Shape(1, 32768),
    Shape(4, 4096),
    Shape(32, 8192),
    Shape(8, 16384, head_dim=64),
    Shape(8, 16384, head_dim=64, dtype="float16"),
]


def measure(shape: Shape, codes: list[str]) -> list[dict[str, Any]]:
    """A row for each code and sparsity."""
    torch.manual_seed(0)
    key, value = shape.tensor(), shape.tensor()
    tokens = torch.tensor([shape.tokens], device=DEVICE)
    dense_bytes = key.nbytes + value.nbytes
    copying = median_ms(graphed(lambda: (key.clone(), value.clone())), runs=20)
    rows = []
    for code, sparsity in itertools.product(codes, SPARSITIES):
        form = Format.of(shape.head_dim, sparsity, WINDOW, code=code)

        def compress(form: Format = form) -> Any:
            return [operations().compress(x, tokens, form, shape.tokens) for x in (key, value)]

        taken = median_ms(graphed(compress), runs=20)
        times = {"ms": taken, "clone_ms": copying, "ratio": taken / copying, "dense_GB/s": dense_bytes / taken / 1e6}
        rows.append(asdict(shape) | {"code": code, "sparsity": sparsity, "kept": form.kept} | times)
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", type=Shape.parse, action="append", help="batch,tokens,head_dim,dtype,order")
    options.add_argument("--code", choices=CODES, action="append", help="of kept elements; default: none")
    given = options.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in given.shape or SHAPES:
        print(shape, flush=True)
        rows += measure(shape, given.code or ["none"])
        free()
    write("compress", rows)


if __name__ == "__main__":
    with torch.no_grad():
        main()
