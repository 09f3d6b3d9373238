"""Symbolic numbers."""

from __future__ import annotations

from typing import Any

import torch


def symbolic_expression(size: torch.SymInt) -> Any:
    """The sympy expression of a symbolic size."""
    return size.node.expr


def hint(size: int | torch.SymInt) -> int:
    """The value that a symbolic size was traced with, without guarding on it."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def float_argument(value: Any) -> float | None:
    """The value of a float that Dynamo made symbolic, for which alone the graph is then; None for anything else."""
    return float(value) if isinstance(value, torch.SymFloat) and value.node.has_hint() else None
