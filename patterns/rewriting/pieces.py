"""A rewritten graph cut into pieces, each up to where the result of an attention is read.

Those of a model's layers are mostly alike, so one of them may be compiled for all: regional compilation. No compiler
joins attention with what follows it, so that a cut there costs nothing at a step but the call of the next piece.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from mustafar_compile import _compat

from ..graph.nodes import is_call
from ..graph.symbols import expression, guard_equal
from .emit import packed_swapped

aten = torch.ops.aten
ops = torch.ops.mustafar


@dataclass(frozen=True)
class Piece:
    """Calls that follow each other in a graph.

    takes: what of before they need, tensors and symbolic sizes. gives: what of theirs is needed later. kind: the same
    for pieces that compute the same of what they take, whatever the symbols of its sizes. sizes: what those stand for.
    packed: what is laid out anew if decompositions laid it out in another way than the trace: contiguous, or (True)
    contiguous but for a swap of the second and the third dimension, as attention over [B, L, H, D] in memory gives it.
    """

    nodes: Sequence[Node]
    takes: Sequence[Node]
    gives: Sequence[Node]
    kind: Hashable
    sizes: Mapping[Any, torch.SymInt]
    packed: Mapping[Node, bool]

    def as_module(self) -> GraphModule:
        """The piece as a graph of its own."""
        graph = Graph()
        copies = {node: graph.placeholder(node.name) for node in self.takes}
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        for node, is_swapped in self.packed.items():
            copies[node] = _contiguous(graph, copies[node], is_swapped)
        graph.output(tuple(copies[node] for node in self.gives))
        return GraphModule({}, graph)


def _contiguous(graph: Graph, node: Node, is_swapped: bool) -> Node:
    return packed_swapped(graph, node) if is_swapped else graph.call_function(aten.contiguous.default, (node,))


def pieces_of(module: GraphModule, inputs: Sequence[Any]) -> list[Piece]:
    """The pieces of a graph in order. None where it must stay whole, or where too few of them are alike.

    inputs: its example inputs. The graph must not be run under autograd. Notes the value of each node, and lets the
    graph write its inputs early.
    """
    graph = module.graph
    if not any(map(_is_attention, graph.nodes)) or not all(map(_can_be_cut_off, graph.nodes)):
        return []
    constants = constants_of(module)
    if not all(type(x) is torch.Tensor for x in constants.values()):
        return []
    _note_values(graph, dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True)) | constants)
    _write_early(graph)
    try:
        with _compat.tracing.fake_results(node.meta.get("val") for node in graph.nodes):
            pieces = _with_equal_sizes(list(_cut(graph)))
    except _Whole:
        return []
    return pieces if 2 * len({piece.kind for piece in pieces}) <= len(pieces) else []


def _with_equal_sizes(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces, of which those of one kind have equal sizes, on which Dynamo then guards.

    Each layer's static cache has a symbol of its own for its slots, and code that is made for one layer may be subject
    to what is known of that.
    """
    first: dict[Hashable, Piece] = {}
    found = []
    for piece in pieces:
        kind = piece.kind, tuple(map(_compat.symbols.hint, piece.sizes.values()))
        for a, b in zip(first.setdefault(kind, piece).sizes.values(), piece.sizes.values(), strict=True):
            guard_equal(a, b)
        found.append(replace(piece, kind=kind))
    return found


def constants_of(module: GraphModule) -> dict[Node, Any]:
    """What a graph takes of its module. Pieces are given it."""
    return {node: operator.attrgetter(node.target)(module) for node in module.graph.find_nodes(op="get_attr")}


def fake_like(x: Any, mode: Any) -> Any:
    """A fake tensor of ``mode`` in the shape of a tensor, on memory of its own; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    with mode:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


class _Whole(Exception):
    """A graph cannot be cut."""


def _can_be_cut_off(node: Node) -> bool:
    """Whether all that a call does is seen: it runs no other graph, and changes no state such as that of autocast."""
    if node.op != "call_function":
        return True
    is_op = isinstance(node.target, type(aten.copy_.default)) or node.target.__module__ == operator.getitem.__module__
    return is_op or isinstance(node.meta.get("val"), torch.SymInt)


def _note_values(graph: Graph, given: Mapping[Node, Any]) -> None:
    """Note the values of what rewriting added, as tracing did of all else. given: what the graph begins with.

    All are of the trace's fake mode then, of which what rewriting has noted of inputs need not be.
    """
    mode = _compat.tracing.fake_mode_of(node.meta.get("val") for node in graph.nodes)
    for node, x in given.items():
        noted = node.meta.get("val")
        if noted is None or getattr(noted, "fake_mode", mode) is not mode:
            node.meta["val"] = fake_like(x, mode)
    with _compat.tracing.fake_results(node.meta.get("val") for node in graph.nodes):
        for node in graph.nodes:
            if node.op == "call_function" and "val" not in node.meta:
                args, kwargs = (torch.fx.map_arg(x, lambda n: n.meta["val"]) for x in (node.args, node.kwargs))
                node.meta["val"] = node.target(*args, **kwargs)


def _write_early(graph: Graph) -> None:
    """Let inputs be written when nothing reads them any more, not at the end: what is written need not wait for it.

    Not by what is a view of an input.
    """
    inputs = {_memory(node) for node in graph.find_nodes(op="placeholder")}
    order = {node: place for place, node in enumerate(graph.nodes)}
    for write in graph.find_nodes(op="call_function", target=aten.copy_.default):
        base, value = write.args
        last = max((value, *_readers(base, write)), key=order.__getitem__)
        if last.op == "call_function" and _memory(value) not in inputs:
            last.append(write)


def _readers(base: Node, write: Node) -> set[Node]:
    """What reads ``base`` or a view of it, other than ``write``."""
    readers: set[Node] = set()
    todo = [base]
    while todo:
        users = todo.pop().users.keys() - readers - {write}
        readers |= users
        todo += [user for user in users if user.op != "output" and _shares_memory(user, base)]
    return readers


def _shares_memory(a: Node, b: Node) -> bool:
    return _memory(a) is not None and _memory(a) == _memory(b)


def _memory(node: Node) -> int | None:
    """A number of the memory of a tensor, None for anything else."""
    value = node.meta["val"]
    return _compat.memory.storage_number(value) if isinstance(value, torch.Tensor) else None


def _cut(graph: Graph) -> Iterator[Piece]:
    """Cut a graph whose values are noted. Raises _Whole."""
    inputs = {
        expression(node): node
        for node in reversed(graph.find_nodes(op="placeholder"))
        if isinstance(node.meta["val"], torch.SymInt)
    }
    memory = {_memory(node) for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    nodes: list[Node] = []
    attention = None
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        if attention in node.all_input_nodes:  # only here: until then a prompt's keys and values are compressed
            yield _piece(nodes, inputs, memory)
            nodes, attention = [], None
        nodes.append(node)
        if _is_attention(node):
            attention = node
    if nodes:
        yield _piece(nodes, inputs, memory)


def _is_attention(node: Node) -> bool:
    sdpa = aten.scaled_dot_product_attention.default
    return is_call(node, sdpa, ops.band_attention.default, ops.decode_attention.default)


def _piece(nodes: Sequence[Node], inputs: dict[Any, Node], memory: Set[int | None]) -> Piece:
    """inputs: those of the graph that are symbolic sizes. A piece takes those that none of its tensors tells.

    memory: of all inputs.
    """
    own = set(nodes)
    takes = dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in own)
    symbols = dict.fromkeys(symbol for node in (*takes, *nodes) for symbol in _symbols(node.meta["val"]))
    told = {expression(size): size for node in takes for size in getattr(node.meta["val"], "shape", ())}
    if not symbols.keys() <= told.keys() | inputs.keys():
        raise _Whole
    takes |= dict.fromkeys(inputs[symbol] for symbol in symbols if symbol not in told)
    gives = [node for node in nodes if not own.issuperset(node.users)]
    packed = {node: _is_swapped(node) for node in gives if _goes_on(node, own) and not _has_known_strides(node, memory)}
    for node, is_swapped in packed.items():
        if not is_swapped:
            node.meta["val"] = node.meta["val"].contiguous()
    sizes = {symbol: told[symbol] if symbol in told else inputs[symbol].meta["val"] for symbol in symbols}
    kind = _kind(nodes, list(takes), gives, list(symbols)), tuple(packed.get(node) for node in gives)
    return Piece(nodes, list(takes), gives, kind, sizes, packed)


def _goes_on(node: Node, own: Set[Node]) -> bool:
    """Whether a later piece takes a tensor of a piece, whose nodes are ``own``."""
    later = any(user not in own and user.op != "output" for user in node.users)
    return later and isinstance(node.meta["val"], torch.Tensor)


def _has_known_strides(node: Node, inputs: Set[int | None]) -> bool:
    """Whether a tensor is laid out as traced, however its op is decomposed: what our ops give, and views of inputs."""
    return is_call(node, ops.band_attention.default, ops.decode_attention.default) or _memory(node) in inputs


def _is_swapped(node: Node) -> bool:
    """Whether attention over [B, H, L, D] was traced as [B, L, H, D] in memory, which saves a copy behind it."""
    value = node.meta["val"]
    return _is_attention(node) and not value.is_contiguous() and value.transpose(1, 2).is_contiguous()


def _symbols(value: Any) -> list[Any]:
    parts = value if isinstance(value, list | tuple) else [value]
    tensors = [size for x in parts if isinstance(x, torch.Tensor) for size in (*x.shape, *x.stride())]
    sizes = [expression(x).free_symbols for x in (*parts, *tensors) if isinstance(x, torch.SymInt)]
    return [symbol for found in sizes for symbol in sorted(found, key=str)]


def _kind(nodes: Sequence[Node], takes: Sequence[Node], gives: Sequence[Node], symbols: Sequence[Any]) -> Hashable:
    """What decides on the code of a piece: what it takes, its calls and what it gives."""
    names = {symbol: sympy.Symbol(f"n{i}", integer=True) for i, symbol in enumerate(symbols)}
    places = {node: place for place, node in enumerate((*takes, *nodes))}
    written = {x for node in nodes for x in _compat.tensors.written(node.target, node.args, node.kwargs)}
    taken: list[Hashable] = []
    first: dict[int, int] = {}
    for place, node in enumerate(takes):
        memory = _memory(node)
        alias = place if memory is None else first.setdefault(memory, place)
        if alias != place and not written.isdisjoint((node, takes[alias])):
            raise _Whole  # code that writes one part of a tensor would not do for another part
        taken.append((_described(node, names), alias))
    given = tuple((_described(node, names), places[node]) for node in gives)
    return tuple(taken), tuple((x.target, _stated(x.args, places), _stated(x.kwargs, places)) for x in nodes), given


def _described(node: Node, names: dict[Any, Any]) -> Hashable:
    """What is known of a value that enters or leaves a piece. Raises _Whole where that is not enough.

    names: of symbols.
    """
    value = node.meta["val"]
    if isinstance(value, torch.SymInt):
        return expression(value).xreplace(names)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise _Whole
    sizes = tuple(expression(size).xreplace(names) for size in (*value.shape, *value.stride()))
    return value.dtype, value.device, sizes, value.requires_grad


def _stated(argument: Any, places: dict[Node, int]) -> Hashable:
    """An argument of a call, with the places of values in their place."""
    if isinstance(argument, Node):
        return Node, places[argument]
    if isinstance(argument, list | tuple):
        return tuple(_stated(x, places) for x in argument)
    if isinstance(argument, dict):
        return tuple((name, _stated(x, places)) for name, x in sorted(argument.items()))
    return type(argument), repr(argument)
