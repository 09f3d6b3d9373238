"""What a step's queries make of the channels of K, on a GPU: one launch in place of ``OutputAware``'s PyTorch."""

from __future__ import annotations

import functools
import struct
from types import ModuleType

import torch
from torch import Tensor

from . import render
from .decode_step import with_rows
from .step import padded, power_of_two
from .strategies.answers import USABLE
from .strategies.output_aware import QUERIES, SLOTS


def weigh_queries(query: Tensor, position: Tensor, ring: Tensor) -> Tensor:
    """``OutputAware.of_step`` and then ``remember``: weights [B, H, L, D], and the ring takes the queries in."""
    (batch, heads, _, head_dim), (query_heads, queries) = ring.shape, query.shape[1:3]
    weights = torch.empty(batch, heads, queries, head_dim, dtype=torch.float32, device=ring.device)
    if weights.numel():
        weighing = weigher(head_dim, query_heads // heads, queries)
        query = with_rows(query)
        given = query, *query.stride()[:3], position, ring, weights, heads, position.stride(0)
        weighing.weigh[batch * heads,](*given, num_warps=warps_for(head_dim))
    return weights


def warps_for(head_dim: int) -> int:
    """So many that a thread's part of the ring, in float64, fits in its registers."""
    return max(4, padded(head_dim) // 16)


@functools.cache
def weigher(head_dim: int, group: int, queries: int) -> ModuleType:
    sizes = {"head_dim": head_dim, "padded": padded(head_dim), "group": group, "queries": queries}
    ring = {"slots": SLOTS, "slots_padded": power_of_two(SLOTS), "latest": QUERIES}
    bits = struct.unpack("2i", struct.pack("2f", *USABLE))
    return render.kernels("weigh_queries", **sizes, **ring, usable=bits)
