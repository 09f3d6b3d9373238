"""The page of docs/ with the tables of architectures: written from outcomes, and read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby, product

ATTENTIONS, CACHES = ("sdpa", "eager"), ("dynamic", "static")
INT8 = " int8"
"""Behind the name of an architecture whose weights torchao quantizes."""


@dataclass(frozen=True)
class Outcome:
    """Of one architecture, attention and cache.

    found, compressed: attention layers in the compiled graphs, and those that run compressed in all of them. exact:
    whether sparsity 0 gives what eager dense code gives. pruned: whether sparsity 0.5 gives what the oracle gives.
    reasons: why layers run as they are. error: why transformers does not run it, compiled or not; else "".
    """

    found: int = 0
    compressed: int = 0
    exact: bool = False
    pruned: bool = False
    reasons: tuple[str, ...] = ()
    error: str = ""

    @property
    def is_wrong(self) -> bool:
        return not self.error and not (self.exact and self.pruned)


Row = tuple[str, str, str, Outcome]
"""Architecture, attention, cache and what became of them."""


def rewritten(page: str, rows: list[Row]) -> str:
    """A page, or "", with the tables anew that ``rows`` are of; the other one stays."""
    plain, heading, quantized = page.partition(_HEADING)
    of_int8 = [row for row in rows if row[0].endswith(INT8)]
    if len(of_int8) < len(rows):
        plain = _render_float([row for row in rows if row not in of_int8])
    if of_int8:
        heading, quantized = _HEADING, _render_int8(of_int8)
    return plain + heading + quantized


def _combinations(rows: list[Row]) -> Iterator[tuple[str, str, Outcome]]:
    """Architecture, attentions and caches that have the same outcome, and that."""
    for name, of_name in groupby(rows, key=lambda row: row[0]):
        combinations: dict[Outcome, list[str]] = {}
        for _, attention, cache, outcome in of_name:
            combinations.setdefault(outcome, []).append(f"{attention} {cache}")
        for outcome, found_in in combinations.items():
            yield name, "all" if len(found_in) == len(ATTENTIONS) * len(CACHES) else ", ".join(found_in), outcome


def _line(name: str, where: str, outcome: Outcome) -> str:
    if outcome.error:
        return f"| {name} | {where} | - | - | - | - | {outcome.error} |"
    agreement = " | ".join("yes" if same else "**no**" for same in (outcome.exact, outcome.pruned))
    reasons = "; ".join(outcome.reasons)
    return f"| {name} | {where} | {outcome.found} | {outcome.compressed} | {agreement} | {reasons} |"


def _render_float(rows: list[Row]) -> str:
    """Those that do not run come last."""
    found = list(_combinations(rows))
    return _FLOAT.format(
        **_versions("torch", "transformers"),
        lines="\n".join(_line(*row) for row in found if not row[2].error),
        missing="\n".join(f"| {name} | {where} | {outcome.error} |" for name, where, outcome in found if outcome.error),
    )


def _render_int8(rows: list[Row]) -> str:
    lines = "\n".join(_line(*row) for row in _combinations(rows))
    return _INT8.format(**_versions("torch", "transformers", "torchao"), lines=lines)


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package).split("+")[0] for package in packages}


_FLOAT = """# Architectures

What becomes of each architecture of Hugging Face transformers, made by `make architectures` (tests/architectures.py)
with torch {torch} and transformers {transformers}. The models are tiny and random; two prompts, one of them padded, are
continued greedily in float32 after `model.compile(backend="mustafar")`.

- runs: `attn_implementation` and `cache_implementation`; "all" are sdpa and eager, each dynamic and static.
- layers: attention layers in the compiled graphs; of an encoder-decoder the decoder's, self- and cross-attention apart.
- compressed: those that run compressed in every graph. The others run as they are; where only the graph of the prompt
  could not be traced (Jamba's scan), decode is compressed all the same.
- exact: at sparsity 0, tokens and logits are those of eager dense code.
- pruned: at sparsity 0.5, tokens and logits are those of the oracle, eager code that prunes what decodes compressed.

| architecture | runs | layers | compressed | exact | pruned | why not all |
| --- | --- | --- | --- | --- | --- | --- |
{lines}

## What transformers itself does not run, or not right

| architecture | runs | what it says |
| --- | --- | --- |
{missing}
"""

_HEADING = "\n## With int8 weights\n"
_INT8 = """
The same, with torch {torch}, transformers {transformers} and torchao {torchao}, whose `Int8WeightOnlyConfig` quantizes
the weights of linear layers. What it is compared with is the same quantized model, dense or pruned.

| architecture | runs | layers | compressed | exact | pruned | why not all |
| --- | --- | --- | --- | --- | --- | --- |
{lines}
"""


def read_table(page: str) -> dict[tuple[str, ...], tuple[int, int]]:
    """(layers, compressed) of each architecture, attention and cache that a page says to run."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    everything = ", ".join(f"{attention} {cache}" for attention, cache in product(ATTENTIONS, CACHES))
    return {
        (row[0], *run.split()): (int(row[2]), int(row[3]))
        for row in cells
        if len(row) == 7 and row[2].isdigit()
        for run in (everything if row[1] == "all" else row[1]).split(", ")
    }


def changes(page: str, earlier: str, names: Collection[str]) -> list[str]:
    """Where a page says otherwise than an earlier one which layers of the architectures ``names`` are compressed."""
    new, old = read_table(page), read_table(earlier)
    return [
        f"{' '.join(run)}: (layers, compressed) were {old.get(run, 'not run')}, are {new.get(run, 'not run')}"
        for run in sorted(new.keys() | old.keys())
        if run[0] in names and new.get(run) != old.get(run)
    ]
