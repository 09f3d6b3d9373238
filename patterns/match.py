"""Stage 2: attention plus cache updates -> a Match, or a reason why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from .attention import Attention
from .cache_update import CacheUpdate, find_update, joins_changed_past, recognise_update
from .conditions import Context, Reason, check_cache, check_read, other_uses, require
from .find_attention import find_attention
from .nodes import is_call
from .normalise import Functional
from .phase import phase_of
from .views import is_move, read_through, unmoved

aten = torch.ops.aten


@dataclass(frozen=True)
class Match:
    """An attention whose cache is compressed. phase: "prefill" or "decode"."""

    attention: Attention
    key: CacheUpdate
    value: CacheUpdate
    phase: str

    @property
    def form(self) -> str:
        return cache_form(self.key)


@dataclass(frozen=True)
class NoMatch:
    """An attention that runs as it is, and why. key, value: what is known of its cache."""

    attention: Attention
    reason: str
    key: CacheUpdate | None = None
    value: CacheUpdate | None = None

    @property
    def form(self) -> str:
        return cache_form(self.key)


def cache_form(update: CacheUpdate | None) -> str:
    """What the report calls a cache: how it is kept and how it is written."""
    if update is None:
        return "unknown"
    if update.op == "returned":
        return "dynamic (returned)"
    return f"{'dynamic' if update.grows else 'static'} ({update.op})"


def find_matches(functional: Functional, context: Context) -> list[Match | NoMatch]:
    """Judge every attention of the graph, in order."""
    attentions = find_attention(functional.graph)
    readers = {node for attention in attentions for node in (attention.node, attention.key_reader)}
    found = [_judge(attention, functional, context, readers) for attention in attentions]
    reads = Counter(update.node for m in found for update in (m.key, m.value) if update is not None)
    slots = max((_slots(m.key) for m in found if isinstance(m, Match)), default=0)
    return [_unless(m, _shared(m, reads) or _smaller(m, slots)) for m in found]


def _unless(m: Match | NoMatch, reason: str | None) -> Match | NoMatch:
    return NoMatch(m.attention, reason, m.key, m.value) if isinstance(m, Match) and reason else m


def _shared(m: Match | NoMatch, reads: Counter) -> str | None:
    shared = any(update is not None and reads[update.node] > 1 for update in (m.key, m.value))
    return "its cache is read by several attention layers" if shared else None


def _smaller(m: Match | NoMatch, slots: int) -> str | None:
    """A static cache with less room than others of the model will roll when it is full."""
    mine = _slots(m.key)
    return f"cache is bounded by a sliding window of {mine}" if 0 < mine < slots else None


def _slots(update: CacheUpdate | None) -> int:
    """Tokens that a static cache has room for; 0 for any other."""
    size = 0 if update is None or update.grows else update.node.meta["val"].shape[update.tokens_dim]
    return size if isinstance(size, int) else 0


def _judge(attention: Attention, functional: Functional, context: Context, readers: Set[Node]) -> Match | NoMatch:
    key = value = None
    try:
        require(attention.problem is None, str(attention.problem))
        require(attention.layer not in context.skip_layers, f"layer {attention.layer} is listed in skip_layers")
        changed = any(joins_changed_past(operand.node) for operand in (attention.key, attention.value))
        require(not changed, "its past is moved, cast or changed before the new tokens join it")
        key, key_chain = find_update(attention.key, functional)
        value, value_chain = find_update(attention.value, functional)
        if key is None or value is None:
            raise Reason(_no_cache_reason(attention, functional))
        reads = []
        for update, chain, operand in ((key, key_chain, attention.key), (value, value_chain, attention.value)):
            check_cache(update, functional, context)
            reads.append(check_read(update, read_through(chain, update.node), operand, attention))
            others = other_uses(update, chain, readers, functional) if update.base is not None else ()
            require(not others, f"the updated cache is also used by {', '.join(sorted(others))}")
        require(reads[1].factor == 1, "values are scaled between their cache and the attention")
        phase = phase_of(attention, (key, reads[0]), (value, reads[1]), functional.graph, context)
        return Match(replace(attention, scale=attention.scale * reads[0].factor), key, value, phase)
    except Reason as reason:
        return NoMatch(attention, str(reason), key, value)


def _no_cache_reason(attention: Attention, functional: Functional) -> str:
    """Tell a bounded buffer that rolls, and a write that is not recognised, from attention that has no cache at all."""
    between: set[Node] = set()
    todo = [attention.key.node]
    while todo:
        node = todo.pop()
        shape = getattr(node.meta.get("val"), "shape", ())
        if node in functional.mutated and len(shape) == 4:
            if any(is_call(n, aten.roll.default, aten.cat.default) for n in between):
                return f"cache is bounded by a sliding window of {shape[2]}"
            return f"its cache is written by {_writer(attention.key.node).target} in a way that is not recognised"
        if node not in between and len(shape) >= 4:
            between.add(node)
            todo += node.all_input_nodes
    if unmoved(attention.key.node).op == "placeholder":
        return "no token enters its cache, as in cross-attention"
    if any(recognise_update(node) is not None for node in between):
        return "keys are computed from what is cached, as in latent attention"
    return "keys and values do not come from a KV cache"


def _writer(node: Node) -> Node:
    while is_move(node) or is_call(node, aten.copy.default):
        node = node.args[node.target is aten.copy.default]
    return node
