"""Compressed state attached to dense caches that belong to the caller.

A cache that the caller allocates densely (HF's static cache with an eager prefill, a model's own buffers) stays as it
is and is kept up to date, so whoever else reads it reads right values. Decode attention reads the compressed state
attached to it. The dense tensor's version counter tells when somebody else wrote, and the state is made anew. A tensor
of inference mode has none and is given one.

States are tied to the memory, not to the tensor that views it: one tensor may hold the caches of all layers, and a view
of it be made anew at each step. All views of a tensor count versions together.

Where ``release_dense`` asks for it, the dense memory is given back and the attached state is all that there is.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from ..errors import ReleaseError
from ..lowering import ops
from ..lowering.layout import Layout
from ..patterns.rewriting.plan import Attached
from ..reporting.notices import notify, notify_blind
from .memory import Place, overlap, place_of
from .release import is_released, release

_NAME = "_mustafar_states"  # of an attribute of a storage


@dataclass
class AttachedState:
    """Buffers of a format, compressed from a dense cache. valid: whether they hold what the cache holds."""

    format: Layout
    buffers: list[Tensor]
    valid: bool = True


@dataclass
class States:
    """The states of all dense caches in one storage, which do not overlap.

    version: of the tensors there, at which those that are valid are so.
    """

    version: object
    by_place: dict[Place, AttachedState] = field(default_factory=dict)

    @staticmethod
    def known(dense: Tensor) -> States | None:
        """Those in the storage of ``dense`` as they are, None where there were never any."""
        return getattr(dense.untyped_storage(), _NAME, None)

    @classmethod
    def beside(cls, dense: Tensor) -> States:
        """Those in the storage of ``dense``; none is valid any more where somebody else wrote."""
        states, version = cls.known(dense), version_of(dense)
        if states is None:
            states = cls(version)
            setattr(dense.untyped_storage(), _NAME, states)
        elif states.version != version:
            states.version = version
            for state in states.by_place.values():
                state.valid = False
        return states

    def add(self, place: Place, state: AttachedState) -> AttachedState:
        """Put ``state`` where it takes the place of all that overlap it."""
        self.by_place = {other: kept for other, kept in self.by_place.items() if not overlap(place, other)}
        self.by_place[place] = state
        return state


def find_state(dense: Tensor) -> AttachedState | None:
    """The state attached to the memory of ``dense``, if any."""
    states = States.known(dense)
    return None if states is None else states.by_place.get(place_of(dense))


class StateFinder:
    """Finds the state of one attached cache at each call. A step after a step has the same, and there are many."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self.latest: tuple[weakref.ref[Tensor], weakref.ref[States], weakref.ref[AttachedState]] | None = None

    def __call__(self, arguments: Sequence[Any]) -> AttachedState:
        """As ``current_state``."""
        dense: Tensor = arguments[self.attached.index]
        if self.latest is not None and self.latest[0]() is dense:
            states, state = self.latest[1](), self.latest[2]()
            if states is not None and state is not None and self._holds(dense, states, state):
                return state
        state = current_state(self.attached, arguments)
        if isinstance(self.attached.batch, int):
            self.latest = weakref.ref(dense), weakref.ref(States.beside(dense)), weakref.ref(state)
        return state

    def _holds(self, dense: Tensor, states: States, state: AttachedState) -> bool:
        if self.attached.releases:
            return is_released(dense)
        return state.valid and states.version == version_of(dense)

    def keep(self, arguments: Sequence[Any]) -> None:
        """What a step wrote is in the state, too."""
        dense = arguments[self.attached.index]
        states = States.known(dense)
        assert states is not None, "the step took one of them"
        states.version = version_of(dense)


def current_state(attached: Attached, arguments: Sequence[Any]) -> AttachedState:
    """The state for the dense cache among ``arguments``, compressed now where there is none or it is outdated.

    Raises ReleaseError where the cache was released and its state is not what is needed, or cannot be released.
    """
    dense = arguments[attached.index]
    batch = attached.batch if isinstance(attached.batch, int) else arguments[attached.batch.index]
    if dense.is_inference() and not attached.releases:
        _watch(dense)
    states, place = States.beside(dense), place_of(dense)
    state = states.by_place.get(place)
    if state is not None and not _fits(state, attached, batch):
        state = None
    if is_released(dense):
        if state is None or not attached.releases:
            raise ReleaseError(
                "a KV cache whose dense memory was given back is used through another tensor, or by a step compiled "
                "without release_dense or with another sparsity or window; accepted are the tensor and the settings "
                "with which it was compressed. Take a new cache"
            )
        return state
    if state is None or attached.releases or not state.valid:
        buffers = _compress(dense[:batch], attached, arguments)
        if state is None:
            state = states.add(place, AttachedState(attached.format, buffers))
        else:
            _renew(state, buffers)
    if attached.releases:
        release(dense)
    return state


def is_watchable(dense: Tensor) -> bool:
    """Whether writes into ``dense`` can be noticed."""
    return not dense.is_inference() or _compat.memory.is_alone_in_memory(dense)


def version_of(dense: Tensor) -> object:
    """What changes with each write. Ever another one where writes are not counted."""
    return object() if dense.is_inference() else dense._version


def _watch(dense: Tensor) -> None:
    """Let writes into a tensor of inference mode be counted, which no other tensor may make."""
    if is_watchable(dense):
        _compat.memory.give_version_counter(dense)
    else:
        notify("a KV cache is compressed anew at each step, since it was made in inference mode and shares its memory")


def _compress(dense: Tensor, attached: Attached, arguments: Sequence[Any]) -> list[Tensor]:
    if attached.blind:
        notify_blind()
    position = attached.position(*arguments)
    tokens = torch.as_tensor(position, dtype=torch.int64, device=dense.device).reshape(-1)
    rows = dense if attached.tokens_dim == 2 else dense.transpose(1, 2)
    return ops.compress(rows, tokens, attached.format.encode(), rows.shape[2])


def _renew(state: AttachedState, buffers: Sequence[Tensor]) -> None:
    """Give ``state`` other contents at the same addresses, to which CUDA graphs are bound."""
    for mine, new in zip(state.buffers, buffers, strict=True):
        mine.copy_(new)
    state.valid = True


def _fits(state: AttachedState, attached: Attached, batch: int) -> bool:
    return (state.format, state.buffers[0].shape[0]) == (attached.format, batch)
