"""Giving back the memory of dense caches that belong to the caller, where ``release_dense`` asks for it.

A released tensor keeps its shape and, in name, its storage, which refuses access. It is the storage that is marked: the
caller may give the tensor new memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _compat
from ..errors import ReleaseError

_RELEASED = (
    "mustafar: the dense memory of this KV cache was given back, as release_dense=True asks, and its tokens are held "
    "compressed. Only steps that the backend compiled and matched can use it. For anything else take a new cache, or "
    "compile without release_dense"
)

_MARK = "_mustafar_released"


def check_releasable(dense: Tensor) -> None:
    """Raise ReleaseError unless the memory of ``dense`` can be given back without a loss for any other tensor."""
    if is_released(dense):
        return
    if dense.device.type != "cuda":
        raise ReleaseError(
            f"release_dense frees CUDA memory only, and a KV cache is on {dense.device}; move the model and its cache "
            "to a CUDA device, or leave release_dense out"
        )
    storage, own = dense.untyped_storage(), dense.numel() * dense.element_size()
    if storage.nbytes() != own or not dense.is_contiguous() or not _compat.memory.is_allocated_by_torch(storage):
        raise ReleaseError(
            "release_dense takes caches that are contiguous, allocated by torch and alone in their memory; given is "
            f"one of {own} bytes with strides {dense.stride()} in {storage.nbytes()} bytes of memory. Allocate K and V "
            "of each layer on their own, or leave release_dense out"
        )


def is_released(dense: Tensor) -> bool:
    """Whether the memory of ``dense`` was given back, and the caller has not put new memory in its place."""
    return getattr(dense.untyped_storage(), _MARK, False)


def release(dense: Tensor) -> None:
    """Give back the memory of ``dense``. From then on whatever touches it, views of it included, raises.

    Raises ReleaseError, with nothing lost, as ``check_releasable`` does.
    """
    check_releasable(dense)
    dense.record_stream(torch.cuda.current_stream(dense.device))  # which may still read what is to be reused
    storage = dense.untyped_storage()
    _compat.memory.free_storage(storage, _RELEASED)
    setattr(storage, _MARK, True)
