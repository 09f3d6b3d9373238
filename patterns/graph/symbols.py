"""Sizes that may be symbolic. Comparing them adds no guards."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from mustafar_compile import _compat


def expression(size: Any) -> sympy.Expr | None:
    """The size as a sympy expression: of an int, a SymInt, or a node that holds one. None where it is neither."""
    if isinstance(size, Node):
        size = size.meta.get("val")
    if isinstance(size, torch.SymInt):
        return sympy.expand(_compat.symbols.symbolic_expression(size))
    return sympy.Integer(size) if isinstance(size, int) else None


def same_size(a: Any, b: Any) -> bool:
    """True where both sizes are known to be equal for every value of their symbols."""
    left, right = expression(a), expression(b)
    return left is not None and right is not None and left == right


def known(size: int | torch.SymInt) -> int:
    """The value of a size that the graph is made for. Where it is symbolic, Dynamo guards on it from now on."""
    return int(size)


def by_known_symbols(value: Any) -> Any:
    """A symbolic size by the symbols that Dynamo knows it as by now; anything else as it is."""
    return value + 0 if isinstance(value, torch.SymInt) else value


def guard_equal(a: torch.SymInt, b: torch.SymInt) -> None:
    """Let Dynamo guard on two sizes being equal, as they are now."""
    bool(a == b)
