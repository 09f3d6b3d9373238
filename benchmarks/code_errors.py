"""How far the kept elements of a row, and the result of attention, are off in each code.

    python benchmarks/code_errors.py

On random rows, and on keys and values of the models of accuracy/models.py. ``accuracy_study.py runs/codes.yaml`` tells
what it comes to in the model. ``bytes`` are those of a row of 128 channels with its bitmap; dense it has 256.
What the file has already is not computed again.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from timing import parser, read, save, show
from torch import Tensor

from accuracy import teacher_forced
from accuracy.codes import CODES, Code, kept_mask
from accuracy.models import SUBJECTS
from mustafar_compile.lowering.format import kept_elements

WINDOW = 32
QUERIES = 64  # the last of a text
RANDOM_ROWS = 8192
LAYER_STEP = 3  # every third layer of a model
SPARSITIES = 0.0, 0.5, 0.7
Row = dict[str, Any]


@dataclass
class Layer:
    """The last ``QUERIES`` queries [1, Hq, n, D], all keys and values [1, H, T, D], and the scale of attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def attended(self, k: Tensor, v: Tensor) -> Tensor:
        """The result of attention where older tokens are read as ``k`` and ``v``."""
        start = self.k.shape[2] - self.q.shape[2]
        return teacher_forced.attended(self.q, start, self.k, self.v, k.float(), v.float(), WINDOW, self.scale)


def layers_of(model: Any, ids: Tensor) -> list[Layer]:
    """What the layers of the dense model attend to."""
    found: list[Layer] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        found.append(Layer(q[:, :, -QUERIES:].clone(), k.clone(), v.clone(), scale))
        return teacher_forced.attention(q, k, v, k, v, WINDOW, scale)

    with teacher_forced.attending(model, attend):
        teacher_forced.hidden_states(model, ids)
    return found


def relative(x: Tensor, exact: Tensor) -> float:
    """Mean over rows of the norm of the difference over the norm."""
    exact = exact.float()
    return ((x.float() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)).mean().item()


class Pruned:
    """K or V of a layer in bfloat16, pruned."""

    def __init__(self, x: Tensor, sparsity: float) -> None:
        self.x = x.bfloat16()
        self.keep = kept_mask(self.x, kept_elements(x.shape[-1], sparsity))
        self.exact = self.x.where(self.keep, 0)

    def stored(self, code: Code) -> Tensor:
        """What is read back of it."""
        return code.function(self.x, self.keep)


def layer_errors(layer: Layer, sparsity: float, codes: dict[str, Code]) -> dict[str, Row]:
    """Of each code the errors of rows; of attention over what is stored, against what is pruned, then against dense."""
    keys, values = Pruned(layer.k, sparsity), Pruned(layer.v, sparsity)
    pruned, dense = layer.attended(keys.exact, values.exact), layer.attended(layer.k, layer.v)
    found = {}
    for name, code in codes.items():
        k, v = keys.stored(code), values.stored(code)
        attended = layer.attended(k, v)
        found[name] = {
            "keys": relative(k, keys.exact),
            "values": relative(v, values.exact),
            "attention_keys": relative(layer.attended(k, values.exact), pruned),
            "attention_values": relative(layer.attended(keys.exact, v), pruned),
            "attention": relative(attended, pruned),
            "over_dense": relative(attended, dense),
        }
    return found


def row_errors(x: Tensor, sparsity: float, codes: dict[str, Code]) -> dict[str, Row]:
    """Of each code the errors of rows."""
    rows = Pruned(x, sparsity)
    return {name: {"rows": relative(rows.stored(code), rows.exact)} for name, code in codes.items()}


def random_rows(outliers: bool) -> Tensor:
    """Gaussian rows of 128 channels; with outliers, four channels are eight times as large."""
    x = torch.randn(1, 1, RANDOM_ROWS, 128, generator=torch.Generator().manual_seed(0))
    if outliers:
        x[..., 10::32] *= 8
    return x


def mean(found: list[dict[str, Row]]) -> dict[str, Row]:
    """Over layers."""
    errors = {name: [of_layer[name] for of_layer in found] for name in found[0]}
    return {name: {key: statistics.fmean(row[key] for row in rows) for key in rows[0]} for name, rows in errors.items()}


def table(data: str, codes: dict[str, Code]) -> list[Row]:
    """Errors of codes at all sparsities on some data."""
    if data in SUBJECTS:
        subject = SUBJECTS[data]()
        layers = layers_of(subject.model, subject.texts[0])
        by_sparsity = {s: mean([layer_errors(layer, s, codes) for layer in layers[::LAYER_STEP]]) for s in SPARSITIES}
    else:
        by_sparsity = {s: row_errors(random_rows(data == "outliers"), s, codes) for s in SPARSITIES}
    rows = []
    for sparsity, found in by_sparsity.items():
        kept = kept_elements(128, sparsity)
        for name, errors in found.items():
            key = {"data": data, "sparsity": sparsity, "code": name, "bytes": CODES[name].row_bytes(128, kept)}
            rows.append(key | errors)
    return rows


@torch.no_grad()
def main() -> None:
    """Run from the command line."""
    known = ["gaussian", "outliers", *SUBJECTS]
    arguments = parser(__doc__)
    arguments.add_argument("--data", nargs="+", choices=known, default=known, help="what rows (default: all)")
    args = arguments.parse_args()
    for data in args.data:
        rows = read("code_errors")
        known_codes = {row["code"] for row in rows if row["data"] == data}
        missing = {name: code for name, code in CODES.items() if name not in known_codes}
        if missing:
            save("code_errors", rows + table(data, missing))
    show("code_errors", read("code_errors"))


if __name__ == "__main__":
    main()
