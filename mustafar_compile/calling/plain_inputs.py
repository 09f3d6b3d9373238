"""The inputs of a graph as plain tensors. Some are made of others, as a quantized weight is of integers and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from .. import _compat
from ..cache.tensor import CompressedKV

Call = Callable[..., Any]


class PlainInputs:
    """What a Dynamo graph takes, with the parts of a tensor that is made of others in its place.

    Only these are rewritten, compiled and recorded. While the graph is traced, what it takes is made of them again, so
    that the trace has what a tensor's own rules do with its parts.

    values: of the call that is compiled for. placeholders: one for each, with what Dynamo noted about it. parameters:
    which of them are parameters or parts of one, by place.
    """

    def __init__(self, gm: GraphModule, given: Sequence[Any]) -> None:
        self.values: list[Any] = []
        self.placeholders: list[Node] = []
        self.parameters: set[int] = set()
        self._paths: list[list[str]] = []
        self._likes: list[Tensor | None] = []
        for node, x in zip(gm.graph.find_nodes(op="placeholder"), given, strict=True):
            paths, before = list(_paths(x)) if is_composed(x) else [], len(self.values)
            self.values += [attrgetter(path)(x) for path in paths] if paths else [x]
            self.placeholders += [_part(node, x, number, path) for number, path in enumerate(paths)] or [node]
            if isinstance(x, Parameter):
                self.parameters.update(range(before, len(self.values)))
            self._paths.append(paths)
            self._likes.append(node.meta["example_value"] if paths else None)

    @property
    def caches(self) -> dict[int, CompressedKV]:
        """The compressed caches, by place."""
        return {i: x for i, x in enumerate(self.values) if isinstance(x, CompressedKV)}

    def composed(self, values: Iterable[Any]) -> list[Any]:
        """What the graph takes, made of ``values``."""
        rest = iter(values)
        return [next(rest) if like is None else _made_of(rest, like) for like in self._likes]

    def taking_parts(self, call: Call) -> Call:
        """``call``, which takes plain inputs, for what the graph takes: itself where that is the same."""
        takers = [(i, attrgetter(*paths)) for i, paths in enumerate(self._paths) if paths]
        of_one = [(i, take) for i, take in takers if len(self._paths[i]) == 1]
        of_several = [(i, take) for i, take in reversed(takers) if len(self._paths[i]) > 1]
        if not takers:
            return call

        def with_parts(*arguments: Any) -> Any:
            parts = list(arguments)
            for i, take in of_one:
                parts[i] = take(parts[i])
            for i, take in of_several:  # from the last to the first: those behind it move
                parts[i : i + 1] = take(parts[i])
            return call(*parts)

        return with_parts


def is_composed(x: Any) -> bool:
    """Whether ``x`` is a tensor that is made of others, with rules of its own. A compressed cache is none."""
    return _compat.tensors.holds_tensors(x) and not isinstance(x, CompressedKV)


def _paths(x: Any) -> Iterator[str]:
    """Where the plain tensors are that ``x`` is made of, as attributes of attributes."""
    for name in x.__tensor_flatten__()[0]:
        part = getattr(x, name)
        if is_composed(part):
            yield from (f"{name}.{path}" for path in _paths(part))
        elif isinstance(part, Tensor):
            yield name


def _made_of(tensors: Iterator[Tensor], like: Any) -> Any:
    """A tensor as ``like``, made of ``tensors``, which come in the order of ``_paths``."""
    names, context = like.__tensor_flatten__()
    parts = {name: getattr(like, name) for name in names}
    for name, part in parts.items():
        if isinstance(part, Tensor):
            parts[name] = _made_of(tensors, part) if is_composed(part) else next(tensors)
    return type(like).__tensor_unflatten__(parts, context, like.shape, like.stride())


def _part(whole: Node, x: Tensor, number: int, path: str) -> Node:
    """A placeholder for a part of ``x``, which the placeholder ``whole`` holds."""
    node = Graph().placeholder(whole.name)
    node.meta["example_value"] = attrgetter(path)(whole.meta["example_value"])
    node.meta["tensor_dict"] = dict(vars(attrgetter(path)(x)))
    source = getattr(whole, "_dynamo_source", None)  # another name than ``path``, by which a graph may take it, too
    node._dynamo_source = source and _compat.dynamo.AttrSource(source, f"part_{number}")
    return node
