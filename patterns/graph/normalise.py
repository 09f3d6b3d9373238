"""Stage 1: one vocabulary. A Dynamo graph becomes functional pre-dispatch ATen, in which SDPA is still whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mustafar_compile import _compat

from .interpreter import Interpreter
from .nodes import drop_meta
from .symbols import same_size
from .views import slice_bounds
from .vmaps import without_vmap

aten = torch.ops.aten


@dataclass
class Functional:
    """A functional graph with Dynamo's calling convention taken apart.

    module: the traced graph; its output node still lists mutated values first.
    placeholders: one for each input, in order.
    mutated: placeholder -> the value that it must hold afterwards.
    outputs: the user's outputs (nodes or constants), in order.
    """

    module: GraphModule
    placeholders: list[Node]
    mutated: dict[Node, Node]
    outputs: list[Any]

    @property
    def graph(self) -> torch.fx.Graph:
        return self.module.graph

    def replace(self, node: Node, result: Node) -> None:
        """Let ``result`` take the place of ``node``, which goes."""
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        self.outputs = [result if output is node else output for output in self.outputs]
        self.graph.erase_node(node)

    def extracted(self, value: Node) -> GraphModule:
        """A graph of the same inputs that computes ``value`` alone, without metadata: it outlives the trace."""
        graph = torch.fx.Graph()
        copies: dict[Node, Node] = {}
        needed, todo = set(self.placeholders), [value]
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                todo += node.all_input_nodes
        for node in self.graph.nodes:
            if node in needed:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[value])
        drop_meta(graph)
        return GraphModule(self.module, graph)


def normalise(
    gm: GraphModule,
    inputs: Sequence[Any],
    stand_in: Callable[[int, Any], Any | None],
    composed: Callable[[Sequence[Any]], Sequence[Any]],
) -> Functional:
    """Trace ``gm`` again, over ``inputs``, of which ``composed`` makes what it takes.

    ``stand_in`` gives fakes for inputs that are not plain tensors (see ``_compat.tracing.fakify``).
    An error on the way has a note of the line of the model that it comes from.
    """
    graph = without_vmap(gm)
    mode, fakes = _compat.tracing.fakify(inputs, stand_in)
    with _compat.tracing.tracing_functionally(mode):
        traced, written = _compat.tracing.make_functional_fx(
            lambda *args: Interpreter(gm, graph).run(*composed(args)), fakes
        )
    _drop_assertions(traced.graph)
    _drop_whole_slices(traced.graph)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    results = list(traced.graph.output_node().args[0])
    mutated = {placeholders[i]: value for i, value in zip(written, results, strict=False)}
    return Functional(traced, placeholders, mutated, results[len(written) :])


def _drop_assertions(graph: torch.fx.Graph) -> None:
    """Tracing asserts the dtype of what a cast takes. That holds by construction, and patterns count users."""
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)


def _drop_whole_slices(graph: torch.fx.Graph) -> None:
    """``x[:]`` is x, and a write into it a write into x. Tracing makes aliases of them where sizes are known."""
    for node in graph.find_nodes(op="call_function", target=aten.alias.default):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    for target, whole in ((aten.slice.Tensor, 0), (aten.slice_scatter.default, 1)):
        for node in graph.find_nodes(op="call_function", target=target):
            same_shape = all(map(same_size, node.args[whole].meta["val"].shape, node.meta["val"].shape))
            if same_shape and slice_bounds(node, first=whole + 1)[1] == 0:
                node.replace_all_uses_with(node.args[whole])
                graph.erase_node(node)
