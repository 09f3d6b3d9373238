"""Giving a rewritten graph what compile_fx expects of a Dynamo graph: example inputs, sources and marks."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from .. import _compat
from ..lowering.format import BLOCK_TOKENS
from ..lowering.layout import Layout
from ..patterns.graph.symbols import by_known_symbols
from ..patterns.rewriting.plan import Argument, Plan, Size
from .plain_inputs import PlainInputs

_CARRIED_META = ("tensor_dict", "grapharg", "example_value")
_STATIC_INPUT = {"_dynamo_static_input_type": "unguarded"}  # CUDA graphs may bind to the buffers' addresses


def add_calling_convention(plan: Plan, gm: GraphModule, given: PlainInputs) -> list[Any]:
    """Give the plan's module the metadata of ``gm``, which takes ``given``. Returns its example inputs."""
    originals = given.placeholders
    placeholders = [node for node in plan.module.graph.nodes if node.op == "placeholder"]
    examples = _Examples(plan, given)
    inputs = []
    for node, source in zip(placeholders, plan.inputs, strict=True):
        original = originals[source.index]
        inputs.append(examples.of(source))
        dynamo_source = getattr(original, "_dynamo_source", None)
        if isinstance(source, Argument):
            node.meta.update({k: original.meta[k] for k in _CARRIED_META if k in original.meta})
            if is_written(node):  # as the length of HF's static cache, which is marked only if made outside a graph
                node.meta["tensor_dict"] = node.meta.get("tensor_dict", {}) | _STATIC_INPUT
        elif not isinstance(source, Size):
            node.meta["tensor_dict"] = dict(_STATIC_INPUT)
            dynamo_source = (
                _compat.dynamo.AttrSource(dynamo_source, f"buffer_{source.place}")
                if dynamo_source is not None
                else None
            )
        node._dynamo_source = dynamo_source
    _carry_module_metadata(plan.module, gm)
    return inputs


def is_written(placeholder: Any) -> bool:
    """Whether a graph writes what its placeholder holds."""
    return any(
        user.target is torch.ops.aten.copy_.default and user.args[0] is placeholder for user in placeholder.users
    )


def _carry_module_metadata(module: GraphModule, gm: GraphModule) -> None:
    module.meta.update(gm.meta)
    sources = dict(getattr(gm, "_param_name_to_source", {}))
    for name, _ in (*module.named_parameters(), *module.named_buffers()):
        sources.setdefault(name, _compat.dynamo.ConstantSource(name))  # constants that tracing lifted
    module._param_name_to_source = sources  # type: ignore[assignment]


class _Examples:
    """Fake tensors for inputs that the original graph did not have."""

    def __init__(self, plan: Plan, given: PlainInputs) -> None:
        self.logical: list[Any] = [node.meta.get("example_value") for node in given.placeholders]
        self.given = given.values
        self.attached = {a.index: a for a in plan.attached}
        self.mode = _compat.dynamo.TracingContext.get().fake_mode
        self.growing_capacity: Any = None
        self.made: dict[int, list[torch.Tensor]] = {}

    def of(self, source: Any) -> Any:
        index = source.index
        if isinstance(source, Argument):
            return by_known_symbols(self.given[index])
        if isinstance(source, Size):
            return self.logical[index].shape[source.dim]
        if index not in self.made:
            self.made[index] = self._attached(index) if index in self.attached else self._compressed(index)
        return self.made[index][source.place]

    def _attached(self, index: int) -> list[torch.Tensor]:
        attached = self.attached[index]
        return self._buffers(index, attached.format, *attached.shape[:3])

    def _compressed(self, index: int) -> list[torch.Tensor]:
        cache, shape = self.given[index], self.logical[index].shape
        heads = shape[3 - cache.tokens_dim]
        return self._buffers(index, cache.format, shape[0], heads, self._capacity(index))

    def _capacity(self, index: int) -> Any:
        """By the blocks that Dynamo saw: a symbol where they may change.

        For growing caches that is one symbol, since the runtime grows all of them alike.
        """
        capacity = BLOCK_TOKENS * self.logical[index].extent.shape[0]
        if not self.given[index].grows:
            return capacity
        if self.growing_capacity is None:
            self.growing_capacity = capacity
        return self.growing_capacity

    def _buffers(self, index: int, format: Layout, batch: Any, heads: Any, capacity: Any) -> list[torch.Tensor]:
        like = self.logical[index]
        with self.mode:
            return [
                torch.empty(shape, dtype=dtype, device=like.device)
                for shape, dtype in format.shapes(batch, heads, capacity, like.dtype)
            ]
