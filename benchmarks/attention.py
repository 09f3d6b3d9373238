"""One decode step's attention over a compressed cache, against the best dense attention on the same data.

    python benchmarks/attention.py --quick
    python benchmarks/attention.py
    python benchmarks/attention.py --shape 8,8,4,16384,128 --sparsity 0.7
    python benchmarks/attention.py --quick --code int8 --code int4 --sparsity 0 --sparsity 0.5 --sparsity 0.7
    python benchmarks/attention.py --quick --key-strategy magnitude --key-strategy output-aware

Our op is timed whole, in a CUDA graph: it takes in the new token, prunes the one that leaves the window, and attends.
No row is reported whose result differs from float64 attention over the decompressed cache.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import dense
import torch
from timing import (
    DEVICE,
    DTYPES,
    ON_GPU,
    cold,
    copy_bandwidth,
    free,
    graphed,
    kernel_us,
    median_ms,
    operations,
    parser,
    save,
    write,
)
from torch import Tensor

from mustafar_compile.lowering.decode_step import DecodeStep
from mustafar_compile.lowering.format import CODES, Format
from mustafar_compile.lowering.weighing import weigh_queries

WINDOW = 32
SPARSITIES = (0.5, 0.7)
KERNELS = ("append", "attend", "combine")
STRATEGIES = ("magnitude", "output-aware")  # of keys: those that kernels serve
TOLERANCE = 5e-3


@dataclass(frozen=True)
class Shape:
    """batch, KV heads, query heads per KV head, cached tokens, channels."""

    batch: int
    kv_heads: int
    gqa: int
    tokens: int
    head_dim: int
    dtype: str = "bfloat16"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "8,8,4,16384,128", with ",float16" behind where wanted."""
        *numbers, last = text.split(",")
        dtype = [last] if last in DTYPES else []
        try:
            shape = cls(*map(int, numbers if dtype else [*numbers, last]), *dtype)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError("five numbers are needed: batch,heads,gqa,tokens,head_dim") from error
        if shape.tokens <= WINDOW:
            raise argparse.ArgumentTypeError(f"more than {WINDOW} tokens are needed, or nothing is pruned")
        return shape


MAIN = [
    Shape(8, 8, 4, 16384, 128),
    Shape(8, 8, 1, 16384, 128),
    Shape(8, 8, 8, 16384, 128),
    Shape(1, 8, 4, 32768, 128),
    Shape(1, 8, 4, 131072, 128),
    Shape(8, 8, 4, 16384, 64),
    Shape(64, 8, 4, 4096, 128),
]
LENGTHS = [2**n for n in range(12, 18)]
SWEEP = [
    *(Shape(8, 8, gqa, tokens, 128) for gqa in (1, 4, 8) for tokens in LENGTHS),
    *(Shape(8, 8, 4, tokens, 64) for tokens in LENGTHS),
    *(Shape(1, 8, 4, tokens, 128) for tokens in LENGTHS),
    *(Shape(batch, 8, 4, 8192, 128) for batch in (1, 4, 16, 32, 64)),
    Shape(8, 8, 4, 16384, 128, "float16"),
]


class Compressed:
    """The compressed cache of a dense one, one token short of full, and the step that fills it."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, sparsity: float, code: str, strategy: str) -> None:
        batch, heads, tokens, head_dim = key.shape
        ranked = Format.of(head_dim, sparsity, WINDOW, code=code, strategy=strategy)
        self.format, self.ranking = ranked.plain, ranked.ranking
        tokens_written = torch.full((batch,), tokens - 1, dtype=torch.int64, device=DEVICE)
        _, self.state = self.ranking.of_prompt(key, tokens_written, ranked, query, None)
        self.position = torch.tensor([tokens - 1], device=DEVICE)
        self.query, self.scale = query, head_dim**-0.5
        self.new = [x[:, :, -1:].contiguous() for x in (key, value)]
        self.keys, self.values = (operations().compress(x, self.position, self.format, tokens) for x in (key, value))
        self.counts = [buffers[self.format.place("counts")] for buffers in (self.keys, self.values)]
        self.start = [counts.clone() for counts in self.counts]
        itemsize, pruned = key.element_size(), tokens - WINDOW
        row = pruned * self.format.token_bytes(itemsize) + WINDOW * head_dim * itemsize
        self.bytes_read = 2 * batch * heads * row

    def step(self, **how: bool) -> Tensor:
        """The last token enters, and is attended to with all others."""
        caches = self.keys, self.values, self.format, self.format
        weights = self.weigh() if self.state else None
        new = self.query, *self.new
        step = DecodeStep(*new, *caches, self.position, None, None, self.scale, key_weights=weights)
        return operations().decode_attention(step, **how)

    def weigh(self) -> Tensor | None:
        """What the strategy makes of the query: in one launch where there is a GPU."""
        if ON_GPU:
            return weigh_queries(self.query, self.position, *self.state)
        return self.ranking.of_step(self.query, self.position, self.format, self.state)

    def step_in_turn(self) -> Tensor:
        """The same, each kernel after the other, to time them."""
        return self.step(overlap=False)

    def rewind(self) -> None:
        """Back to before the step, so that the next one has a token to prune again; with a cold L2 cache.

        The slot of the ring stays as it is, so the new token is also the one that leaves: the same work.
        """
        torch._foreach_copy_(self.counts, self.start)
        cold()

    def error(self) -> float:
        """The largest relative error (in norm) of a batch entry's result against float64."""
        self.rewind()
        results = self.step()
        errors = [self._error_of(entry, result) for entry, result in enumerate(results)]
        return float(torch.stack(errors).max())  # NaN where any of them is

    def _error_of(self, entry: int, result: Tensor) -> Tensor:
        """One entry at a time: a float64 copy of the whole cache would not fit."""
        key, value = (self._dense(buffers, entry) for buffers in (self.keys, self.values))
        query = self.query[entry].double().view(key.shape[0], -1, key.shape[2])
        expected = (query @ key.transpose(1, 2) * self.scale).softmax(-1) @ value
        difference = result.double().view(expected.shape) - expected
        return difference.norm() / expected.norm()

    def _dense(self, buffers: list[Tensor], entry: int) -> Tensor:
        own = [x[entry : entry + 1] for x in buffers]
        return operations().decompress(own, self.format, int(self.position) + 1)[0].double()


def measure(shape: Shape, kinds: Iterable[tuple[str, str, float]], flex: bool) -> list[dict[str, Any]]:
    """One row for each strategy of keys, code and sparsity whose result is right."""
    torch.manual_seed(0)
    how = {"dtype": DTYPES[shape.dtype], "device": DEVICE}
    key, value = (torch.randn(shape.batch, shape.kv_heads, shape.tokens, shape.head_dim, **how) for _ in range(2))
    query = torch.randn(shape.batch, shape.kv_heads * shape.gqa, 1, shape.head_dim, **how)
    peers, fp8 = dense.measure(query, key, value, flex), dense.measure_fp8(query, key, value)
    dense_bytes = key.nbytes + value.nbytes
    rows = []
    for strategy, code, sparsity in kinds:
        ours = Compressed(query, key, value, sparsity, code, strategy)
        error, kind = ours.error(), {"key_strategy": strategy, "code": code, "sparsity": sparsity}
        if error <= TOLERANCE:
            measured = row(ours, peers, dense_bytes)
            over_fp8 = {} if fp8 is None else {"fp8_ms": fp8, "over_fp8": fp8 / measured["ours_ms"]}
            rows.append(asdict(shape) | kind | measured | over_fp8 | {"error": error})
        else:
            print(f"{shape}, {kind}: WRONG by {error:.2g}, so its time is not reported", flush=True)
        del ours
        free()
    return rows


def row(ours: Compressed, peers: dict[str, float], dense_bytes: int) -> dict[str, Any]:
    """Times, ratios, and how near to the bandwidth of a copy they come."""
    best = min(peers, key=peers.__getitem__)
    whole = median_ms(graphed(ours.step), before=ours.rewind)
    names = (*KERNELS, "weigh") if ours.state else KERNELS
    kernels = kernel_us(ours.step_in_turn, names, before=ours.rewind)
    attention = (kernels["attend"] + kernels["combine"]) / 1e3
    limit, dense_limit = (1e3 * size / copy_bandwidth() for size in (ours.bytes_read, dense_bytes))
    return {
        "kept": ours.format.kept,
        "dense": best,
        "dense_ms": peers[best],
        "ours_ms": whole,
        "ratio": peers[best] / whole,
        "attention_ms": attention,
        "attention_ratio": peers[best] / attention,
        **{f"{name}_us": time for name, time in kernels.items()},
        "MB": ours.bytes_read / 1e6,
        "of_limit": limit / whole,
        "attention_of_limit": limit / attention,
        "dense_of_limit": dense_limit / peers[best],
        "peers": peers,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="the seven main shapes only, under a minute")
    options.add_argument("--shape", type=Shape.parse, action="append", help="batch,heads,gqa,tokens,head_dim[,float16]")
    options.add_argument("--sparsity", type=float, action="append", help="default: 0.5 and 0.7")
    options.add_argument("--code", choices=CODES, action="append", help="of kept elements; default: none")
    options.add_argument("--key-strategy", choices=STRATEGIES, action="append", help="default: magnitude")
    options.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which has to compile")
    given = options.parse_args()
    shapes = given.shape or (MAIN if given.quick else list(dict.fromkeys(MAIN + SWEEP)))
    flex = set() if given.no_flex else set(MAIN[:1] if given.quick else MAIN)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        print(shape, flush=True)
        kinds = given.key_strategy or STRATEGIES[:1], given.code or CODES[:1], given.sparsity or SPARSITIES
        rows += measure(shape, itertools.product(*kinds), shape in flex)
        save("attention", rows)  # a long run may be cut short
        free()
    write("attention", rows)


if __name__ == "__main__":
    with torch.no_grad():
        main()
