"""Calibrated budgets against all layers alike, at the same bytes: nats a text costs a model over its dense cache.

    python benchmarks/budgets.py --model tiny_llama
    python benchmarks/budgets.py --model smollm2 --texts 2

Calibrated on two parts of other texts than are evaluated. Teacher-forced, see accuracy/teacher_forced.py. Models run in
float32; caches are rounded to bfloat16, in which bytes are counted.
"""

from __future__ import annotations

import inspect
import math
import pydoc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import parser, show, write
from torch import Tensor

from accuracy import teacher_forced
from accuracy.dialects import Code
from accuracy.models import TEXTS, Subject, subject
from mustafar_compile import Budget
from mustafar_compile.calibration.attending import Attention, attending
from mustafar_compile.calibration.budget import LayerBudget, OfHeads, Stored
from mustafar_compile.calibration.calibrate import measured
from mustafar_compile.calibration.candidates import format_of, read_back
from mustafar_compile.lowering.format import CODES

WINDOW, DTYPE = 32, torch.bfloat16
CALIBRATION_TOKENS = 1024  # of each of two parts
DIVERGENCE_EVERY = 8  # tokens
UNIFORM = [Stored(0.7), Stored(0.5), Stored(0.7, "int8"), Stored(0.7, "int4")]
"""What all layers have alike. Each gives the bytes of a budget, too."""
Row = dict[str, Any]


def calibration_texts(read: Subject) -> list[Tensor]:
    """Two parts of what the model is calibrated on: a module, or what ``help()`` says on two."""
    if isinstance(read.dialect, Code):
        texts = [inspect.getsource(__import__("difflib"))] * 2
    else:
        texts = [pydoc.render_doc(module, renderer=pydoc.plaintext) for module in ("statistics", "logging")]
    ids = [read.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0] for text in texts]
    starts = len(ids[0]) // 4, len(ids[1]) // 2
    return [part[start : start + CALIBRATION_TOKENS] for part, start in zip(ids, starts, strict=True)]


def uniform(stored: Stored, layers: list[int], head_dim: int) -> Budget:
    """All layers alike."""
    share = format_of(stored, head_dim, WINDOW).token_bytes(DTYPE.itemsize) / (head_dim * DTYPE.itemsize)
    return Budget(dict.fromkeys(layers, LayerBudget(stored, stored)), WINDOW, share, math.nan, math.nan)


def hidden_states(model: Any, ids: Tensor, budget: Budget) -> Tensor:
    """What the model makes of the tokens with such a cache."""

    def read(x: Tensor, stored: OfHeads) -> Tensor:
        if isinstance(stored, tuple):
            return torch.cat([read(head, own) for head, own in zip(x.split(1, 1), stored, strict=True)], 1)
        return read_back(x, format_of(stored, x.shape[-1], WINDOW), DTYPE)

    def attend(of: Attention) -> Tensor:
        layer, k, v = budget.layers[of.layer], of.key, of.value
        return teacher_forced.attention(of.query, k, v, read(k, layer.key), read(v, layer.value), WINDOW, of.scale)

    with attending(model, attend):
        return teacher_forced.hidden_states(model, ids)


class Texts:
    """Texts, and what the dense model says of them."""

    def __init__(self, model: Any, texts: list[Tensor]) -> None:
        self.model, self.texts = model, texts
        hidden = [teacher_forced.hidden_states(model, ids) for ids in texts]
        self.losses = [teacher_forced.losses(model, ids, x) for ids, x in zip(texts, hidden, strict=True)]
        self.said = [teacher_forced.log_probabilities(model, x[::DIVERGENCE_EVERY]) for x in hidden]

    def row(self, budget: Budget) -> Row:
        """over_dense: mean nats a token more than dense, error: its standard error. kl: divergence from dense."""
        more, divergence = [], []
        for ids, losses, said in zip(self.texts, self.losses, self.said, strict=True):
            hidden = hidden_states(self.model, ids, budget)
            more.append(teacher_forced.losses(self.model, ids, hidden) - losses)
            now = teacher_forced.log_probabilities(self.model, hidden[::DIVERGENCE_EVERY])
            divergence.append(F.kl_div(now, said, reduction="batchmean", log_target=True).item())
        over = torch.cat(more)
        return {
            "bytes": budget.bytes,
            "over_dense": over.mean().item(),
            "error": over.std().item() / math.sqrt(len(over)),
            "kl": statistics.fmean(divergence),
            "predicted": budget.loss,
        }


def ways(read: Subject, texts: list[Tensor]) -> Iterator[tuple[str, Budget]]:
    """What is compared, each with its name."""
    start = time.perf_counter()
    found = measured(read.model, texts, None, CODES, WINDOW, DTYPE, progress=True)
    print(f"measured in {time.perf_counter() - start:.0f} s", flush=True)
    ((_, head_dim),) = set(found.shapes.values())
    layers = sorted({layer for layer, _ in found.shapes})
    for stored in UNIFORM:
        alike = uniform(stored, layers, head_dim)
        yield f"uniform {stored}", alike
        for name, codes in {"no codes": ["none"], "codes": CODES}.items():
            if stored.code in codes:
                yield f"budget of {stored}, {name}", found.budget(alike.bytes, codes)
                yield f"budget of {stored}, {name}, by head", found.budget(alike.bytes, codes, by_head=True)


@torch.no_grad()
def main() -> None:
    """Run from the command line."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", required=True, help="tiny_llama, smollm2, a folder or a name on the Hub")
    arguments.add_argument("--texts", type=int, default=TEXTS, help="so many of those to be evaluated (default: all)")
    args = arguments.parse_args()
    read = subject(args.model)
    texts = Texts(read.model, read.texts[: args.texts])
    rows: list[Row] = []
    for name, budget in ways(read, calibration_texts(read)):
        rows.append({"way": name, **texts.row(budget)})
        show(args.model, rows[-1:])
    write(f"budgets_{Path(args.model).name}", rows)


if __name__ == "__main__":
    main()
