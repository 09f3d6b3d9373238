"""Prefill or decode: does attention run densely, before its cache is compressed, or over the compressed cache?"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from ..attention.attention import Attention
from ..graph.nodes import computed_alike
from ..graph.symbols import expression, same_size
from ..graph.views import Read
from .conditions import Context, NextStep, NothingLost, require
from .positions import is_run
from .update import CacheUpdate

Cached = tuple[CacheUpdate, Read]

_UNMASKED = "the whole buffer is attended without a mask, also where nothing is written"
_CUT_UNMASKED = (
    "a part of the buffer is attended without a mask, and nothing shows that it ends with the new tokens; give "
    "attention a mask, or write at a Python number and attend up to the last token written"
)


def phase_of(attention: Attention, key: Cached, value: Cached, window: int, graph: Graph, context: Context) -> str:
    """ "prefill" or "decode". Raises ``Reason`` where the cache could not stay compressed in either.

    window: that of the compressed cache.
    """
    update = key[0]
    _check_alike(update, value[0], context)
    if update.base is None:
        _check_beginning(attention, update)
        return _prefill(attention)
    if same_size(attention.query_length, 1):
        require(not attention.is_causal, "is_causal=True with one query attends to the first key only")
    elif update.grows:
        require(not attention.is_causal, "is_causal=True over a past lets queries attend to the first keys only")
    if not _is_step(attention, update, window, graph, context):
        _check_chunk(attention, update, context)
        return _prefill(attention)
    for cached in (key, value):
        _check_step(attention, *cached)
    alike = computed_alike(update.position, value[0].position)
    require(alike, "keys and values are written at different positions")
    return "decode"


def _prefill(attention: Attention) -> str:
    """What evicts tokens at the end of a prompt is to see them as they are, so they are compressed after it."""
    require(not attention.evictable, NextStep())
    return "prefill"


def _check_alike(key: CacheUpdate, value: CacheUpdate, context: Context) -> None:
    require(
        key.grows == value.grows
        and (key.base is None) == (value.base is None)
        and (key.base in context.caches) == (value.base in context.caches),
        "keys and values are cached in different ways",
    )


def _check_beginning(attention: Attention, key: CacheUpdate) -> None:
    """A cache begins here; tell self-attention over it from attention to something else."""
    own = same_size(key.new.meta["val"].shape[key.tokens_dim], attention.query_length)
    own = own and _token_inputs(attention.query, attention) <= _token_inputs(key.new, attention)
    require(own, NothingLost("its keys are not those of the query's own tokens, as in cross-attention"))
    causal = attention.is_causal or attention.mask is not None or same_size(attention.query_length, 1)
    require(causal, NothingLost("its attention is not causal"))


def _check_chunk(attention: Attention, key: CacheUpdate, context: Context) -> None:
    """Several tokens on top of a cache: it is stored compressed, again or for the first time, so it must be theirs."""
    if key.grows or key.base in context.caches or context.release_dense:
        require(attention.is_causal or attention.mask is not None, "its attention is not causal")
        own = same_size(key.new.meta["val"].shape[key.tokens_dim], attention.query_length)
        require(own, NothingLost("its keys are not those of the query's own tokens, as in cross-attention"))


def _token_inputs(node: Node, attention: Attention) -> set[Node]:
    """Graph inputs [B, L] or [B, L, E], as many tokens as queries, that the values of ``node`` depend on."""
    seen, todo = {node}, [node]
    while todo:
        new = set(todo.pop().all_input_nodes) - seen
        seen |= new
        todo += new
    batch_and_tokens = (attention.query.meta["val"].shape[0], attention.query_length)
    return {node for node in seen if node.op == "placeholder" and _begins_with(node, batch_and_tokens)}


def _begins_with(node: Node, sizes: tuple) -> bool:
    shape = getattr(node.meta["val"], "shape", ())
    return len(shape) in (2, 3) and all(map(same_size, shape, sizes))


def _is_step(attention: Attention, update: CacheUpdate, window: int, graph: Graph, context: Context) -> bool:
    """Whether the queries can be taken one by one. Guards on their number, but only where all else allows it.

    The prompt of a static cache looks like a step. Its tokens must not be pruned before all of them were attended to,
    so there a step is no longer than the window.
    """
    length = attention.query_length
    if same_size(length, 1):
        return True
    limit = context.max_query_tokens
    if not update.grows:
        limit = min(limit, window)
    return (
        _has_row_for_each_query(attention)  # which alone says what of the others each sees
        and is_run(update.position)
        and (isinstance(length, int) or any(same_size(node, length) for node in graph.find_nodes(op="placeholder")))
        and bool(length <= limit)
    )


def _has_row_for_each_query(attention: Attention) -> bool:
    """Whether the mask can tell the queries apart."""
    rows = attention.mask.meta["val"].shape[-2:-1] if attention.mask is not None else ()
    return any(same_size(size, attention.query_length) for size in rows)


def _check_step(attention: Attention, update: CacheUpdate, read: Read) -> None:
    new, cache = update.new.meta["val"].shape, update.node.meta["val"].shape
    require(same_size(new[update.tokens_dim], attention.query_length), "not one new token for each query")
    others = [dim for dim in range(4) if dim != update.tokens_dim]
    require(all(same_size(new[d], cache[d]) for d in others), "the new token is broadcast into the cache")
    if update.grows:
        return
    whole = read.prefix is None
    if whole or expression(read.prefix) != update.end:
        attended = cache[update.tokens_dim] if whole else read.prefix
        require(_tells_columns_apart(attention, attended), _UNMASKED if whole else _CUT_UNMASKED)


def _tells_columns_apart(attention: Attention, columns: Any) -> bool:
    """Whether the mask can say of each column that is attended that nothing is written there."""
    sizes = attention.mask.meta["val"].shape[-1:] if attention.mask is not None else ()
    return any(same_size(columns, 1) or not same_size(size, 1) for size in sizes)
