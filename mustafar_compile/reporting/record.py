"""Entering what became of a graph into the open reports and the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from .. import _compat
from ..lowering.format import MAX_QUERY_TOKENS, Layout, grown_capacity
from ..patterns.attention.find import number_and_name
from ..patterns.cache.conditions import Context
from ..patterns.match import CacheUpdate, Match, NoMatch
from ..settings import Settings
from .explain import asked
from .notices import notify, open_reports
from .report import Entry

log = logging.getLogger("mustafar_compile")


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
    asked.set()
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
