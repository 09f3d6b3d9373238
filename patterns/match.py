"""Stage 2: attention plus cache updates -> a Match, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.fx import Node

from ..lowering.layout import Layout
from .attention.attention import Attention
from .attention.find import find_attention
from .cache.conditions import (
    Context,
    NextStep,
    NothingLost,
    Reason,
    check_cache,
    check_read,
    format_for,
    other_uses,
    require,
)
from .cache.phase import phase_of
from .cache.uncached import why_uncached
from .cache.update import CacheUpdate, find_update, joins_changed_past
from .graph.nodes import located
from .graph.normalise import Functional
from .graph.symbols import same_size
from .graph.views import read_through


@dataclass(frozen=True)
class Match:
    """An attention whose cache is compressed.

    phase: "prefill" or "decode". formats: of K and of V. prefix: how many, where only the first slots are attended.
    """

    attention: Attention
    key: CacheUpdate
    value: CacheUpdate
    phase: str
    formats: tuple[Layout, Layout]
    prefix: Any | None = None

    @property
    def updates(self) -> Iterator[tuple[CacheUpdate, Layout]]:
        """K, then V, each with its format."""
        return zip((self.key, self.value), self.formats, strict=True)

    def wanted(self, update: CacheUpdate) -> str:
        """What of the attention K or V ranks by, too: "queries", "attention" (its weights) or, nothing, ""."""
        key, value = self.formats
        if update is self.key:
            return "queries" if key.wants("queries") else ""
        return "attention" if value.wants("attention") else ""

    def is_blind(self, update: CacheUpdate) -> bool:
        """Whether it does in a step over a cache of the caller, of whose earlier queries nothing is known."""
        return self.phase == "decode" and bool(self.wanted(update))

    @property
    def form(self) -> str:
        return cache_form(self.key)

    @property
    def caches(self) -> tuple[Node, Node]:
        """K and V as they are after their updates."""
        return self.key.node, self.value.node


@dataclass(frozen=True)
class NoMatch:
    """An attention that runs as it is, and why.

    key, value: what is known of its cache. lost: whether that could have been compressed. waits: whether the next step
    compresses it.
    """

    attention: Attention
    reason: str
    key: CacheUpdate | None = None
    value: CacheUpdate | None = None
    lost: bool = True
    waits: bool = False

    @property
    def form(self) -> str:
        return cache_form(self.key)


def cache_form(update: CacheUpdate | None) -> str:
    """What the report calls a cache: how it is kept and how it is written."""
    if update is None:
        return "unknown"
    if update.op == "returned":
        return "dynamic (returned)"
    return f"{'dynamic' if update.grows else 'static'} ({update.op}{' by row' if update.by_row else ''})"


def find_matches(functional: Functional, context: Context) -> list[Match | NoMatch]:
    """Judge every attention of the graph, in order."""
    sources = [_Source.of(attention, functional) for attention in find_attention(functional.graph)]
    readers = {node for source in sources for node in source.readers}
    found: list[Match | NoMatch] = []
    for source in sources:
        with located(source.attention.node):
            found.append(_judge(source, functional, context, readers, found))
    slots = max((_slots(m.key) for m in found if isinstance(m, Match)), default=0)
    found = _without(found, partial(_check_room, slots=slots))
    return _without(found, partial(_check_sharing, found=found))


@dataclass(frozen=True)
class _Source:
    """An attention and where its keys and values come from: the update of their cache, if any, and the ops between."""

    attention: Attention
    key: CacheUpdate | None = None
    key_chain: Sequence[Node] = ()
    value: CacheUpdate | None = None
    value_chain: Sequence[Node] = ()

    @classmethod
    def of(cls, attention: Attention, functional: Functional) -> _Source:
        if attention.problem is not None:
            return cls(attention)
        with located(attention.node):
            return cls(attention, *find_update(attention.key, functional), *find_update(attention.value, functional))

    @property
    def readers(self) -> Sequence[Node]:
        """The ops by which the attention reads its cache."""
        own = (self.attention.node, self.attention.key_reader) if self.attention.problem is None else ()
        return *own, *self.key_chain, *self.value_chain


def _without(found: Sequence[Match | NoMatch], check: Callable[[Match], None]) -> list[Match | NoMatch]:
    """``found``, where matches of which ``check`` raises a Reason do not match."""
    return [_checked(m, check) if isinstance(m, Match) else m for m in found]


def _checked(m: Match, check: Callable[[Match], None]) -> Match | NoMatch:
    try:
        check(m)
    except Reason as reason:
        return _no_match(m.attention, reason, m.key, m.value)
    return m


def _no_match(attention: Attention, reason: Reason, key: CacheUpdate | None, value: CacheUpdate | None) -> NoMatch:
    lost, waits = not isinstance(reason, NothingLost), isinstance(reason, NextStep)
    return NoMatch(attention, str(reason), key, value, lost, waits)


def _check_sharing(m: Match, found: Sequence[Match | NoMatch]) -> None:
    """The other attentions that share the cache of ``m``, if any, can be compressed with it."""
    require(m.key.node is not m.value.node, "its keys are its values")
    for other in found:
        if not any(update is not None and update.node in m.caches for update in (other.key, other.value)):
            continue
        if isinstance(other, NoMatch):
            reason = f"another attention that reads its cache does not match: {other.reason}"
            raise Reason(reason) if other.lost else NothingLost(reason)
        alike = (other.caches, other.formats, other.phase) == (m.caches, m.formats, m.phase)
        require(alike, "its cache is read by several attention layers in different ways")


def _check_room(m: Match, slots: int) -> None:
    """A static cache with less room than others of the model will roll when it is full."""
    mine = _slots(m.key)
    require(not 0 < mine < slots, NothingLost(f"cache is bounded by a sliding window of {mine}"))


def _slots(update: CacheUpdate) -> int:
    """Tokens that a static cache has room for; 0 for any other."""
    size = 0 if update.grows else update.node.meta["val"].shape[update.tokens_dim]
    return size if isinstance(size, int) else 0


def _judge(
    source: _Source, functional: Functional, context: Context, readers: Set[Node], earlier: Sequence[Match | NoMatch]
) -> Match | NoMatch:
    attention, key, value = source.attention, source.key, source.value
    try:
        require(attention.problem is None, str(attention.problem))
        changed = any(joins_changed_past(operand.node) for operand in (attention.key, attention.value))
        require(not changed, "its past is moved, cast or changed before the new tokens join it")
        if key is None or value is None:
            name, operand = ("keys", attention.key) if key is None else ("values", attention.value)
            raise why_uncached(name, operand, attention, functional)
        reads, formats = [], []
        for role, update, chain, operand in (
            ("key", key, source.key_chain, attention.key),
            ("value", value, source.value_chain, attention.value),
        ):
            check_cache(attention, update, functional, context)
            formats.append(format_for(update, role, attention.layer, context))
            if update.in_part:
                continue
            reads.append(check_read(update, read_through(chain, update.node), operand, attention))
            others = other_uses(update, chain, readers, functional) if update.base is not None else ()
            require(not others, f"the updated cache is also used by {', '.join(sorted(others))}")
        if key.in_part or value.in_part:
            prompt = key.in_part and value.in_part and not same_size(attention.query_length, 1)
            require(prompt, "some rows of the batch take a step by themselves")
            return Match(attention, key, value, "prefill", (formats[0], formats[1]))
        require(
            formats[0].groups == formats[1].groups, "keys and values are compressed by different groups of KV heads"
        )
        require(reads[1].factor == 1, "values are scaled between their cache and the attention")
        if _is_prefilled(key, value, earlier):
            phase = "prefill"
        else:
            window = formats[0].window
            phase = phase_of(attention, (key, reads[0]), (value, reads[1]), window, functional.graph, context)
        attention = replace(attention, scale=attention.scale * reads[0].factor)
        return Match(attention, key, value, phase, (formats[0], formats[1]), reads[0].prefix)
    except Reason as reason:
        return _no_match(attention, reason, key, value)


def _is_prefilled(key: CacheUpdate, value: CacheUpdate, earlier: Sequence[Match | NoMatch]) -> bool:
    """Whether a prefill of the same cache was found. The cache is dense there, so this one may read it as it likes.

    Gemma 4's layers that share caches take only the last tokens of a prompt as queries.
    """
    prefills = [m for m in earlier if isinstance(m, Match) and m.phase == "prefill"]
    return (key.node, value.node) in [m.caches for m in prefills]
