"""Which plans can be recorded as CUDA graphs, and what of their inputs a recording is bound to."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from .. import _compat
from ..lowering import ops
from ..patterns.graph.nodes import is_collective
from ..patterns.graph.symbols import expression
from ..patterns.rewriting.lengths import Length, size_at, traced_inputs
from ..patterns.rewriting.plan import Argument, Plan
from .example_inputs import is_written
from .watch import Watch

_MOST_COPIED = 2**16
"""Bytes of an input that every call copies. What is larger is bound, until it turns out that the caller moves it."""

_STEPS = 1024
"""That a recording serves before a length outgrows it. The columns of masks that are computed in vain cost little."""


def is_step(plan: Plan) -> bool:
    """Whether a plan is of decode steps alone.

    Prompts are of many lengths, each of which would be recorded. A cache that a graph makes, which takes a compress,
    would be overwritten by the next replay.
    """
    targets = {node.target for node in plan.module.graph.nodes}
    return ops.decode_attention in targets and not {ops.compress, ops.decompress} & targets


def graph_device(examples: Sequence[Any]) -> torch.device | None:
    """The device whose work can be recorded, if there is one. examples: the example inputs of a plan."""
    return next((x.device for x in examples if isinstance(x, Tensor) and x.device.type == "cuda"), None)


def why_not(plan: Plan, examples: Sequence[Any]) -> str:
    """Why a decode step cannot run as a CUDA graph, "" where it can. examples: its example inputs."""
    devices = sorted({str(x.device) for x in examples if isinstance(x, Tensor)})
    if len(devices) > 1:
        return f"its inputs are on {' and '.join(devices)}"
    waiting = sorted(_waits_by(plan, devices) - {"nccl"})
    return f"its ranks wait for each other by {' and '.join(waiting)}; accepted is nccl" if waiting else ""


def _waits_by(plan: Plan, devices: Sequence[str]) -> set[str]:
    """The libraries by which a step waits for other ranks."""
    known = (_compat.distributed.backend_of(name, torch.device(device)) for name in _named(plan) for device in devices)
    return {library for library in known if library is not None}


def _named(plan: Plan) -> set[str]:
    """What collectives are given as texts: the names of process groups among them."""
    return {x for node in plan.module.graph.nodes if is_collective(node) for x in node.args if isinstance(x, str)}


def watch_over(plan: Plan) -> Watch | None:
    """The watch over a step that waits for other ranks."""
    groups = [group for name in _named(plan) if (group := _compat.distributed.group_named(name)) is not None]
    return Watch(min(map(_compat.distributed.timeout_of, groups))) if groups else None


def rounded(length: int) -> int:
    """The size that stands for a length in a recording, which serves that many steps."""
    return -(-length // _STEPS) * _STEPS


@dataclass(frozen=True)
class Places:
    """Of the inputs of a step, by place.

    bound: tensors that a recording is bound to where they are, such as weights and caches. movable: those among them
    that may as well be copied: a mask, say. copied: tensors whose values each call brings. written: which of the copied
    the step writes, by their place among them. sizes: numbers (None), and dimensions of tensors, that may change but do
    not from step to step. lengths: those that do. long: the dimensions of inputs that follow from lengths.
    """

    bound: Sequence[int] = ()
    movable: frozenset[int] = frozenset()
    copied: Sequence[int] = ()
    written: Sequence[int] = ()
    sizes: Sequence[tuple[int, int | None]] = ()
    lengths: Sequence[Length] = ()
    long: Mapping[int, Mapping[int | None, sympy.Expr]] = field(default_factory=dict)
    parameters: frozenset[int] = frozenset()
    waits: bool = False

    @classmethod
    def of(cls, plan: Plan, examples: Sequence[Any], lengths: Sequence[Length], parameters: Collection[int]) -> Places:
        """Those of the inputs of ``plan``.

        lengths: those that its graph is free of. parameters: arguments that are weights, of which there are many.
        """
        nodes = [node for node in plan.module.graph.nodes if node.op == "placeholder"]
        tensors = {i: x for i, x in enumerate(examples) if isinstance(x, Tensor)}
        grown = {length.symbol for length in lengths}
        sizes: list[tuple[int, int | None]] = []
        long: dict[int, dict[int | None, sympy.Expr]] = {}
        for i, x in enumerate(traced_inputs(plan, examples)):
            for dim, size in enumerate(x.shape) if i in tensors else [(None, x)]:
                e = expression(size)
                if e is not None and e.free_symbols & grown:
                    long.setdefault(i, {})[dim] = e
                elif not isinstance(size, int):
                    sizes.append((i, dim))
        arguments = {i: source.index for i, source in enumerate(plan.inputs) if isinstance(source, Argument)}
        given = [i for i, argument in arguments.items() if i in tensors and argument not in parameters]
        copied = [i for i in given if i in long or _is_small(tensors[i])]
        bound = [i for i in tensors if i not in copied]
        return cls(
            bound=bound,
            movable=frozenset(i for i in given if i in bound and not is_written(nodes[i])),
            copied=copied,
            written=[place for place, i in enumerate(copied) if is_written(nodes[i])],
            sizes=sizes,
            lengths=lengths,
            long=long,
            parameters=frozenset(i for i, argument in arguments.items() if argument in parameters),
            waits=any(map(is_collective, plan.module.graph.nodes)),
        )

    def moved(self, before: Sequence[Hashable], now: Sequence[Hashable]) -> frozenset[int]:
        """The movable inputs that lie elsewhere than at the call before, none where others do, too.

        before, now: ``addresses`` of two calls.
        """
        moved = frozenset(i for i, a, b in zip(self.bound, before, now, strict=True) if a != b)
        return moved if moved <= self.movable else frozenset()

    def copying(self, moved: frozenset[int]) -> Places:
        """The same with movable inputs copied."""
        bound = [i for i in self.bound if i not in moved]
        return replace(self, bound=bound, movable=self.movable - moved, copied=[*self.copied, *sorted(moved)])

    @functools.cached_property
    def long_copied(self) -> list[int]:
        """Which of the copied have a dimension that follows from lengths, by their place among them."""
        return [place for place, i in enumerate(self.copied) if i in self.long]

    def addresses(self, inputs: Sequence[Any]) -> tuple[Hashable, ...]:
        """What a recording is bound to.

        Other tensors may come to lie at the same addresses later, on one rank and not on the next. NCCL wants all ranks
        to record and to replay together, so a step that waits for them is bound to the memory as it lives, not only to
        where it is.
        """
        if not self.waits:
            return tuple([inputs[i].data_ptr() for i in self.bound])
        lasting, number = self.parameters, _compat.memory.storage_number
        return tuple(
            [inputs[i].data_ptr() if i in lasting else (inputs[i].data_ptr(), number(inputs[i])) for i in self.bound]
        )

    def marks(self, inputs: Sequence[Any]) -> list[Any]:
        """Weak references to memory by whose life ``addresses`` go: while they are kept, no other gets its number."""
        if not self.waits:
            return []
        return [
            _compat.memory.StorageWeakRef(inputs[i].untyped_storage()) for i in self.bound if i not in self.parameters
        ]

    def form(self, inputs: Sequence[Any]) -> Hashable:
        """What decides on the kernels of a recording: sizes and rounded lengths."""
        return (
            *[size_at(inputs, i, dim) for i, dim in self.sizes],
            *[rounded(length.of(inputs)) for length in self.lengths],
        )

    def roomy(self, inputs: Sequence[Any]) -> dict[int, Any]:
        """For the long inputs what they are where lengths are rounded: numbers, and tensors of zeros."""
        sizes = {length.symbol: rounded(length.of(inputs)) for length in self.lengths}
        made: dict[int, Any] = {}
        for i, long in self.long.items():
            grown = {dim: int(size.subs(sizes)) for dim, size in long.items()}
            if None in grown:
                made[i] = grown[None]
            else:
                x = inputs[i]
                shape = [grown.get(dim, size) for dim, size in enumerate(x.shape)]
                made[i] = torch.zeros(shape, dtype=x.dtype, device=x.device)
        return made


def _is_small(x: Tensor) -> bool:
    return x.dtype.itemsize * math.prod(map(_compat.symbols.hint, x.shape)) <= _MOST_COPIED
