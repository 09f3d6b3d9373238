"""What ``explain()`` gives: what was compressed, what was not, and why."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..gathering import gathered
from .text import bytes_text, table


@dataclass(frozen=True)
class Entry:
    """One attention layer.

    layer: its number, None where unknown. name: its module path. form: how its cache is kept. phases: "prefill",
    "decode" where matched. reason: why not in some graph, "" where matched in all. waits: whether that is of a prompt
    that its next step compresses. kernels: what carries out its decode steps, "" without any. kept: elements of a row
    of K and of one of V, in which code and by which strategy, such as ("64/128", "40/128 int8 by think"); () where
    dense. dense_bytes, stored_bytes: of K and V together, when the graph was compiled; 0 where there is no cache or an
    earlier layer shares it. function: the one that Dynamo compiled, as it names it.
    """

    layer: int | None
    name: str
    form: str
    phases: tuple[str, ...] = ()
    reason: str = ""
    waits: bool = False
    kernels: str = ""
    kept: tuple[str, ...] = ()
    dense_bytes: int = 0
    stored_bytes: int = 0
    function: str = ""


_GIVEN_UP = "Dynamo's recompile limit is reached, and what would compile anew runs as it is"

asked = threading.Event()
"""Whether Dynamo ever gave the backend a graph."""

NOTHING_RAN = (
    "mustafar: nothing was compiled here and nothing ran compressed. torch.compile(model).generate() calls the "
    "original module, and generate() of a PEFT model that of the model inside. For generate() use "
    "mustafar_compile.prepare(model), model.compile(backend='mustafar'), of a PEFT model "
    "model.get_base_model().compile(backend='mustafar'), or "
    "model.forward = torch.compile(model.forward, backend='mustafar')"
)
_BEFORE = "What was compiled before is in the report of its own block only; what did not match then runs as it is"


def nothing_ran() -> str:
    """What there is to say where nothing ran compressed and nothing was compiled."""
    return f"{NOTHING_RAN}. {_BEFORE}" if asked.is_set() else NOTHING_RAN


@dataclass(eq=False)
class Report:
    """What the backend did while the report was open. ``str(report)`` is a table.

    graphs: graphs compiled. calls: calls of graphs with a compressed cache, also of those compiled before.
    notices: what was lost or cost more than it should. launching: on a GPU, whether decode steps run as CUDA graphs,
    and why not. given_up: functions that Dynamo compiles no further, since they have too many versions.
    """

    graphs: int = 0
    calls: int = 0
    notices: list[str] = field(default_factory=list)
    launching: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    _entries: list[Entry] = field(default_factory=list)

    @property
    def matched(self) -> list[Entry]:
        """One entry per attention layer that runs compressed in every graph it was found in."""
        return [entry for entry in self._layers() if not entry.reason]

    @property
    def missed(self) -> list[Entry]:
        """One entry, with its ``reason``, per attention layer that runs as it is in some graph."""
        return [entry for entry in self._layers() if entry.reason]

    def _layers(self) -> list[Entry]:
        """The entries of all graphs, one per layer."""
        layers: list[Entry] = []
        for entry in map(self._as_it_ran, self._entries):
            place = next((i for i, known in enumerate(layers) if _same_layer(known, entry)), None)
            if place is None:
                layers.append(entry)
            else:
                layers[place] = _merged(layers[place], entry)
        return sorted(layers, key=lambda entry: (-1 if entry.layer is None else entry.layer, entry.name))

    def _as_it_ran(self, entry: Entry) -> Entry:
        return replace(entry, reason=entry.reason or _GIVEN_UP) if entry.function in self.given_up else entry

    def __str__(self) -> str:
        return "\n".join([self._summary(), *self.launching, *(f"note: {notice}" for notice in self.notices)])

    def print_once(self, group: Any) -> None:
        """Print this report on the first rank of a process group, and the lines of others that are not in it.

        All ranks of ``group`` must call it. Bytes are those of one rank.
        """
        reports = gathered(str(self), group)
        if torch.distributed.get_rank(group) == 0:
            print("\n".join([reports[0], *_differences(reports)]), flush=True)

    def _summary(self) -> str:
        if not self.graphs:
            return f"mustafar: nothing new compiled, {self.calls} compressed calls" if self.calls else nothing_ran()
        if not self._entries:
            return f"mustafar: {self.graphs} graph(s) compiled, no attention found"
        rows = [
            (
                "?" if e.layer is None else str(e.layer),
                e.name,
                e.form,
                verdict(e),
                e.kernels,
                *kept_of_each(e),
                bytes_text(e.dense_bytes),
                bytes_text(e.stored_bytes),
            )
            for e in self._layers()
        ]
        title = f"mustafar: {len(self.matched)} of {len(rows)} attention layers compressed, {self.graphs} graph(s)"
        columns = ("layer", "module", "cache", "compressed", "by", "keys kept", "values kept", "dense", "stored")
        return table(title, columns, rows)


def _differences(reports: Sequence[str]) -> list[str]:
    """What to say of the reports behind the first one."""
    first, lines = reports[0].splitlines(), []
    for rank, report in enumerate(reports[1:], 1):
        lines += [f"rank {rank}: {line.strip()}" for line in report.splitlines() if line not in first]
    return lines or [f"the same on all {len(reports)} ranks"]


def _same_layer(a: Entry, b: Entry) -> bool:
    """Whether two sightings are of one layer; one graph may see a shorter path of it than another."""
    one_ends_other = any(f".{long.name}".endswith(f".{short.name}") for long, short in ((a, b), (b, a)))
    return a.layer == b.layer and (a.name == b.name or (bool(a.name and b.name) and one_ends_other))


def _merged(a: Entry, b: Entry) -> Entry:
    """Two sightings of a layer: any miss shows, but no wait that is over.

    The later form and sizes count, though not of a miss.
    """
    phases = tuple(dict.fromkeys((*a.phases, *b.phases)))
    seen = a if a.phases and not b.phases else b
    misses = [entry for entry in (b, a) if entry.reason and not (entry.waits and phases)]
    reason, waits = misses[0].reason if misses else "", all(entry.waits for entry in misses)
    return replace(seen, phases=phases, reason=reason, waits=waits, kernels=b.kernels or a.kernels)


def kept_of_each(entry: Entry) -> tuple[str, ...]:
    """What is kept of a row of K and of one of V, for two columns."""
    return entry.kept or ("", "")


def verdict(entry: Entry) -> str:
    """Where a layer runs compressed, and why not everywhere."""
    phases = " + ".join(entry.phases)
    if not entry.reason:
        return phases
    return f"{phases}; else no: {entry.reason}" if phases else f"no: {entry.reason}"
