"""Which sizes grow from step to step, and a step that takes any larger size in their place.

A length comes to the host as a number or as the size of a tensor, such as a mask. A graph that was recorded for one
would serve one step. So where a step only asks how large something is, it is given a size that is rounded up, and where
it computes with a length, it reads the true one on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from mustafar_compile import _compat

from ..graph.nodes import is_call, symbolic_size
from ..graph.symbols import expression
from .free_of_lengths import FreeOfLengths
from .plan import Argument, Plan, Size
from .rounded_sizes import LengthError

ops = torch.ops.mustafar


@dataclass(frozen=True)
class Length:
    """A size that changes from step to step: input ``place`` of a graph, or dimension ``dim`` of it."""

    symbol: sympy.Symbol
    place: int
    dim: int | None = None

    def of(self, inputs: Sequence[Any]) -> int:
        """Its value at a call."""
        return size_at(inputs, self.place, self.dim)


def size_at(inputs: Sequence[Any], place: int, dim: int | None) -> int:
    """A size that a call is given: an input, or a dimension of one."""
    return inputs[place] if dim is None else inputs[place].shape[dim]


def traced_inputs(plan: Plan, examples: Sequence[Any]) -> list[Any]:
    """The inputs of a plan as they were traced, with symbolic sizes. examples: its example inputs."""
    placeholders = [node for node in plan.module.graph.nodes if node.op == "placeholder"]
    return [node.meta.get("val", x) for node, x in zip(placeholders, examples, strict=True)]


def lengths_of(plan: Plan, examples: Sequence[Any]) -> list[Length]:
    """The symbolic sizes of inputs that are none of a batch, of new tokens or of the room of a cache."""
    traced = traced_inputs(plan, examples)
    fixed = set(_symbols_of_steps(plan))
    for source, x in zip(plan.inputs, traced, strict=True):
        if not isinstance(source, Argument | Size):
            fixed |= _symbols(x.shape)
    found: dict[Any, Length] = {}
    numbers = [(place, None, x) for place, x in enumerate(traced) if isinstance(x, torch.SymInt)]
    sizes = [(i, dim, n) for i, x in enumerate(traced) if isinstance(x, Tensor) for dim, n in enumerate(x.shape)]
    for place, dim, size in (*numbers, *sizes):
        symbol = expression(size)
        if isinstance(symbol, sympy.Symbol) and symbol not in fixed:
            found.setdefault(symbol, Length(symbol, place, dim))
    return list(found.values())


def _symbols_of_steps(plan: Plan) -> Iterator[sympy.Symbol]:
    """Those of the queries of attention, and of how many tokens its static caches take."""
    for node in plan.module.graph.nodes:
        if is_call(node, ops.decode_attention.default):
            yield from _symbols([*node.args[0].meta["val"].shape, node.kwargs["length"]])


def _symbols(sizes: Sequence[Any]) -> set[sympy.Symbol]:
    return {symbol for e in map(expression, sizes) if e is not None for symbol in e.free_symbols}


def free_of_lengths(plan: Plan, lengths: Sequence[Length], device: torch.device) -> Tensor:
    """Let the graph of ``plan`` take larger sizes in place of ``lengths``, whose true values are one more input.

    That is int64 [len(lengths)] on ``device``; returns an example of it. Raises LengthError, with nothing changed,
    where the graph depends on a length in another way.
    """
    graph = plan.module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with _compat.dynamo.TracingContext.get().fake_mode:
        example = torch.empty(len(lengths), dtype=torch.int64, device=device)
    with graph.inserting_after(placeholders[-1]):
        values = graph.placeholder("lengths")
    values.meta["val"] = example
    values._dynamo_source = _compat.dynamo.ConstantSource("lengths")
    with graph.inserting_after(values):
        numbers = {
            length.symbol: placeholders[length.place]
            if length.dim is None
            else symbolic_size(graph, placeholders[length.place], length.dim)
            for length in lengths
        }
    try:
        FreeOfLengths(graph, numbers, values).run()
    except LengthError:
        for node in {*numbers.values(), values}.difference(placeholders):
            graph.erase_node(node)
        raise
    plan.module.recompile()
    return example
