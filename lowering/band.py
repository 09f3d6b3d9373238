"""Attention of a prompt under a mask that is a band around the diagonal, less some columns. The mask is never whole.

It has a row for each query and a column for each key, so it would be what takes most memory of a long prompt, and
kernels that take masks are slower than those that are told that attention is causal.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from .masks import with_four_dims

_MOST_ROWS = 256
_FEWEST_ROWS = 64
_ELEMENTS = 2**26
"""Of the mask of a block of queries, as far as that leaves it the fewest rows."""


def band_limits(last: Tensor, first: Tensor | None, columns: Tensor | None) -> Tensor:
    """What of a band decides how to attend, on the host: see ``ops.band_limits``."""
    beginning, end = (torch.full_like(last, x, dtype=torch.int64) for x in (-sys.maxsize, sys.maxsize))
    left_out = end if columns is None else _first_left_out(columns)
    return torch.stack([last, beginning if first is None else first, left_out]).to("cpu")


def band_limits_traced(last: Tensor, first: Tensor | None, columns: Tensor | None) -> Tensor:
    """The shape of the result, when a graph is traced.

    So the op stays whole: Inductor would compute three numbers on the host by C++ of its own, and for its first C++ it
    tries out for half a minute what the processor has.
    """
    return torch.empty(3, dtype=torch.int64, device="cpu")


def _first_left_out(columns: Tensor) -> Tensor:
    """The first of the columns [..., S] that some row of the batch leaves out; S without one."""
    everywhere = with_four_dims(columns).flatten(0, 2).all(0)
    count = everywhere.shape[0]
    return torch.where(everywhere, count, torch.arange(count, device=columns.device)).amin()


def band_attention(
    query: Tensor, key: Tensor, value: Tensor, columns: Tensor | None, limits: Tensor, scale: float
) -> Tensor:
    """See ``ops.band_attention``."""
    last, first, left_out = limits.tolist()
    queries = query.shape[2]
    seen = min(max(queries + last, 1), key.shape[2])
    key, value = key[:, :, :seen], value[:, :, :seen]
    plain = left_out >= seen and first < 1 - queries and last == seen - queries >= 0
    if plain and (last == 0 or query.is_cuda):
        return _causal(query, key, value, scale).transpose(1, 2).contiguous()
    return _by_blocks(query, key, value, columns, last, first, scale)


def band_attention_traced(
    query: Tensor, key: Tensor, value: Tensor, columns: Tensor | None, limits: Tensor, scale: float
) -> Tensor:
    """The shape of the result, when a graph is traced."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The last query sees all keys, each one ahead of it a key less."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and not _flash_takes(query, key, value):
        key, value, grouped = _repeated(key, query), _repeated(value, query), False
    bias = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, bias, scale=scale, enable_gqa=grouped)


def _flash_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is a fast kernel on this GPU that does not ask for as many KV heads as query heads."""
    given = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, True)
    return torch.backends.cuda.can_use_flash_attention(given)


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values with a head for each query head."""
    group = query.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, 1)


def _by_blocks(
    query: Tensor, key: Tensor, value: Tensor, columns: Tensor | None, last: int, first: int, scale: float
) -> Tensor:
    """A block of queries at a time, over the keys that one of them sees, under a mask of these alone."""
    batch, heads, queries, _ = query.shape
    key, value = _repeated(key, query), _repeated(value, query)
    columns = None if columns is None else with_four_dims(columns).to(query.device)
    out = query.new_empty(batch, queries, heads, value.shape[3])
    rows = min(max(_ELEMENTS // (batch * key.shape[2]), _FEWEST_ROWS), _MOST_ROWS)
    for start in range(0, queries, rows):
        end = min(start + rows, queries)
        stop = min(max(end + last, 1), key.shape[2])
        begin = min(max(start + first + 1, 0), stop - 1)
        at = torch.arange(start, end, device=query.device).unsqueeze(1)
        seen = torch.arange(begin, stop, device=query.device)
        mask = (seen <= at + last) & (seen > at + first)
        if columns is not None:
            mask = mask & (columns if columns.shape[3] == 1 else columns[..., begin:stop])
        given = query[:, :, start:end], key[:, :, begin:stop], value[:, :, begin:stop]
        out[:, start:end] = F.scaled_dot_product_attention(*given, mask, scale=scale).transpose(1, 2)
    return out
