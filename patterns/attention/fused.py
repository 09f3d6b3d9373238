"""Attention that is one op of the graph."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from .attention import Attention
from .operand import Operand

aten = torch.ops.aten
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}


def read_sdpa(node: Node) -> Attention:
    query, key, value = node.args[:3]
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False))
    options = _DEFAULTS | given | dict(node.kwargs)
    scale = options["scale"]
    if scale is None:
        scale = 1.0 / math.sqrt(query.meta["val"].shape[-1])
    return Attention(
        node,
        query,
        Operand.of(key, query),
        Operand.of(value, query),
        key_reader=node,
        scale=float(scale),
        mask=options["attn_mask"],
        is_causal=options["is_causal"],
        problem=_sdpa_problem(query, options["dropout_p"]),
    )


def _sdpa_problem(query: Node, dropout: float) -> str | None:
    if query.meta["val"].dim() != 4:
        return f"the query has {query.meta['val'].dim()} dimensions; accepted are [B, H, L, D]"
    return "dropout is active; call model.eval()" if dropout else None
