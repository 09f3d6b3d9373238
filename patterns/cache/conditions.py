"""What must hold of a cache and of how it is read for an attention to match, each with the reason where it does not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...lowering.layout import Layout
from ..attention.attention import Attention
from ..attention.operand import Operand, leading_axes
from ..graph.nodes import source_line
from ..graph.normalise import Functional
from ..graph.symbols import known as known_size
from ..graph.symbols import same_size
from ..graph.views import Axis, Read
from .update import CacheUpdate, is_written_back, sliding_window


@dataclass(frozen=True)
class CacheInput:
    """A compressed cache that the graph takes. tokens_dim: 2 in [B, H, S, D], 1 in [B, S, H, D]."""

    format: Layout
    tokens_dim: int


@dataclass(frozen=True)
class Context:
    """What matching must know beyond the graph.

    caches: the placeholders that hold a compressed cache. format_of: layer (or None), role ("key" or "value"), KV
    heads, head_dim and dtype -> the format that a cache is to have, None where it stays dense. parameters: placeholders
    that hold a parameter. unwatchable: placeholders whose writes from outside could not be noticed.
    dtypes: what a cache may hold. max_query_tokens: how many query tokens a decode step may have. release_dense:
    whether buffers of the caller are kept as compressed state alone.
    """

    caches: Mapping[Node, CacheInput]
    format_of: Callable[[int | None, str, int, int, torch.dtype, torch.device], Layout | None]
    parameters: Set[Node]
    unwatchable: Set[Node]
    dtypes: Collection[torch.dtype]
    max_query_tokens: int
    release_dense: bool


class Reason(Exception):
    """Why an attention does not match. Raised and caught while one attention is judged."""


class NothingLost(Reason):
    """Why an attention is not to match: its cache does not grow with the text, it has none, or the user said so."""


class NextStep(NothingLost):
    """Why an attention is not to match in this graph: a hook may evict tokens first, and the next step compresses."""

    def __init__(self) -> None:
        super().__init__("a hook on its module is given the cache of the prompt, which the next step compresses")


def require(condition: Any, reason: str | Reason) -> None:
    """Raise ``Reason`` where ``condition`` does not hold."""
    if not condition:
        raise reason if isinstance(reason, Reason) else Reason(reason)


def check_cache(attention: Attention, update: CacheUpdate, functional: Functional, context: Context) -> None:
    """The cache is one that the layout can hold and whose every change is seen.

    One that is bounded stays dense from the start, though it may be full only later: what its layer is said to be
    counts, whatever this graph does with it.
    """
    dtype, head_dim = update.node.meta["val"].dtype, update.node.meta["val"].shape[-1]
    window = attention.window or sliding_window(update, functional)
    require(window is None, NothingLost(f"cache is bounded by a sliding window of {window}"))
    accepted = ", ".join(str(d).removeprefix("torch.") for d in context.dtypes)
    require(dtype in context.dtypes, f"cache dtype {str(dtype).removeprefix('torch.')} is not one of {accepted}")
    require(isinstance(head_dim, int) and head_dim % 8 == 0, f"head_dim {head_dim} is not a multiple of 8")
    require(update.base not in context.parameters, "the cache is a parameter; make it a buffer")
    written_back = is_written_back(update, functional)
    evicted = attention.evictable and update.base is None
    lost = NextStep() if evicted else "the updated cache does not leave the graph"
    require(written_back or update.node in functional.outputs, lost)
    in_place = written_back or update.grows or update.base is None
    require(in_place, "the updated cache is a new tensor and is not written back to its buffer")
    require(
        (update.batch is None and not update.in_part)
        or not (update.grows or update.base is None or update.base in context.caches or context.release_dense),
        "only a part of the batch of the cache is used",
    )
    known = context.caches.get(update.base)
    require(
        known is None or known.tokens_dim == update.tokens_dim,
        "new tokens join the compressed cache along a dimension that is not that of its tokens",
    )
    require(
        update.base not in context.unwatchable or update.grows or context.release_dense,
        "the cache was made in inference mode and shares its memory with other tensors, so that writes through them "
        "could not be noticed; make it under torch.no_grad()",
    )


def format_for(update: CacheUpdate, role: str, layer: int | None, context: Context) -> Layout:
    """The format of a cache: its own, or the one that it is to have."""
    value = update.node.meta["val"]
    heads = known_size(value.shape[3 - update.tokens_dim])
    wanted = context.format_of(layer, role, heads, value.shape[-1], value.dtype, value.device)
    require(wanted is not None, NothingLost(f"layer {layer} is listed in skip_layers"))
    assert wanted is not None
    return context.caches[update.base].format if update.base in context.caches else wanted


def check_read(update: CacheUpdate, read: Read | None, operand: Operand, attention: Attention) -> Read:
    """``read``, if attention sees the cache with query heads grouped over its KV heads."""
    require(read is not None, "the cache is changed between its update and the attention")
    assert read is not None
    tokens, heads = update.tokens_dim, 3 - update.tokens_dim
    plain = sees_groups(read, operand, tokens, attention.query)
    require(plain, "query heads are not grouped over KV heads as [B, H, S, D] or [B, S, H, D] caches allow")
    kv_heads, query_heads = (
        known_size(update.node.meta["val"].shape[heads]),
        known_size(attention.query.meta["val"].shape[1]),
    )
    require(query_heads % kv_heads == 0, f"{query_heads} query heads are no multiple of {kv_heads} KV heads")
    of_tokens = update.op != "cat" and read.cut == tokens
    require(read.prefix is None or of_tokens, "only a part of the cache is attended")
    return read


def sees_groups(read: Read, operand: Operand, tokens_dim: int, query: Node) -> bool:
    """Whether keys or values are read as they are, each head for the query heads of its group."""
    plain = _runs_over(read.dims[operand.tokens], tokens_dim) and _runs_over(read.dims[operand.channels], 3)
    return plain and _is_grouped(leading_axes(read, operand), 3 - tokens_dim, query)


def _runs_over(axes: list[Axis], source: int) -> bool:
    return not axes or [axis.source for axis in axes] == [source]


def _is_grouped(axes: list[Axis], heads: int, query: Node) -> bool:
    """The batch, then KV heads, each repeated in place; what is of size 1 is absent."""
    sources = [axis.source for axis in axes]
    has_batch = sources[:1] == [0]
    if has_batch == same_size(query.meta["val"].shape[0], 1):
        return False
    grouped = sources[has_batch:]
    return all(source is None for source in grouped[grouped[:1] == [heads] :])


def other_uses(update: CacheUpdate, chain: Sequence[Node], readers: Set[Node], functional: Functional) -> set[str]:
    """Ops that read the updated cache on its way to attention and would need it dense, each with its line."""
    path = [update.node, *chain]
    harmless = {*path, *readers, functional.graph.output_node(), *functional.mutated.values()}
    return {
        f"{user.target}{f' at {line}' if (line := source_line(user)) else ''}"
        for node in path
        for user in node.users
        if user not in harmless and user.target is not torch.ops.aten.sym_size.int
    }
