"""Regions of vmap, written out: ops on all elements in place of those that the graph has, on one.

Tracing before dispatch cannot enter such a region: it comes to an op before vmap does. Block masks of flex attention
are made in one, also where another is indexed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

from torch.fx import Graph, GraphModule, Node

from mustafar_compile import _compat

from .interpreter import Interpreter
from .nodes import located, may_be_attention


def without_vmap(gm: GraphModule) -> Graph:
    """The graph of ``gm``, with a call of what it computes, in ATen, in place of each region of vmap.

    Raises RuntimeError for attention in such a region, which would be lost in it.
    """
    ends = {region[-1]: region for region in _regions(gm.graph)}
    if not ends:
        return gm.graph
    inside = {node for region in ends.values() for node in region}
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node in ends:
            _write_out(gm, ends[node], graph, copies)
        elif node not in inside:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return graph


def _regions(graph: Graph) -> Iterator[list[Node]]:
    """The outermost regions, each from the call that enters it to the one that leaves it."""
    region: list[Node] = []
    depth = 0
    for node in graph.nodes:
        depth += node.target is _compat.tracing.enter_vmap
        if depth:
            region.append(node)
        if node.target is _compat.tracing.leave_vmap:
            depth -= 1
            if not depth:
                yield region
                region = []


def _write_out(gm: GraphModule, region: Sequence[Node], graph: Graph, copies: dict[Node, Node]) -> None:
    """Add to ``graph`` what ``region`` computes. copies: what nodes of ``gm`` are in it."""
    own = set(region)
    given = list(dict.fromkeys(x for node in region for x in node.all_input_nodes if x not in own))
    results = [node for node in region if any(user not in own for user in node.users)]
    traced = _traced(gm, region, given, results)
    call = graph.call_function(traced.forward, tuple(copies[node] for node in given))
    call.meta = dict(results[0].meta) if results else {}
    for i, node in enumerate(results):
        copies[node] = graph.call_function(operator.getitem, (call, i))


def _traced(gm: GraphModule, region: Sequence[Node], given: Sequence[Node], results: Sequence[Node]) -> GraphModule:
    """``region`` alone: it takes the values of ``given`` and gives those of ``results``."""
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in given}
    for node in region:
        with located(node):
            if may_be_attention(node):
                raise RuntimeError("there is attention in a vmap")
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in results])
    return _compat.tracing.make_dispatched_fx(
        Interpreter(gm, graph).run, [node.meta["example_value"] for node in given]
    )
