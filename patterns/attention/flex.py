"""Flex attention: its functions and its lists of blocks, written out as scores and one mask."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..graph.calls import call_before
from ..graph.nodes import is_call, symbolic_size
from ..graph.symbols import same_size
from .attention import Attention
from .operand import Operand
from .scores import Scores, read_scores

aten = torch.ops.aten
_OF_SCALARS = (  # beside those with torch's pointwise tag
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.index.Tensor,
    aten.new_ones.default,
    aten.full.default,
    aten.scalar_tensor.default,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
)


class _Unreadable(Exception):
    """Why a flex attention cannot be written as scores, a softmax and a mask."""


def is_flex(node: Node) -> bool:
    return node.op == "call_function" and "flex_attention" in str(node.target)


def read_flex(node: Node) -> Attention:
    """The attention that a call of flex attention is."""
    query, key, value = node.args[:3]
    operands = [Operand.of(x, query) for x in (key, value)]
    try:
        result, mask, scores = _result(node), _mask(node), _scores(node)
        if scores.bias is not None:
            mask = call_before(node, aten.where.ScalarOther, mask, scores.bias, float("-inf"))
        how = {"scale": scores.scale, "softcap": scores.softcap, "mask": mask}
        return Attention(result, scores.query, *operands, key_reader=node, **how)
    except _Unreadable as problem:
        return Attention(node, query, *operands, key_reader=node, problem=str(problem))


def _result(node: Node) -> Node:
    """The only one of the results that may be used: the others are of the dense scores."""
    users = list(node.users)
    if len(users) != 1 or users[0].args[1] != 0:
        raise _Unreadable("the sums of the weights of flex_attention are used")
    return users[0]


def _scores(node: Node) -> Scores:
    """What its function makes of its scores, read as if they were spelled out.

    The product is dead code once it is read, so zeros stand for the keys.
    """
    query, _, _, score_mod, block_mask, scale = node.args[:6]
    *leading, _, channels = query.meta["val"].shape
    keys = call_before(node, aten.new_zeros.default, query, [*leading, channels, block_mask[1]])
    score = call_before(node, aten.matmul.default, query, keys)
    score = call_before(node, aten.mul.Tensor, score, float(scale))
    scores = read_scores(_inlined(node, score_mod, [score, *_numbers(node), *node.args[7]]))
    if scores is None:
        raise _Unreadable("the function of flex_attention is more than a scale, a softcap, a mask and what is added")
    return scores


def _mask(node: Node) -> Node:
    """True where a query attends: in full blocks, and where the mask function says so in those that are listed.

    Blocks in neither list are masked whatever the function says.
    """
    query_length, key_length, counts, blocks, full_counts, full_blocks = node.args[4][:6]
    *_, query_block, key_block, mask_mod = node.args[4]
    _check_lengths(node, query_length, key_length)
    row, column = (_arange(node, length) for length in (query_length, key_length))
    of_row = call_before(node, aten.floor_divide.default, row, query_block)
    of_column = call_before(node, aten.floor_divide.default, column, key_block)
    mask = _inlined(node, mask_mod, [*_numbers(node), *node.args[8]])
    mask = call_before(node, aten.logical_and.default, mask, _listed(node, counts, blocks, of_row, of_column))
    if full_counts is None:
        return mask
    full = _listed(node, full_counts, full_blocks, of_row, of_column)
    return call_before(node, aten.logical_or.default, mask, full)


def _check_lengths(node: Node, *lengths: Any) -> None:
    sizes = (x.meta["val"].shape[2] for x in node.args[:2])
    if not all(same_size(length, size) for length, size in zip(lengths, sizes, strict=True)):
        raise _Unreadable("the mask of flex_attention is of another length than its queries and keys")


def _arange(place: Node, end: Any) -> Node:
    return call_before(place, aten.arange.default, end, device=place.args[0].meta["val"].device)


def _size(place: Node, node: Node, dim: int) -> Any:
    size = node.meta["val"].shape[dim]
    with place.graph.inserting_before(place):
        return size if isinstance(size, int) else symbolic_size(place.graph, node, dim)


def _listed(place: Node, counts: Node, blocks: Node, of_row: Node, of_column: Node) -> Node:
    """[B or 1, Hq or 1, L, S]: whether the block of a query and a key is in a list.

    counts: [B or 1, Hq or 1, N], how many of ``blocks`` [B or 1, Hq or 1, N, M] hold for each block of queries; the
    others may be anything. of_row, of_column: the block of each query, of each key.
    """
    slot = _arange(place, _size(place, blocks, -1))
    holds = call_before(place, aten.lt.Tensor, slot, call_before(place, aten.unsqueeze.default, counts, -1))
    holds, blocks = (call_before(place, aten.index_select.default, x, 2, of_row) for x in (holds, blocks))
    holds, blocks = (call_before(place, aten.unsqueeze.default, x, -2) for x in (holds, blocks))
    same = call_before(place, aten.eq.Tensor, blocks, call_before(place, aten.unsqueeze.default, of_column, -1))
    return call_before(place, aten.any.dim, call_before(place, aten.logical_and.default, same, holds), -1)


def _numbers(node: Node) -> list[Node]:
    """What its functions are asked for: all rows of the batch, heads, queries and keys, so that they broadcast."""
    numbers = (_arange(node, size) for size in (*_leading(node), *node.args[4][:2]))
    return [
        call_before(node, aten.view.default, x, [-1 if dim == own else 1 for dim in range(4)])
        for own, x in enumerate(numbers)
    ]


def _inlined(node: Node, function: Node, inputs: list[Node]) -> Node:
    """A function, which takes and gives single numbers, on all of them at once."""
    graph = getattr(node.graph.owning_module, function.target).graph
    given = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    for inner in graph.nodes:
        if inner.op == "get_attr":
            raise _Unreadable("a function of flex_attention makes a tensor; accepted are tensors from outside")
        if inner.op == "call_function":
            _check(inner)
            args, kwargs = (torch.fx.map_arg(x, given.__getitem__) for x in (inner.args, inner.kwargs))
            given[inner] = call_before(node, inner.target, *args, **kwargs)
    return given[graph.output_node().args[0]]


def _leading(node: Node) -> tuple[Any, ...]:
    sizes = tuple(node.args[0].meta["val"].shape[:2])
    if not all(isinstance(size, int) for size in sizes):
        raise _Unreadable("flex_attention over a batch of varying size")
    return sizes


def _check(inner: Node) -> None:
    """Only what works on single numbers means the same on all of them at once."""
    known = is_call(inner, *_OF_SCALARS) or torch.Tag.pointwise in getattr(inner.target, "tags", ())
    value = inner.meta.get("val")
    if not known or not isinstance(value, torch.Tensor) or value.dim():
        raise _Unreadable(f"a function of flex_attention calls {inner.target}, which is not supported")
