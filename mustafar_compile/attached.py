"""Compressed state attached to dense caches that belong to the caller.

A cache that the caller allocates densely (HF's static cache with an eager prefill, a model's own buffers) stays as it
is and is kept up to date, so whoever else reads it reads right values. Decode attention reads the compressed state
attached to it. The dense tensor's version counter tells when somebody else wrote, and the state is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _compat
from .lowering import ops
from .lowering.layout import BUFFERS, Layout
from .patterns.plan import Attached


@dataclass
class AttachedState:
    """Buffers compressed from a dense cache, valid while the cache is at ``version``."""

    buffers: dict[str, Tensor]
    version: int = -1


_states: Any = _compat.WeakTensorKeyDictionary()


def find_state(dense: Tensor) -> AttachedState | None:
    """The state attached to ``dense``, if any."""
    return _states.get(dense)


def current_state(attached: Attached, arguments: Sequence[Any]) -> AttachedState:
    """The state for the dense cache among ``arguments``, compressed now where there is none or it is outdated."""
    dense = arguments[attached.index]
    batch = attached.batch if isinstance(attached.batch, int) else arguments[attached.batch.index]
    state = _states.get(dense)
    reusable = state is not None and _fits(state, attached, batch)
    if reusable and state.version == dense._version:
        return state
    position = attached.position(*arguments)
    tokens = torch.as_tensor(position, dtype=torch.int64, device=dense.device).reshape(1)
    rows = dense[:batch]
    rows = rows if attached.tokens_dim == 2 else rows.transpose(1, 2)
    buffers = ops.compress(rows, tokens, attached.kept, attached.window, rows.shape[2])
    if reusable:
        for mine, new in zip(state.buffers.values(), buffers, strict=True):  # addresses stay, for CUDA graphs
            mine.copy_(new)
        return state
    state = _states[dense] = AttachedState(dict(zip(BUFFERS, buffers, strict=True)))
    return state


def _fits(state: AttachedState, attached: Attached, batch: int) -> bool:
    layout = Layout.of_buffers(**state.buffers)
    return (state.buffers["values"].shape[0], layout.kept, layout.window) == (batch, attached.kept, attached.window)
