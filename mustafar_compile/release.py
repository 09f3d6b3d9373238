"""Giving back the memory of dense caches that belong to the caller, where ``release_dense`` asks for it.

A released tensor keeps its shape, but its storage is empty and refuses access. So it is told by its storage.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _compat
from .errors import ReleaseError

_RELEASED = (
    "mustafar: the dense memory of this KV cache was given back, as release_dense=True asks, and its tokens are held "
    "compressed. Only steps that the backend compiled and matched can use it. For anything else take a new cache, or "
    "compile without release_dense"
)


def check_releasable(dense: Tensor) -> None:
    """Raise ReleaseError unless the memory of ``dense`` can be given back without a loss for any other tensor."""
    if is_released(dense):
        return
    if dense.device.type != "cuda":
        raise ReleaseError(
            f"release_dense frees CUDA memory only, and a KV cache is on {dense.device}; move the model and its cache "
            "to a CUDA device, or leave release_dense out"
        )
    held, own = dense.untyped_storage().nbytes(), dense.numel() * dense.element_size()
    if held != own or not dense.is_contiguous():
        raise ReleaseError(
            f"release_dense takes caches that are contiguous and alone in their memory; given is one of {own} bytes "
            f"with strides {dense.stride()} in an allocation of {held} bytes. Allocate K and V of each layer on their "
            "own, or leave release_dense out"
        )


def is_released(dense: Tensor) -> bool:
    """Whether the memory of ``dense`` was given back."""
    return dense.numel() > 0 and dense.untyped_storage().nbytes() == 0


def release(dense: Tensor) -> None:
    """Give back the memory of ``dense``. From then on whatever touches it, views of it included, raises.

    Raises ReleaseError, with nothing lost, as ``check_releasable`` does.
    """
    check_releasable(dense)
    dense.record_stream(torch.cuda.current_stream(dense.device))  # which may still read what is to be reused
    storage = dense.untyped_storage()
    storage.resize_(0)
    _compat.forbid_storage(storage, _RELEASED)
    storage.__deepcopy__ = _refuse_copy  # type: ignore[method-assign]


def _refuse_copy(memo: dict[int, Any]) -> NoReturn:
    """A copy of no bytes touches nothing, and torch would fill it up with whatever the allocator gives."""
    raise ReleaseError(_RELEASED)
