"""Compressed state attached to dense caches that belong to the caller.

A cache that the caller allocates densely (HF's static cache with an eager prefill, a model's own buffers) stays as it
is and is kept up to date, so whoever else reads it reads right values. Decode attention reads the compressed state
attached to it. The dense tensor's version counter tells when somebody else wrote, and the state is made anew.

Where ``release_dense`` asks for it, the dense memory is given back and the attached state is all that there is.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from ..errors import ReleaseError
from ..lowering import ops
from ..lowering.format import Format
from ..patterns.rewriting.plan import Attached
from .release import is_released, release


@dataclass
class AttachedState:
    """Buffers of a format, compressed from a dense cache and valid while the cache is at ``version``."""

    format: Format
    buffers: list[Tensor]
    version: int = -1


_states: Any = _compat.WeakTensorKeyDictionary()


def find_state(dense: Tensor) -> AttachedState | None:
    """The state attached to ``dense``, if any."""
    return _states.get(dense)


class StateFinder:
    """Finds the state of one attached cache at each call. A step after a step has the same, and there are many."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self.latest: tuple[weakref.ref[Tensor], weakref.ref[AttachedState]] | None = None

    def __call__(self, arguments: Sequence[Any]) -> AttachedState:
        """As ``current_state``."""
        dense = arguments[self.attached.index]
        if self.latest is not None and self.latest[0]() is dense:
            state = self.latest[1]()
            if state is not None and self._holds(state, dense):
                return state
        state = current_state(self.attached, arguments)
        if isinstance(self.attached.batch, int):
            self.latest = weakref.ref(dense), weakref.ref(state)
        return state

    def _holds(self, state: AttachedState, dense: Tensor) -> bool:
        return is_released(dense) if self.attached.releases else state.version == dense._version


def current_state(attached: Attached, arguments: Sequence[Any]) -> AttachedState:
    """The state for the dense cache among ``arguments``, compressed now where there is none or it is outdated.

    Raises ReleaseError where the cache was released and its state is not what is needed, or cannot be released.
    """
    dense = arguments[attached.index]
    batch = attached.batch if isinstance(attached.batch, int) else arguments[attached.batch.index]
    state = _states.get(dense)
    fits = state is not None and _fits(state, attached, batch)
    if is_released(dense):
        if not (fits and attached.releases):
            raise ReleaseError(
                "a KV cache whose dense memory was given back is used through another tensor, or by a step compiled "
                "without release_dense or with another sparsity or window; accepted are the tensor and the settings "
                "with which it was compressed. Take a new cache"
            )
        return state
    if not fits or attached.releases or state.version != dense._version:
        buffers = _compress(dense[:batch], attached, arguments)
        state = _states[dense] = _renewed(state, buffers) if fits else AttachedState(attached.format, buffers)
    if attached.releases:
        release(dense)
    return state


def _compress(dense: Tensor, attached: Attached, arguments: Sequence[Any]) -> list[Tensor]:
    position = attached.position(*arguments)
    tokens = torch.as_tensor(position, dtype=torch.int64, device=dense.device).reshape(1)
    rows = dense if attached.tokens_dim == 2 else dense.transpose(1, 2)
    return ops.compress(rows, tokens, attached.format.encode(), rows.shape[2])


def _renewed(state: AttachedState, buffers: Sequence[Tensor]) -> AttachedState:
    """``state`` with other contents at the same addresses, to which CUDA graphs are bound."""
    for mine, new in zip(state.buffers, buffers, strict=True):
        mine.copy_(new)
    return state


def _fits(state: AttachedState, attached: Attached, batch: int) -> bool:
    return (state.format, state.buffers[0].shape[0]) == (attached.format, batch)
