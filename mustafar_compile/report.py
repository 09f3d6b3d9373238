"""``explain()``: what was compressed, what was not, and why."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import GraphModule, Node

from . import _compat
from .lowering.layout import MAX_QUERY_TOKENS, Layout, grown_capacity
from .notices import notify, notify_recompile_limit, open_reports
from .patterns.conditions import Context
from .patterns.find_attention import number_and_name
from .patterns.match import CacheUpdate, Match, NoMatch
from .settings import Settings
from .text import bytes_text, table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One attention layer.

    layer: its number. name: its module path. form: how its cache is kept. phases: "prefill", "decode" where matched.
    reason: why not in some graph, "" where matched in all. dense_bytes, stored_bytes: of K and V together, when the
    graph was compiled; 0 where there is no cache or an earlier layer shares it.
    """

    layer: int
    name: str
    form: str
    phases: tuple[str, ...] = ()
    reason: str = ""
    dense_bytes: int = 0
    stored_bytes: int = 0


_asked = threading.Event()
"""Whether Dynamo ever gave the backend a graph."""

_NOTHING_RAN = (
    "mustafar: nothing was compiled here and nothing ran compressed. torch.compile(model).generate() calls the "
    "original module. For generate() use model.compile(backend='mustafar') or "
    "model.forward = torch.compile(model.forward, backend='mustafar')"
)


@dataclass(eq=False)
class Report:
    """What the backend did while the report was open. ``str(report)`` is a table.

    graphs: graphs compiled. calls: calls of graphs with a compressed cache, also of those compiled before.
    notices: what was lost or cost more than it should.
    """

    graphs: int = 0
    calls: int = 0
    notices: list[str] = field(default_factory=list)
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
        layers: dict[tuple[int, str], Entry] = {}
        for entry in self._entries:
            key = (entry.layer, entry.name)
            layers[key] = _merged(layers[key], entry) if key in layers else entry
        return sorted(layers.values(), key=lambda entry: (entry.layer, entry.name))

    def __str__(self) -> str:
        return "\n".join([self._summary(), *(f"note: {notice}" for notice in self.notices)])

    def _summary(self) -> str:
        if not self.graphs:
            return _NOTHING_RAN if not self.calls else f"mustafar: nothing new compiled, {self.calls} compressed calls"
        if not self._entries:
            return f"mustafar: {self.graphs} graph(s) compiled, no attention found"
        rows = [
            (
                str(e.layer),
                e.name,
                e.form,
                _verdict(e),
                bytes_text(e.dense_bytes),
                bytes_text(e.stored_bytes),
            )
            for e in self._layers()
        ]
        title = f"mustafar: {len(self.matched)} of {len(rows)} attention layers compressed, {self.graphs} graph(s)"
        return table(title, ("layer", "module", "cache", "compressed", "dense", "stored"), rows)


def _merged(a: Entry, b: Entry) -> Entry:
    """Two sightings of a layer: any miss shows. The later form and sizes count, though not of a miss."""
    phases = tuple(dict.fromkeys((*a.phases, *b.phases)))
    seen = a if b.reason and a.phases else b
    return replace(seen, phases=phases, reason=b.reason or a.reason)


def _verdict(entry: Entry) -> str:
    """Where a layer runs compressed, and why not everywhere."""
    phases = " + ".join(entry.phases)
    if not entry.reason:
        return phases
    return f"{phases}; else no: {entry.reason}" if phases else f"no: {entry.reason}"


@contextmanager
def explain() -> Iterator[Report]:
    """Record every graph that the backend compiles within the ``with`` block.

    Yields the report; it may be read at any time, also after the block. Graphs compiled earlier are not in it. Warns
    where the block neither compiled anything nor ran a graph with a compressed cache.
    """
    report = Report()
    hits = _compat.recompile_limit_hits()
    open_reports.append(report)
    try:
        yield report
        if _compat.recompile_limit_hits() > hits:
            notify_recompile_limit("a compiled function, which Dynamo's own warning names")
    finally:
        open_reports.remove(report)
    if not report.graphs and not report.calls:
        warnings.warn(_NOTHING_RAN, stacklevel=3)


def warn_if_nothing_was_compiled() -> None:
    """Warn where the backend was never given a graph. For the end of a process that chose it."""
    if not _asked.is_set():
        warnings.warn(_NOTHING_RAN, stacklevel=2)


def record_call() -> None:
    """Count a call of a rewritten graph."""
    for report in open_reports:
        report.calls += 1


def record_graph(
    found: Sequence[Match | NoMatch], settings: Settings, compressed: Mapping[Node, tuple[int, int]]
) -> None:
    """Enter the attention layers of one graph into the open reports and the log."""
    counted: set[Node] = set()
    _record([_entry(m, settings, compressed, counted) for m in found])


_DENSE_STEP = (
    "several tokens are taken one by one only under a mask with a row for each and at positions that stand side by side"
)
_SHORT_PROMPT = (
    "on a static cache {tokens} tokens are taken for a prompt, since its window is {window}. For a prompt that is as "
    "it should be; steps of drafts need a window of at least {tokens}"
)


def _why_dense(m: Match | NoMatch, context: Context) -> str:
    if isinstance(m, NoMatch):
        return m.reason
    tokens, window = _compat.hint(m.attention.query_length), context.windows.get(m.key.base, context.window)
    short_prompt = not m.key.grows and tokens > window
    return _SHORT_PROMPT.format(tokens=tokens, window=window) if short_prompt else _DENSE_STEP


def record_decompression(found: Sequence[Match | NoMatch], context: Context) -> None:
    """Say that a graph decompresses a cache that comes into it, unless that is for a prompt."""
    dense = [m for m in found if isinstance(m, NoMatch) or m.phase == "prefill"]
    long = any(_compat.hint(m.attention.query_length) > MAX_QUERY_TOKENS for m in dense)
    if long or (found and not dense):
        return
    why = "; ".join(dict.fromkeys(_why_dense(m, context) for m in dense))
    why = why or "a graph break lies between its update and its attention"
    notify(f"a compiled step decompresses the KV cache each time it runs: {why}")


def record_failure(gm: GraphModule, reason: str) -> None:
    """Enter a graph that could not be read: each attention in it is missed for ``reason``."""
    names = ("scaled_dot_product_attention", "flex_attention")
    nodes = [n for n in gm.graph.nodes if n.op.startswith("call") and any(name in str(n.target) for name in names)]
    places = [number_and_name(node, i) for i, node in enumerate(nodes)]
    _record([Entry(layer, name, "unknown", reason=reason) for layer, name in places])
    if not nodes:  # attention is spelled out
        notify(f"a graph runs as it is: {reason}")


def record_untouched() -> None:
    """Enter a graph without attention."""
    _record([])


def _record(entries: list[Entry]) -> None:
    _asked.set()
    for report in open_reports:
        report.graphs += 1
        report._entries += entries
    for e in entries:
        verdict = f"compressed ({e.phases[0]})" if not e.reason else f"not compressed: {e.reason}"
        log.info("layer %d %s, cache %s: %s", e.layer, e.name, e.form, verdict)


def _entry(
    m: Match | NoMatch, settings: Settings, compressed: Mapping[Node, tuple[int, int]], counted: set[Node]
) -> Entry:
    """counted: caches whose bytes are in an earlier entry; those of ``m`` are added."""
    attention = m.attention
    own = [(r, u) for r, u in (("key", m.key), ("value", m.value)) if u is not None and u.node not in counted]
    counted.update(update.node for _, update in own)
    sizes = [_cache_bytes(update, role, settings, isinstance(m, Match), compressed) for role, update in own]
    dense, stored = (sum(size[i] for size in sizes) for i in (0, 1))
    phases = (m.phase,) if isinstance(m, Match) else ()
    reason = "" if isinstance(m, Match) else m.reason
    return Entry(attention.layer, attention.name, m.form, phases, reason, dense, stored)


def _cache_bytes(
    update: CacheUpdate, role: str, settings: Settings, matched: bool, compressed: Mapping[Node, Any]
) -> tuple[int, int]:
    """(dense, stored) bytes of the cache after the update, at the sizes the graph was compiled with."""
    value = update.node.meta["val"]
    shape = [_compat.hint(size) for size in value.shape]
    tokens, heads = shape[update.tokens_dim], shape[3 - update.tokens_dim]
    itemsize = value.dtype.itemsize
    dense = shape[0] * heads * tokens * shape[3] * itemsize
    if not matched and update.base not in compressed:
        return dense, dense
    capacity = grown_capacity(tokens) if update.grows else tokens
    layout = Layout.of(shape[3], settings.sparsity(role), settings.window)
    stored = layout.stored_bytes(shape[0], heads, capacity, itemsize)
    of_caller = not update.grows and update.base is not None and update.base not in compressed
    return dense, stored + (dense if of_caller and not settings.release_dense else 0)
