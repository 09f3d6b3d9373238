"""Carrying out a plan: binding a rewritten graph to the tensors of each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .attached import current_state
from .cache import CompressedKV
from .lowering.layout import BUFFERS
from .patterns.plan import Argument, AttachedBuffer, Buffer, Compressed, Extended, Plan, Result, Size
from .report import record_call


class CompiledCall:
    """The function that Dynamo calls in place of the original graph."""

    def __init__(self, plan: Plan, compiled: Callable[..., Sequence[Any]]) -> None:
        self.plan = plan
        self.compiled = compiled
        self.extended = [output for output in plan.outputs if isinstance(output, Extended)]
        self.growing = sorted({source.index for source in plan.inputs if isinstance(source, Buffer)})

    def __call__(self, *arguments: Any) -> list[Any]:
        record_call()
        for output in self.extended:
            arguments[output.index].prepare(_count(output, arguments))
        _level([arguments[index] for index in self.growing if arguments[index].grows])
        states = {a.index: current_state(a, arguments) for a in self.plan.attached}
        inputs = [_bind(source, arguments, states) for source in self.plan.inputs]
        results = self.compiled(*inputs)
        for index, state in states.items():
            state.version = arguments[index]._version
        return [_deliver(output, arguments, results) for output in self.plan.outputs]


def _level(caches: list[CompressedKV]) -> None:
    """Give all growing caches the same number of blocks: one symbol stands for it in the compiled graph."""
    capacities = {cache.capacity for cache in caches}
    if len(capacities) > 1:
        for cache in caches:
            cache.reserve(max(capacities))


def _bind(source: Any, arguments: Sequence[Any], states: dict[int, Any]) -> Any:
    match source:
        case Argument(index):
            return arguments[index]
        case Buffer(index, name):
            return getattr(arguments[index], name)
        case AttachedBuffer(index, name):
            return states[index].buffers[name]
        case Size(index, dim):
            return arguments[index].shape[dim]


def _count(output: Extended, arguments: Sequence[Any]) -> int:
    return arguments[output.count.index] if isinstance(output.count, Argument) else output.count


def _deliver(output: Any, arguments: Sequence[Any], results: Sequence[Any]) -> Any:
    match output:
        case Argument(index):
            return arguments[index]
        case Result(index):
            return results[index]
        case Extended(index):
            return arguments[index].extended(_count(output, arguments))
        case Compressed(index, tokens, grows):
            buffers: list[Tensor] = list(results[index : index + len(BUFFERS)])
            length = results[tokens.index] if isinstance(tokens, Result) else tokens
            return CompressedKV.from_buffers(buffers, length, grows)
