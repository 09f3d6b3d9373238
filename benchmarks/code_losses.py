"""Nats that a text costs a model over its dense cache, with the kept elements of its cache in each code.

    python benchmarks/code_losses.py --model tiny_llama
    python benchmarks/code_losses.py --model smollm2

Teacher-forced, see accuracy/teacher_forced.py. Results are saved one by one, and what the file has already is not
computed again; ``--texts`` and ``--first`` leave the rest for another time. Models run in float32; rows are rounded to
bfloat16 before they are pruned and stored.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from timing import parser, read, save, show
from torch import Tensor

from accuracy import teacher_forced
from accuracy.codes import CODES, kept_mask
from accuracy.models import SUBJECTS, TEXTS, Subject
from mustafar_compile.lowering.format import kept_elements

WINDOW = 32
DIVERGENCE_EVERY = 8  # tokens
QUESTIONS = "questions"
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """How keys and values are stored, each by the name of a code ("dense": not at all), and their sparsity.

    value_sparsity: None where it is that of keys.
    """

    keys: str
    values: str
    sparsity: float
    value_sparsity: float | None = None

    def described(self) -> Row:
        """Its fields that are given."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @staticmethod
    def storage(code: str, sparsity: float) -> teacher_forced.Storage:
        """What is read back of rows [..., D]."""
        if code == "dense":
            return lambda x: x

        def stored(x: Tensor) -> Tensor:
            rows = x.bfloat16()
            return CODES[code].function(rows, kept_mask(rows, kept_elements(x.shape[-1], sparsity))).to(x.dtype)

        return stored

    def hidden_states(self, model: Any, ids: Tensor) -> Tensor:
        """What the model makes of the tokens with such a cache."""
        of_values = self.sparsity if self.value_sparsity is None else self.value_sparsity
        keys, values = self.storage(self.keys, self.sparsity), self.storage(self.values, of_values)
        with teacher_forced.storing(model, keys, values, WINDOW):
            return teacher_forced.hidden_states(model, ids)


def cases() -> list[Case]:
    """Those of interest, the most interesting first."""
    main = "none", "int8", "int4 log", "int4 uniform", "int4 growing"
    more = "fp8, row scale", "int4 log, 1/8 steps", "int4 asymmetric, groups", "fp8"
    even = "int4 symmetric, groups", "int4 asymmetric, groups", "int4 symmetric"
    unpruned = "int8", "int4 growing", *even, "fp8, row scale", "fp8"
    kivi = "int4 per channel", "int4 asymmetric, groups"
    return [
        *both(main, 0.5, 0.7),
        *both(unpruned[:4], 0.0),
        *(Case(code, code, 0.5, 0.7) for code in ("int8", "int4 growing")),  # with int8 at 0, the presets
        *both(["int4 symmetric"], 0.5, 0.7),
        *alone(main[2:], 0.5),
        Case(*kivi, 0.0),
        *alone(main[:2], 0.5),
        Case("int8", "int4 log", 0.5),
        Case("int8", "int4 symmetric, groups", 0.0),
        *both(more, 0.5, 0.7),
        *(Case(*kivi, sparsity) for sparsity in (0.5, 0.7)),
        *both(unpruned[4:], 0.0),
        *alone(main, 0.7),
        Case("dense", "dense", 0.0),
    ]


def both(codes: Sequence[str], *sparsities: float) -> list[Case]:
    """Keys and values in the same code."""
    return [Case(code, code, sparsity) for code in codes for sparsity in sparsities]


def alone(codes: Sequence[str], sparsity: float) -> list[Case]:
    """Keys or values in a code, and the others dense."""
    return [Case(*pair, sparsity) for code in codes for pair in ((code, "dense"), ("dense", code))]


class Text:
    """A text, and what the dense model says of it."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        hidden = teacher_forced.hidden_states(model, ids)
        self.losses = teacher_forced.losses(model, ids, hidden)
        self.probabilities = teacher_forced.log_probabilities(model, hidden[::DIVERGENCE_EVERY])

    def row(self, case: Case) -> Row:
        """over_dense: mean nats a token more than dense, and its standard error. kl: mean divergence from dense."""
        hidden = case.hidden_states(self.model, self.ids)
        more = teacher_forced.losses(self.model, self.ids, hidden) - self.losses
        probabilities = teacher_forced.log_probabilities(self.model, hidden[::DIVERGENCE_EVERY])
        kl = F.kl_div(probabilities, self.probabilities, reduction="none", log_target=True).sum(-1)
        return {
            "dense": self.losses.mean().item(),
            "over_dense": more.mean().item(),
            "error": more.std().item() / math.sqrt(len(more)),
            "kl": kl.mean().item(),
        }


class Questions:
    """Prompts with an answer each that stands far back in them."""

    def __init__(self, subject: Subject) -> None:
        self.model = subject.model
        self.asked = [(torch.cat([prompt, answer]), len(answer)) for prompt, answer in subject.questions]

    def row(self, case: Case) -> Row:
        """nats: of a whole answer, mean. right: answers of which each token would be the first choice."""
        nats, right = 0.0, 0
        for ids, length in self.asked:
            said = teacher_forced.log_probabilities(self.model, case.hidden_states(self.model, ids)[-length - 1 : -1])
            nats -= said.gather(1, ids[-length:, None]).sum().item() / len(self.asked)
            right += torch.equal(said.argmax(-1), ids[-length:])
        return {"answer": nats, "right": f"{right} of {len(self.asked)}"}


def summary(rows: list[Row]) -> list[Row]:
    """The mean over texts of each case, in which texts have equally many tokens."""
    found: dict[Case, list[Row]] = {}
    for row in rows:
        found.setdefault(Case(row["keys"], row["values"], row["sparsity"], row.get("value_sparsity")), []).append(row)
    lines = []
    for case, several in found.items():
        texts = [row for row in several if row["text"] != QUESTIONS]
        line = case.described() | {"texts": len(texts)}
        if texts:
            line |= {key: statistics.fmean(row[key] for row in texts) for key in ("over_dense", "kl")}
            line["error"] = math.hypot(*(row["error"] for row in texts)) / len(texts)
        line |= {key: row[key] for row in several if row["text"] == QUESTIONS for key in ("answer", "right")}
        lines.append(line)
    return lines


def described(row: Row) -> Row:
    """What a row is about."""
    names = {"text", *(field.name for field in fields(Case))}
    return {name: value for name, value in row.items() if name in names}


def complete(name: str, texts: list[str], first: int | None) -> list[Row]:
    """All rows of a model. Those that are missing of the first cases are computed and saved one by one."""
    subject = SUBJECTS[name]()
    file = f"code_losses_{name}"
    rows = read(file)
    for text in texts:
        keys = {case: {"text": text, **case.described()} for case in cases()[:first]}
        missing = [case for case, key in keys.items() if not any(described(row) == key for row in rows)]
        if missing:
            read_text = Questions(subject) if text == QUESTIONS else Text(subject.model, subject.texts[int(text)])
        for case in missing:
            start = time.perf_counter()
            rows.append(keys[case] | read_text.row(case))
            save(file, rows)
            print(f"{time.perf_counter() - start:.0f} s", rows[-1], flush=True)
    return rows


@torch.no_grad()
def main() -> None:
    """Run from the command line."""
    all_texts = [*map(str, range(TEXTS)), QUESTIONS]
    arguments = parser(__doc__)
    arguments.add_argument("--model", choices=SUBJECTS, required=True)
    arguments.add_argument("--texts", nargs="+", choices=all_texts, default=all_texts, help="(default: all)")
    arguments.add_argument("--first", type=int, help="so many cases, the most interesting ones (default: all)")
    args = arguments.parse_args()
    show(args.model, summary(complete(args.model, args.texts, args.first)))


if __name__ == "__main__":
    main()
