"""Tensor subclasses without memory of their own: what they cannot hand out, and views that cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _compat
from ..errors import CompressedWriteError, NoMemoryError


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise NoMemoryError(
            f"{name} asks a compressed KV cache for its memory, but it has none in the dense form; accepted are torch "
            "ops, and cache.dense() for a dense copy"
        )

    return refuse


class WithoutMemory(Tensor):
    """Base of tensors that stand for values kept elsewhere. Asking for their memory is an error, not a null pointer."""

    data_ptr = _refused("data_ptr()")
    numpy = _refused("numpy()")
    tolist = _refused("tolist()")
    share_memory_ = _refused("share_memory_()")
    __dlpack__ = _refused("__dlpack__()")
    _no_storage = _refused("untyped_storage()")

    @classmethod
    def shaped(cls, shape: Any, strides: Any, dtype: torch.dtype, device: torch.device) -> Any:
        """A tensor of this class. strides: None for those of a contiguous one."""
        tensor = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=device)
        _compat.memory.forbid_data_pointer(tensor)
        return tensor

    def untyped_storage(self) -> torch.UntypedStorage:
        """Refused, but for Dynamo, which asks it for its size."""
        return self._no_storage() if _compat.dynamo.TracingContext.try_get() is None else super().untyped_storage()

    def _is_view(self) -> bool:
        """Never, for Dynamo: it would make a view of the base, of which this may be a part only."""
        return False

    @property
    def data(self) -> Tensor:
        """The same tensor, as ever."""
        return self.detach()

    @data.setter
    def data(self, new: Any) -> NoReturn:
        raise CompressedWriteError(".data of a compressed KV cache cannot be set; put the new tensor in its place")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copy = self.clone()
        return copy


class ReadOnlyView(WithoutMemory):
    """A view of decompressed values. Reading is right; writing would be lost, so it is refused."""

    held: Tensor

    @staticmethod
    def __new__(cls, dense: Tensor) -> ReadOnlyView:
        return cls.shaped(dense.shape, dense.stride(), dense.dtype, dense.device)

    def __init__(self, dense: Tensor) -> None:
        self.held = dense

    def __repr__(self) -> str:
        return repr(self.held)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return ReadOnlyView(inner["held"])

    @classmethod
    @_compat.dynamo.untraced
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        refuse_lost_writes(func, args, kwargs or {})
        result = func(*_compat.tensors.tree_map(_plain, args), **_compat.tensors.tree_map(_plain, kwargs or {}))
        return read_only(result) if is_view(func) else result


def _plain(x: Any) -> Any:
    return x.held if isinstance(x, ReadOnlyView) else x


def read_only(result: Any) -> Any:
    """The tensors of a result, each in a read-only view."""
    return _compat.tensors.tree_map(lambda x: ReadOnlyView(x) if isinstance(x, Tensor) else x, result)


def is_view(func: Any) -> bool:
    """Whether an op returns views of its arguments."""
    return any(r.alias_info is not None for r in func._schema.returns) and not func._schema.is_mutable


def refuse_lost_writes(func: torch._ops.OpOverload, args: Any, kwargs: Any) -> None:
    """Raise where ``func`` writes into a compressed cache or a view of one."""
    for target in _compat.tensors.written(func, args, kwargs):
        if isinstance(target, ReadOnlyView):
            raise CompressedWriteError(
                f"{func} would write through a view of a compressed KV cache, and the write would be lost. Write "
                "into a dense copy (cache.dense()) instead"
            )
        if isinstance(target, WithoutMemory):
            raise CompressedWriteError(
                f"{func} cannot write into a compressed KV cache; accepted are zero_ and, on a static cache, "
                "index_copy_ along the tokens"
            )
