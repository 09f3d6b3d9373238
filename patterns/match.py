"""Stage 2: attention plus cache updates -> a Match, or a reason why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mustafar_compile import _compat

from .attention import Attention, find_attention
from .cache_update import CacheUpdate, end_of, find_update, is_written_back, sliding_window
from .normalise import Functional
from .symbols import expression, same_size
from .views import Axis, Read, read_through


@dataclass(frozen=True)
class Context:
    """What matching must know beyond the graph.

    compressed: placeholders that hold a compressed cache. parameters: placeholders that hold a parameter.
    unwatchable: placeholders whose writes from outside could not be noticed (inference tensors).
    skip_layers: layers to leave dense. dtypes: what a cache may hold.
    """

    compressed: Set[Node]
    parameters: Set[Node]
    unwatchable: Set[Node]
    skip_layers: Collection[int]
    dtypes: Collection[torch.dtype]


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


class _Reason(Exception):
    """Why an attention does not match. Raised and caught in this module only."""


def _require(condition: Any, reason: str) -> None:
    if not condition:
        raise _Reason(reason)


def find_matches(functional: Functional, context: Context) -> list[Match | NoMatch]:
    """Judge every attention of the graph, in order."""
    attentions = find_attention(functional.graph)
    readers = {node for attention in attentions for node in (attention.node, attention.key_reader)}
    found = [_judge(attention, functional, context, readers) for attention in attentions]
    reads = Counter(update.node for m in found for update in (m.key, m.value) if update is not None)
    return [_sole_reader(m, reads) for m in found]


def _sole_reader(m: Match | NoMatch, reads: Counter) -> Match | NoMatch:
    if isinstance(m, Match) and (reads[m.key.node] > 1 or reads[m.value.node] > 1):
        return NoMatch(m.attention, "its cache is read by several attention layers", m.key, m.value)
    return m


def _judge(attention: Attention, functional: Functional, context: Context, readers: Set[Node]) -> Match | NoMatch:
    key = value = None
    try:
        _require(attention.problem is None, str(attention.problem))
        _require(attention.layer not in context.skip_layers, f"layer {attention.layer} is listed in skip_layers")
        key, key_chain = find_update(attention.key, functional)
        value, value_chain = find_update(attention.value, functional)
        if key is None or value is None:
            raise _Reason(_no_cache_reason(attention, functional))
        for update, chain, transposed in ((key, key_chain, attention.key_transposed), (value, value_chain, False)):
            _check_cache(update, functional, context)
            _check_read(update, read_through(chain, update.node), transposed, attention)
            others = _other_uses(update, chain, readers, functional) if update.base is not None else ()
            _require(not others, f"the updated cache is also used by {', '.join(sorted(others))}")
        return Match(attention, key, value, _phase(attention, key, value, context))
    except _Reason as reason:
        return NoMatch(attention, str(reason), key, value)


def _no_cache_reason(attention: Attention, functional: Functional) -> str:
    """Tell a bounded buffer that rolls from attention that has no cache at all."""
    seen, todo = set(), [attention.key]
    while todo:
        node = todo.pop()
        for source in node.all_input_nodes:
            shape = getattr(source.meta.get("val"), "shape", ())
            if source in functional.mutated and len(shape) == 4:
                return f"cache is bounded by a sliding window of {shape[2]}"
            if source not in seen and len(shape) >= 4:
                seen.add(source)
                todo.append(source)
    return "keys and values do not come from a KV cache"


def _check_cache(update: CacheUpdate, functional: Functional, context: Context) -> None:
    dtype, head_dim = update.node.meta["val"].dtype, update.node.meta["val"].shape[-1]
    window = sliding_window(update, functional)
    _require(window is None, f"cache is bounded by a sliding window of {window}")
    accepted = ", ".join(str(d).removeprefix("torch.") for d in context.dtypes)
    _require(dtype in context.dtypes, f"cache dtype {str(dtype).removeprefix('torch.')} is not one of {accepted}")
    _require(isinstance(head_dim, int) and head_dim % 8 == 0, f"head_dim {head_dim} is not a multiple of 8")
    _require(update.base not in context.parameters, "the cache is a parameter")
    leaves = update.node in functional.outputs
    _require(leaves or is_written_back(update, functional), "the updated cache does not leave the graph")
    _require(
        update.batch is None or not (update.grows or update.base in context.compressed),
        "only a part of the batch of the cache is used",
    )
    _require(
        update.tokens_dim == 2 or not (update.base is None or update.grows or update.base in context.compressed),
        "a cache in [B, S, H, D] is supported as a buffer of the caller only",
    )
    _require(
        update.base not in context.unwatchable or update.grows,
        "the cache is an inference tensor, so writes from outside could not be noticed",
    )


def _check_read(update: CacheUpdate, read: Read | None, transposed: bool, attention: Attention) -> None:
    _require(read is not None, "the cache is changed between its update and the attention")
    assert read is not None
    tokens, heads = update.tokens_dim, 3 - update.tokens_dim
    dims = [read.dims[i] for i in ((0, 1, 3, 2) if transposed else (0, 1, 2, 3))] if len(read.dims) == 4 else []
    grouped = len(dims) == 4 and _is_grouped(dims[1], heads)
    plain = grouped and all(_runs_over(dims[i], source) for i, source in ((0, 0), (2, tokens), (3, 3)))
    _require(plain, "query heads are not grouped over KV heads as [B, H, S, D] or [B, S, H, D] caches allow")
    kv_heads = update.node.meta["val"].shape[heads]
    query_heads = attention.query.meta["val"].shape[1]
    _require(
        isinstance(kv_heads, int) and isinstance(query_heads, int) and query_heads % kv_heads == 0,
        f"{query_heads} query heads are no multiple of {kv_heads} KV heads",
    )
    if attention.query_length == 1 and not update.grows:
        bounded = read.prefix is not None and expression(read.prefix) == end_of(update)
        _require(
            bounded or (read.prefix is None and attention.mask is not None),
            "the whole buffer is attended without a mask, also where nothing is written",
        )
    elif update.grows and update.op == "cat":
        _require(read.prefix is None, "only a part of the cache is attended")


def _runs_over(axes: list[Axis], source: int) -> bool:
    return not axes or [axis.source for axis in axes] == [source]


def _is_grouped(axes: list[Axis], heads: int) -> bool:
    """KV heads, each repeated in place; either part may be of size 1 and so absent."""
    return [axis.source for axis in axes] in ([], [heads], [None], [heads, None])


def _phase(attention: Attention, key: CacheUpdate, value: CacheUpdate, context: Context) -> str:
    _require(
        key.grows == value.grows
        and (key.base is None) == (value.base is None)
        and (key.base in context.compressed) == (value.base in context.compressed),
        "keys and values are cached in different ways",
    )
    length = attention.query_length
    if key.base is None:
        _check_prefill(attention, key)
        return "prefill"
    if not (isinstance(length, int) and length == 1):
        writes_dense_buffer = not key.grows and key.base not in context.compressed
        _require(writes_dense_buffer, f"query length {_compat.hint(length)} is not a decode step")
        return "prefill"
    _require(not attention.is_causal, "is_causal=True with one query attends to the first key only")
    _require(
        key.position is value.position or same_size(key.position, value.position),
        "keys and values are written at different positions",
    )
    for update in (key, value):
        _check_new_token(update)
    return "decode"


def _check_prefill(attention: Attention, key: CacheUpdate) -> None:
    """A cache begins here; tell self-attention over it from attention to something else."""
    own = same_size(key.new.meta["val"].shape[key.tokens_dim], attention.query_length)
    _require(own, "its keys are not those of the query's own tokens, as in cross-attention")
    causal = attention.is_causal or attention.mask is not None or same_size(attention.query_length, 1)
    _require(causal, "its attention is not causal")


def _check_new_token(update: CacheUpdate) -> None:
    new, cache = update.new.meta["val"].shape, update.node.meta["val"].shape
    _require(same_size(new[update.tokens_dim], 1), "several tokens enter per query")
    others = [dim for dim in range(4) if dim != update.tokens_dim]
    _require(all(same_size(new[d], cache[d]) for d in others), "the new token is broadcast into the cache")


def _other_uses(update: CacheUpdate, chain: list[Node], readers: Set[Node], functional: Functional) -> set[str]:
    """Ops that read the updated cache on its way to attention and would need it dense."""
    path = [update.node, *chain]
    harmless = {*path, *readers, functional.graph.output_node(), *functional.mutated.values()}
    return {
        str(user.target)
        for node in path
        for user in node.users
        if user not in harmless and user.target is not torch.ops.aten.sym_size.int
    }
