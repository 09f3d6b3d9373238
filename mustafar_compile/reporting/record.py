"""Entering what became of a graph into the open reports and the log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .. import _compat
from ..lowering import backends
from ..lowering.format import MAX_QUERY_TOKENS, grown_capacity
from ..lowering.layout import Layout
from ..patterns.attention.find import places
from ..patterns.cache.conditions import Context
from ..patterns.match import CacheUpdate, Match, NoMatch
from ..stages import StageError
from .notices import notify, notify_blind, open_reports
from .report import Entry, asked

log = logging.getLogger("mustafar_compile")


def record_graph(found: Sequence[Match | NoMatch], context: Context) -> None:
    """Enter the attention layers of one graph into the open reports and the log."""
    counted: set[Node] = set()
    _record([_entry(m, context, counted) for m in found])
    dense_past = [m for m in found if isinstance(m, Match) and m.key.grows and m.key.base not in context.caches]
    if any(m.is_blind(update) for m in dense_past for update, _ in m.updates):
        notify_blind()


_DENSE_STEP = (
    "several tokens are taken one by one only under a mask with a row for each and at positions that stand side by side"
)
_SHORT_PROMPT = (
    "on a static cache {tokens} tokens are taken for a prompt, since its window is {window}. For a prompt that is as "
    "it should be; steps of drafts need a window of at least {tokens}"
)


def _why_dense(m: Match | NoMatch) -> str:
    if isinstance(m, NoMatch):
        return m.reason
    tokens, window = _compat.symbols.hint(m.attention.query_length), m.formats[0].window
    short_prompt = not m.key.grows and tokens > window
    return _SHORT_PROMPT.format(tokens=tokens, window=window) if short_prompt else _DENSE_STEP


def record_decompression(found: Sequence[Match | NoMatch]) -> None:
    """Say that a graph decompresses a cache that comes into it, unless that is for a prompt."""
    dense = [m for m in found if isinstance(m, NoMatch) or m.phase == "prefill"]
    long = any(_compat.symbols.hint(m.attention.query_length) > MAX_QUERY_TOKENS for m in dense)
    if long or (found and not dense):
        return
    why = "; ".join(dict.fromkeys(_why_dense(m) for m in dense))
    why = why or "a graph break lies between its update and its attention"
    notify(f"a compiled step decompresses the KV cache each time it runs: {why}")


def record_loss(found: Sequence[Match | NoMatch]) -> None:
    """Say of attention that a graph does not compress why that is, unless there is nothing to compress."""
    lost = Counter(m.reason for m in found if isinstance(m, NoMatch) and m.lost)
    for reason, count in lost.items():
        notify(f"{count} of {len(found)} attention layers of a graph run dense: {reason}")


def record_failure(gm: GraphModule, error: StageError) -> None:
    """Enter a graph on which a stage failed: each attention in it is missed, and a warning says so."""
    nodes = [node for node in gm.graph.nodes if node.op.startswith("call") and _is_attention(node)]
    _record([Entry(layer, name, "unknown", reason=str(error)) for layer, name in places(nodes)])
    log.warning("a graph runs as it is: %s", error, exc_info=error)
    notify(f"a graph runs as it is: {error}")


def _is_attention(node: Node) -> bool:
    """Whether a call of Dynamo's graph is attention, by its looks; a softmax over less (a router's) is none."""
    name, value = str(node.target), node.meta.get("example_value")
    return any(whole in name for whole in ("scaled_dot_product_attention", "flex_attention")) or (
        "softmax" in name and isinstance(value, torch.Tensor) and value.dim() > 2
    )


def record_untouched() -> None:
    """Enter a graph without attention."""
    _record([])


def record_launching(reason: str) -> None:
    """Enter whether decode steps run as CUDA graphs. reason: why not, "" where they do."""
    text = f"decode steps run without CUDA graphs: {reason}" if reason else "decode steps run as CUDA graphs"
    log.info(text)
    for report in open_reports:
        if text not in report.launching:
            report.launching.append(text)


def _record(entries: list[Entry]) -> None:
    asked.set()
    for report in open_reports:
        report.graphs += 1
        report._entries += entries
    for e in entries:
        verdict = f"compressed ({e.phases[0]}) by {e.kernels}" if not e.reason else f"not compressed: {e.reason}"
        log.info("layer %s %s, cache %s: %s", e.layer, e.name, e.form, verdict)


def _entry(m: Match | NoMatch, context: Context, counted: set[Node]) -> Entry:
    """counted: caches whose bytes are in an earlier entry; those of ``m`` are added."""
    attention = m.attention
    place: dict[str, Any] = {"layer": attention.layer, "name": attention.name, "form": m.form}
    place["function"] = _compat.dynamo.function_being_compiled()
    if isinstance(m, NoMatch):
        known = [update for update in (m.key, m.value) if update is not None and _is_new(update, counted)]
        sizes = [_cache_bytes(update, _own_format(update, context), context) for update in known]
        return Entry(**place, reason=m.reason, waits=m.waits, **_summed(sizes))
    sizes = [_cache_bytes(x, format, context) for x, format in m.updates if _is_new(x, counted)]
    kept = tuple(format.described for format in m.formats)
    return Entry(**place, phases=(m.phase,), kernels=_kernels(m), kept=kept, **_summed(sizes))


def _is_new(update: CacheUpdate, counted: set[Node]) -> bool:
    if update.node in counted:
        return False
    counted.add(update.node)
    return True


def _summed(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    return {name: sum(size[i] for size in sizes) for i, name in enumerate(("dense_bytes", "stored_bytes"))}


def _own_format(update: CacheUpdate, context: Context) -> Layout | None:
    """The format that a cache has whatever becomes of it, None where it is dense."""
    cache = context.caches.get(update.base) if update.base is not None else None
    return None if cache is None else cache.format


def _cache_bytes(update: CacheUpdate, format: Layout | None, context: Context) -> tuple[int, int]:
    """(dense, stored) bytes of the cache after the update, at the sizes the graph was compiled with."""
    value = update.node.meta["val"]
    shape = [_compat.symbols.hint(size) for size in value.shape]
    tokens, heads = shape[update.tokens_dim], shape[3 - update.tokens_dim]
    itemsize = value.dtype.itemsize
    dense = shape[0] * heads * tokens * shape[3] * itemsize
    if format is None:
        return dense, dense
    capacity = grown_capacity(tokens) if update.grows else tokens
    stored = format.stored_bytes(shape[0], heads, capacity, itemsize)
    of_caller = not update.grows and update.base is not None and update.base not in context.caches
    return dense, stored + (dense if of_caller and not context.release_dense else 0)


def _kernels(m: Match) -> str:
    """What carries out the decode steps of a layer."""
    query, key = m.attention.query.meta["val"], m.key.node.meta["val"]
    heads = _compat.symbols.hint(key.shape[3 - m.key.tokens_dim])
    queries = _compat.symbols.hint(query.shape[2]) if m.phase == "decode" else 1
    group = _compat.symbols.hint(query.shape[1]) // heads
    of_heads = zip(m.formats[0].parts, m.formats[1].parts, strict=True)
    works = (backends.Work(k, v, key.dtype, key.device, group, queries) for k, v in of_heads)
    return " + ".join(dict.fromkeys(backends.for_step(work).name for work in works))
