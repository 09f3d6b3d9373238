"""Storages, and how tensors hold them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .probe import probe

StorageWeakRef = probe("torch.multiprocessing.reductions", "StorageWeakRef")
_storage_uses: Callable[[int], int] = probe("torch._C", "_storage_Use_Count")
_swap_tensors: Callable[[torch.Tensor, torch.Tensor], None] = probe("torch._C", "_swap_tensor_impl")
forbid_data_pointer: Callable[[torch.Tensor], None] = probe("torch._C", "_set_throw_on_mutable_data_ptr")


def storage_number(tensor: torch.Tensor) -> int:
    """A number of the storage of ``tensor``, which no other has as long as there is a ``StorageWeakRef`` to it."""
    return tensor.untyped_storage()._cdata


def is_alone_in_memory(tensor: torch.Tensor) -> bool:
    """Whether no other tensor holds the storage of ``tensor``."""
    return _storage_uses(tensor.untyped_storage()._cdata) == 2  # the tensor's and that of the storage as Python sees it


def give_version_counter(tensor: torch.Tensor) -> None:
    """Make ``tensor``, which was made in inference mode, one with a version counter, over the same memory.

    Raises RuntimeError where C++ holds the tensor.
    """
    with torch.inference_mode(False):
        twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        twin.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    _swap_tensors(tensor, twin)


# Builds of torch without CUDA lack what the next two need, so that is probed only then.


def is_allocated_by_torch(storage: torch.UntypedStorage) -> bool:
    """Whether the CUDA memory of ``storage`` comes from torch's allocator."""
    return probe("torch._C", "_has_Standard_Deleter")(storage._cdata)


def free_storage(storage: torch.UntypedStorage, message: str) -> None:
    """Free the CUDA memory of ``storage``. Every later access to it raises RuntimeError with ``message``."""
    free = probe("torch._C", "_free_And_Remove_DeleterFn")
    forbid = probe("torch._C", "_set_storage_data_ptr_access_error_msg")
    free(storage._cdata)
    forbid(storage._cdata, message)
