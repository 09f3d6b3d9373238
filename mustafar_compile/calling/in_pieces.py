"""Compiling a rewritten graph in pieces: those that are alike once, as a model's layers are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .. import _compat
from ..patterns.graph.nodes import drop_meta
from ..patterns.graph.symbols import by_known_symbols
from ..patterns.rewriting.pieces import Piece, constants_of, fake_like, pieces_of

Boxed = Callable[[list[Any]], Sequence[Any]]


def compile_in_pieces(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
    """What Inductor makes of a graph, where it can in pieces: the time that it takes then does not grow with layers.

    module: a graph that is compiled within Dynamo. inputs: its example inputs.
    """
    pieces = [] if torch.is_grad_enabled() else pieces_of(module, inputs)
    if not pieces:
        return _compat.inductor.compile_fx(module, inputs)
    mode = _compat.dynamo.TracingContext.get().fake_mode
    examples = dict(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True))
    compiled: dict[Hashable, Boxed] = {}
    for piece in pieces:
        if piece.kind not in compiled:
            own = piece.as_module()
            given = [examples[x] if x in examples else fake_like(x.meta["val"], mode) for x in piece.takes]
            renewed = [by_known_symbols(x) for x in given]
            compiled[piece.kind] = _compat.inductor.boxed(_compat.inductor.compile_fx(own, renewed))
            drop_meta(own.graph)  # AOTAutograd keeps the module
    return InPieces(module, pieces, compiled)


class InPieces:
    """Calls the compiled pieces of a graph one after the other. compiled: by their kind."""

    def __init__(self, module: GraphModule, pieces: Sequence[Piece], compiled: Mapping[Hashable, Boxed]) -> None:
        inputs, constants = module.graph.find_nodes(op="placeholder"), constants_of(module)
        results: Any = module.graph.output_node().args[0]
        made = [node for piece in pieces for node in piece.gives]
        places = {node: place for place, node in enumerate((*inputs, *constants, *made))}
        last: dict[Node, Piece | None] = {node: piece for piece in pieces for node in piece.takes}
        last |= {node: None for node in results if isinstance(node, Node)}
        self.room = [*constants.values(), *(None for _ in made)]
        self.calls = []
        first = len(inputs) + len(constants)
        for piece in pieces:
            takes = [places[node] for node in piece.takes]
            done = [places[node] for node in piece.takes if last[node] is piece]
            self.calls.append((compiled[piece.kind], takes, done, slice(first, first + len(piece.gives))))
            first += len(piece.gives)
        self.results = [(places[x], None) if isinstance(x, Node) else (None, x) for x in results]

    def __call__(self, *inputs: Any) -> list[Any]:
        values = [*inputs, *self.room]
        for call, takes, done, gives in self.calls:
            given = [values[place] for place in takes]
            for place in done:  # the call alone holds it, and lets go of it early
                values[place] = None
            values[gives] = call(given)
        return [constant if place is None else values[place] for place, constant in self.results]
