"""Which plans can be recorded as CUDA graphs, and what of their inputs a recording is bound to."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from ..lowering import ops
from ..patterns.rewriting.plan import Argument, Extended, Plan
from .example_inputs import is_written

_MOST_COPIED = 2**16
"""Bytes of an input that a call copies. What is larger is bound."""


def is_step(plan: Plan) -> bool:
    """Whether a plan is of decode steps alone.

    Prompts are of many lengths, each of which would be recorded. A cache that a graph makes, which takes a compress,
    would be overwritten by the next replay.
    """
    targets = {node.target for node in plan.module.graph.nodes}
    return ops.decode_attention in targets and not {ops.compress, ops.decompress} & targets


def why_not(plan: Plan, examples: Sequence[Any]) -> str:
    """Why the decode step of a plan cannot run as a CUDA graph, "" where it can. examples: its example inputs."""
    if any(isinstance(output, Extended) for output in plan.outputs) and _numbers(examples):
        return "its caches grow, and their length is a number in the graph"
    devices = sorted({str(x.device) for x in examples if isinstance(x, Tensor)})
    return f"its inputs are on {' and '.join(devices)}" if len(devices) > 1 else ""


@dataclass(frozen=True)
class Places:
    """Of the inputs of a step, by place.

    bound: tensors that a recording is bound to where they are, such as weights and caches. copied: small tensors whose
    values each call brings. written: those of the copied that the step writes. numbers: what is no tensor. varying:
    tensors of which a size may change.
    """

    bound: Sequence[int] = ()
    copied: Sequence[int] = ()
    written: Sequence[int] = ()
    numbers: Sequence[int] = ()
    varying: Sequence[int] = ()

    @classmethod
    def of(cls, plan: Plan, examples: Sequence[Any]) -> Places:
        """Those of the inputs of ``plan``."""
        tensors = {i: x for i, x in enumerate(examples) if isinstance(x, Tensor)}
        nodes = [node for node in plan.module.graph.nodes if node.op == "placeholder"]
        copied = [i for i, x in tensors.items() if isinstance(plan.inputs[i], Argument) and _is_small(x)]
        return cls(
            bound=[i for i in tensors if i not in copied],
            copied=copied,
            written=[i for i in copied if is_written(nodes[i])],
            numbers=_numbers(examples),
            varying=[i for i, x in tensors.items() if not all(isinstance(size, int) for size in x.shape)],
        )

    def key(self, inputs: Sequence[Any]) -> Hashable:
        """What two calls must have in common to share a recording."""
        return (
            *[inputs[i].data_ptr() for i in self.bound],
            *[inputs[i] for i in self.numbers],
            *[inputs[i].shape for i in self.varying],
        )


def _numbers(examples: Sequence[Any]) -> list[int]:
    return [i for i, x in enumerate(examples) if not isinstance(x, Tensor)]


def _is_small(x: Tensor) -> bool:
    """Whether an input is to be copied. Weights are not, which are many."""
    size = x.dtype.itemsize * math.prod(map(_compat.hint, x.shape))
    return not isinstance(x, torch.nn.Parameter) and size <= _MOST_COPIED
