"""The memory that generating takes, as formulas of batch and context, and what fits into a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ..lowering.format import grown_capacity
from ..lowering.layout import Layout
from ..policy import FormatOf, check_layers, policy
from ..settings import read_options
from .footprint import BATCH, CONTEXT, CacheTensor, Footprint

WORKSPACES = 2 * 32 * 2**20
"""Of cuBLAS on an NVIDIA GPU of compute capability 9.0, 32 MiB a stream. CUDA graphs are recorded on their own."""

OUTSIDE = 600 * 2**20
"""Bytes that are left for CUDA and the code on the GPU, which torch's allocator does not see. Assumed, not measured."""

_GPU = torch.device("cuda")


@dataclass(frozen=True)
class Plan:
    """The memory of one way to generate.

    phases: "prompt" and "steps", each with its parts in bytes, by ``BATCH`` and ``CONTEXT``. What torch allocates at
    most is the larger of their sums.
    """

    phases: Mapping[str, Mapping[str, sympy.Expr]]

    def formulas(self) -> dict[str, dict[str, str]]:
        """Each part of each phase as a text."""
        return {phase: {name: str(part) for name, part in parts.items()} for phase, parts in self.phases.items()}

    def parts(self, batch: int, context: int) -> dict[str, dict[str, int]]:
        """Bytes of each part of each phase."""
        at = {BATCH: batch, CONTEXT: context}
        return {
            phase: {name: int(sympy.sympify(part).subs(at)) for name, part in parts.items()}
            for phase, parts in self.phases.items()
        }

    def peak(self, batch: int, context: int) -> int:
        """The most bytes that torch allocates."""
        return int(max(needed(batch, context) for needed in self._sums))

    def largest_batch(self, context: int, memory: int) -> int:
        """The most rows of ``context`` tokens that fit into ``memory`` bytes of a GPU; 0 where none does.

        Each phase is linear in the batch, or the largest of what is.
        """
        rows = sympy.Dummy("rows", real=True)  # where a phase takes all memory that is no whole number
        sums = [sum(parts.values()).subs({CONTEXT: context, BATCH: rows}) for parts in self.phases.values()]
        linear = [sympy.Poly(y, rows).all_coeffs() for x in sums for y in _alternatives(x)]
        return max(0, min(int((memory - OUTSIDE - fixed) // of_a_row) for of_a_row, fixed in linear))

    def largest_context(self, batch: int, memory: int, most: int | None = None) -> int:
        """The longest prompts, ``batch`` of them, that fit into ``memory`` bytes of a GPU, up to ``most``.

        Found by halving: lengths are rounded up to blocks, and memory only grows with them.
        """
        return _largest(lambda tokens: self.peak(batch, tokens) + OUTSIDE <= memory, most or 2**30)

    @functools.cached_property
    def _sums(self) -> list[Callable[[int, int], float]]:
        """What each phase takes, as functions of batch and context."""
        return [sympy.lambdify([BATCH, CONTEXT], sum(parts.values()), "math") for parts in self.phases.values()]


def dense_plan(footprint: Footprint, new_tokens: int) -> Plan:
    """Of a dense static cache, with a prompt that runs as it is."""
    row = sum(_dense_row(x, CONTEXT + new_tokens) for x in footprint.tensors)
    return _plan(footprint, footprint.prompt, row, row, 0)


def compressed_plan(footprint: Footprint, options: Mapping[str, Any], new_tokens: int) -> Plan:
    """Of a growing, compressed cache, with a compiled prompt: ``model.compile(backend="mustafar", options=options)``.

    Raises ValueError for unknown options, and UnknownLayerError for such as name a layer that the model does not have,
    or give none to one that it has.
    """
    settings, _ = read_options(None, options)
    check_layers(settings, footprint.layers)
    rows = [_rows(x, policy(settings), new_tokens) for x in footprint.tensors]
    before, after = (sum(row[i] for row in rows) for i in (0, 1))
    moving = sympy.Max(0, *(last for first, last in rows if last != first))  # a buffer that grows stands twice
    grown = sympy.Piecewise((moving, sympy.Gt(after, before)), (0, True))
    return _plan(footprint, footprint.compiled_prompt, before, after, grown)


def _plan(footprint: Footprint, prompt: sympy.Expr, before: Any, after: Any, growing: Any) -> Plan:
    """before, after: bytes of a row of the cache after the prompt and after the last step. growing: to make it grow."""
    standing = {"weights": sympy.Integer(footprint.weights), "workspaces": sympy.Integer(WORKSPACES)}
    return Plan(
        {
            "prompt": standing | {"cache": BATCH * before, "activations": prompt},
            "steps": standing | {"cache": BATCH * after, "activations": footprint.step, "growing": BATCH * growing},
        }
    )


def _alternatives(total: sympy.Expr) -> list[sympy.Expr]:
    """The expressions of which ``total`` is the largest."""
    largest = next(iter(total.atoms(sympy.Max)), None)
    return [total] if largest is None else [y for x in largest.args for y in _alternatives(total.subs(largest, x))]


def _dense_row(tensor: CacheTensor, tokens: Any) -> Any:
    kept = tokens if tensor.window is None else sympy.Min(tokens, tensor.window)
    return kept * tensor.token_bytes


def _rows(tensor: CacheTensor, format_of: FormatOf, new_tokens: int) -> tuple[Any, Any]:
    """Bytes of one row of the batch in a cache tensor, after the prompt and after the last step."""
    format = None
    if tensor.compressible:
        format = format_of(tensor.layer, tensor.role, tensor.heads, tensor.head_dim, tensor.dtype, _GPU)
    if format is None:
        return _dense_row(tensor, CONTEXT), _dense_row(tensor, CONTEXT + new_tokens)
    room = grown_capacity(CONTEXT)
    pruned = CONTEXT + new_tokens - format.window
    last = sympy.Piecewise((room, sympy.Le(pruned, room)), (grown_capacity(pruned), True))
    return _stored_row(tensor, format, room), _stored_row(tensor, format, last)


def _stored_row(tensor: CacheTensor, format: Layout, capacity: Any) -> Any:
    return format.stored_bytes(1, tensor.heads, capacity, tensor.dtype.itemsize)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number of 1 to ``most`` that fits, where all smaller ones do; 0 where none does."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
