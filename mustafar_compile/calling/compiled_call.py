"""Carrying out a plan: a rewritten graph and what stands around it at each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..cache.attached import StateFinder
from ..cache.tensor import CompressedKV
from ..patterns.rewriting.plan import Argument, Compressed, Extended, Plan, Result
from ..reporting.explain import record_call
from .binding import Binding


class CompiledCall:
    """The function that Dynamo calls in place of the original graph. growing: which arguments are growing caches.

    It lives as long as the model, and so does what it holds, so it keeps of the plan what calls need: not its graph.
    """

    def __init__(self, plan: Plan, compiled: Callable[..., Sequence[Any]], growing: Sequence[int]) -> None:
        self.outputs = plan.outputs
        self.attached = {a.index: StateFinder(a) for a in plan.attached}
        self.compiled = compiled
        self.growing = growing
        self.extended = [output for output in self.outputs if isinstance(output, Extended)]
        self.bind = Binding(plan.inputs)

    def __call__(self, *arguments: Any) -> list[Any]:
        record_call()
        for output in self.extended:
            arguments[output.index].prepare(_count(output, arguments))
        if self.growing:
            _give_equal_room([arguments[index] for index in self.growing])
        states = {index: find(arguments) for index, find in self.attached.items()}
        try:
            results = self.compiled(*self.bind(arguments, states))
        except BaseException:
            for output in self.extended:  # others are told where their tokens go, so they can take them in again
                arguments[output.index].undo()
            raise
        for find in self.attached.values():
            find.keep(arguments)
        return [_result(output, arguments, results) for output in self.outputs]


def _give_equal_room(caches: list[CompressedKV]) -> None:
    """Give all growing caches the same number of blocks: one symbol stands for it in the compiled graph."""
    capacities = {cache.capacity for cache in caches}
    if len(capacities) > 1:
        for cache in caches:
            cache.reserve(max(capacities))


def _count(output: Extended, arguments: Sequence[Any]) -> int:
    return arguments[output.count.index] if isinstance(output.count, Argument) else output.count


def _result(output: Any, arguments: Sequence[Any], results: Sequence[Any]) -> Any:
    match output:
        case Extended(index):
            return arguments[index].extended(_count(output, arguments))
        case Result(index):
            return results[index]
        case Argument(index):
            return arguments[index]
        case Compressed(index, format, tokens, grows, tokens_dim):
            buffers: list[Tensor] = list(results[index : index + len(format.buffers)])
            length = results[tokens.index] if isinstance(tokens, Result) else tokens
            return CompressedKV.from_buffers(format, buffers, length, grows, tokens_dim)
