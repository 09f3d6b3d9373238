"""What lies between a cache and the attention that reads it.

The ops in between (repeat_kv in any spelling, transposes, views) only move elements. Instead of listing spellings,
each dimension is described by the axes of the cache that it runs over, and the description is carried through the
ops. What arrives at the attention can then be compared with what grouped-query attention needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from .calls import factor_of
from .symbols import same_size

aten = torch.ops.aten


@dataclass(frozen=True)
class Axis:
    """One factor of a dimension. source: the cache dimension that it runs over, None for a repetition."""

    source: int | None
    size: Any


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Dims = list[list[Axis]]
"""For each dimension its axes, outermost first; none where the size is 1."""


@dataclass
class Read:
    """How attention sees a cache.

    dims: at the attention. prefix: how many, where only the first of dimension ``cut`` of the cache are read. factor:
    what they are multiplied by.
    """

    dims: Dims
    prefix: Any | None = None
    cut: int | None = None
    factor: float = 1.0


def _dim(node: Node, index: int, rank: int | None = None) -> int:
    return index % (node.meta["val"].dim() if rank is None else rank)


def _keep(dims: Dims, node: Node) -> Dims | None:
    """A cast to another float is a rounding at most: attention sums in float32 whatever it is given."""
    dtypes = [x.meta["val"].dtype for x in (node.args[0], node)]
    return dims if all(dtype in _FLOATS for dtype in dtypes) else None


def _unsqueeze(dims: Dims, node: Node) -> Dims:
    at = _dim(node, node.args[1])
    return [*dims[:at], [], *dims[at:]]


def _expand(dims: Dims, node: Node) -> Dims | None:
    shape = node.meta["val"].shape
    if len(shape) != len(dims):
        return None
    return [axes or ([] if same_size(size, 1) else [Axis(None, size)]) for axes, size in zip(dims, shape, strict=True)]


def _transpose(dims: Dims, node: Node) -> Dims:
    a, b = (_dim(node, i) for i in node.args[1:3])
    dims = list(dims)
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def _permute(dims: Dims, node: Node) -> Dims:
    return [dims[_dim(node, i)] for i in node.args[1]]


def _view(dims: Dims, node: Node) -> Dims | None:
    """Regroup the axes so that each output dimension is the product of its own."""
    axes = [axis for group in dims for axis in group]
    regrouped: Dims = []
    for size in node.meta["val"].shape:
        group: list[Axis] = []
        product: Any = 1
        while not same_size(product, size) and axes:
            group.append(axes.pop(0))
            product = product * group[-1].size
        if not same_size(product, size):
            return None
        regrouped.append(group)
    return None if axes else regrouped


def _repeat_interleave(dims: Dims, node: Node) -> Dims | None:
    repeats, dim = node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if dim is None:
        return None
    at = _dim(node, dim)
    return [[*axes, Axis(None, repeats)] if i == at else axes for i, axes in enumerate(dims)]


def _repeat(dims: Dims, node: Node) -> Dims | None:
    """As expand, where only dimensions of size 1 are repeated."""
    whole = _expand(dims, node)
    sizes = zip(dims, node.args[0].meta["val"].shape, node.meta["val"].shape, strict=False)
    return whole if all(same_size(old, new) for axes, old, new in sizes if axes) else None


_MOVES: dict[Any, Callable[[Dims, Node], Dims | None]] = {
    aten.clone.default: _keep,
    aten.contiguous.default: _keep,
    aten.detach.default: _keep,
    aten._to_copy.default: _keep,
    aten.type_as.default: _keep,
    aten.to.dtype: _keep,
    aten.unsqueeze.default: _unsqueeze,
    aten.expand.default: _expand,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.squeeze.dim: _view,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
}


def slice_bounds(node: Node, first: int = 1) -> tuple[int, Any, Any, Any]:
    """(dim, start, end, step) of an aten.slice, or of another op that takes them from argument ``first`` on."""
    dim, start, end, step = (*node.args[first:], *(0, None, None, 1)[len(node.args) - first :])
    return _dim(node, dim), 0 if start is None else start, end, step


def is_whole_slice(node: Node) -> bool:
    """True for a slice that leaves its input as it is."""
    return _same_shape(node, node.args[0])


def _same_shape(a: Node, b: Node) -> bool:
    shapes = [x.meta["val"].shape for x in (a, b)]
    return len(shapes[0]) == len(shapes[1]) and all(map(same_size, *shapes))


def unmoved(node: Any) -> Any:
    """What ``node`` is moved from."""
    while isinstance(node, Node) and is_move(node):
        node = node.args[0]
    return node


def changes_nothing(node: Node) -> bool:
    """True for an op that moves elements at most and gives its input as it was."""
    if not is_move(node) or _MOVES.get(node.target) in (_transpose, _permute, _repeat, _repeat_interleave):
        return False
    source = node.args[0]
    return source.meta["val"].dtype == node.meta["val"].dtype and _same_shape(node, source)


def is_move(node: Node) -> bool:
    """True for an op that only moves, repeats or slices elements."""
    return node.op == "call_function" and (node.target in _MOVES or node.target is aten.slice.Tensor)


def is_regrouping(node: Node) -> bool:
    """True for an op that splits, joins, adds or drops dimensions and leaves all elements in order."""
    return node.op == "call_function" and _MOVES.get(node.target) in (_view, _unsqueeze)


def read_through(chain: Sequence[Node], source: Node) -> Read | None:
    """Carry the axes of ``source`` through ``chain``, first op first. None where an op does more than move or scale."""
    shape = source.meta["val"].shape
    read = Read([[] if same_size(size, 1) else [Axis(i, size)] for i, size in enumerate(shape)])
    for node in chain:
        if node.target is aten.slice.Tensor:
            if is_whole_slice(node):
                continue
            dim, start, _, step = slice_bounds(node)
            axes = read.dims[dim]
            if start != 0 or step != 1 or len(axes) != 1 or read.prefix is not None:
                return None
            size = node.meta["val"].shape[dim]
            dims = list(read.dims)
            dims[dim] = [] if same_size(size, 1) else [Axis(axes[0].source, size)]
            read = replace(read, dims=dims, prefix=size, cut=axes[0].source)
            continue
        factor = factor_of(node)
        if factor is not None:
            read.factor *= factor
            continue
        dims_or_none = _MOVES[node.target](read.dims, node)
        if dims_or_none is None:
            return None
        read.dims = dims_or_none
    return read


def first_of_rank(node: Node, rank: int) -> Node | None:
    """The first tensor of ``rank`` dimensions that ``node`` is moved from, itself included; None without one."""
    while node.meta["val"].dim() != rank:
        if not is_move(node):
            return None
        node = node.args[0]
    return node
