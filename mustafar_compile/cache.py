"""``CompressedKV``: a tensor that stands for K or V of one layer and holds it compressed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import _compat
from .errors import CompressedWriteError, StaleCacheError
from .lowering import ops
from .lowering.layout import BLOCK_TOKENS, BUFFERS, Layout, blocks_for, grown_capacity

aten = torch.ops.aten
_reported: set[str] = set()


class _History:
    """Tokens written so far, known on the host, shared by all handles of one growing cache."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of plain tensors; one that several share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _with_blocks(buffer: Tensor, blocks: int) -> Tensor:
    """``buffer`` [B, H, N, ...] with zeros behind, up to ``blocks`` blocks."""
    spare = blocks - buffer.shape[2]
    return torch.nn.functional.pad(buffer, (*(0, 0) * (buffer.dim() - 3), 0, spare))


class CompressedKV(Tensor):
    """A cache tensor of logical shape [B, H, S, D] over the buffers that ``lowering.layout`` describes.

    It has the shape, dtype and device of the dense tensor and stands wherever a model keeps its K or V. The backend
    works on the buffers; any other op decompresses (with one warning for each op) and reads right values. Writes
    from outside are honoured for ``index_copy_`` and ``zero_`` and refused otherwise.

    A growing cache (``grows``) is a handle: a decode step returns a longer handle of the same buffers, and the
    shorter one can be read but no longer extended.
    """

    values: Tensor
    bitmap: Tensor
    window: Tensor
    counts: Tensor
    row_layout: Layout
    grows: bool
    history: _History

    @staticmethod
    def __new__(cls, values, bitmap, window, counts, layout, grows, size, stride=None):
        _, heads, tokens, head_dim = size
        stride = stride or (heads * tokens * head_dim, tokens * head_dim, head_dim, 1)
        return Tensor._make_wrapper_subclass(cls, size, strides=stride, dtype=window.dtype, device=window.device)

    def __init__(self, values, bitmap, window, counts, layout, grows, size, stride=None):
        self.values, self.bitmap, self.window, self.counts = values, bitmap, window, counts
        self.row_layout, self.grows = layout, grows

    @classmethod
    def from_buffers(cls, buffers: list[Tensor], tokens: int, grows: bool) -> CompressedKV:
        """A new cache over ``buffers`` with ``tokens`` tokens (a growing cache) or room for them (a static one)."""
        layout, values = Layout.of_buffers(*buffers), buffers[0]
        size = (*values.shape[:2], tokens, layout.head_dim)
        cache = cls(*buffers, layout, grows, size)
        cache.history = _History(tokens)
        return cache._with_marks()

    @classmethod
    def from_dense(cls, dense: Tensor, sparsity: float, window: int, tokens: int | None = None) -> CompressedKV:
        """Compress a dense [B, H, S, D] of which ``tokens`` are written (default: all, and the cache can grow)."""
        layout = Layout.of(dense.shape[3], sparsity, window)
        grows = tokens is None
        length = dense.shape[2]
        capacity = grown_capacity(length) if grows else length
        written = torch.tensor([length if tokens is None else tokens], device=dense.device)
        buffers = ops.compress(dense, written, layout.kept, layout.window, capacity)
        return cls.from_buffers(list(buffers), length, grows)

    @property
    def buffers(self) -> list[Tensor]:
        """values, bitmap, window, counts."""
        return [getattr(self, name) for name in BUFFERS]

    @property
    def stored_bytes(self) -> int:
        """Bytes that the buffers really take."""
        return storage_bytes(self.buffers)

    def dense(self) -> Tensor:
        """The dense tensor that this stands for: pruned elements and unwritten tokens are zero."""
        return ops.decompress(*self.buffers, self.shape[2])

    def check_latest(self) -> None:
        """Raise StaleCacheError if this handle was extended before."""
        if self.grows and self.history.tokens != self.shape[2]:
            raise StaleCacheError(
                f"this cache of {self.shape[2]} tokens was already extended to {self.history.tokens}: its window has "
                "moved on. To continue one past in several ways, copy.deepcopy it first"
            )

    def extended(self, count: int) -> CompressedKV:
        """The handle after ``count`` more tokens were written into the buffers."""
        self.history.tokens = self.shape[2] + count
        cache = CompressedKV(
            *self.buffers, self.row_layout, True, (*self.shape[:2], self.history.tokens, self.shape[3])
        )
        cache.history = self.history
        return cache._with_marks()

    def prepare(self, count: int) -> None:
        """Make room for ``count`` more tokens. Raises StaleCacheError if this handle was extended before."""
        if not self.grows:
            return
        self.check_latest()
        needed = self.shape[2] + count - self.row_layout.window
        if needed > self.capacity:
            self.reserve(grown_capacity(needed))

    @property
    def capacity(self) -> int:
        """Tokens that the compressed part has room for."""
        return BLOCK_TOKENS * self.values.shape[2]

    def reserve(self, capacity: int) -> None:
        """Grow to room for ``capacity`` tokens."""
        blocks = blocks_for(capacity)
        self.values, self.bitmap = _with_blocks(self.values, blocks), _with_blocks(self.bitmap, blocks)

    def _with_marks(self) -> CompressedKV:
        """Tell Dynamo which sizes change from call to call, so that it compiles for any."""
        if self.grows:
            for tensor in (self, self.values, self.bitmap):
                _compat.maybe_mark_dynamic(tensor, 2)
        return self

    def _mapped(self, change: Any) -> CompressedKV:
        """A copy with ``change`` applied to each buffer."""
        cache = CompressedKV(*map(change, self.buffers), self.row_layout, self.grows, self.shape)
        cache.history = _History(self.history.tokens)
        return cache._with_marks()

    def __tensor_flatten__(self):
        return list(BUFFERS), (self.row_layout, self.grows)

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return CompressedKV(*(inner[name] for name in BUFFERS), *context, outer_size, outer_stride)

    def __repr__(self) -> str:
        kept = f"{self.row_layout.kept} of {self.row_layout.head_dim} kept"
        return f"CompressedKV(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {kept})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, CompressedKV):
            if func in (aten.detach.default, aten.alias.default):
                return _compat.return_and_correct_aliasing(func, args, kwargs, first._alias())
            if isinstance(first.window, _compat.FakeTensor):  # while Dynamo traces: only shapes matter
                if func._schema.is_mutable:
                    return first
            elif func is aten.clone.default:
                return first._mapped(torch.clone)
            elif func is aten._to_copy.default and kwargs.get("dtype", first.dtype) in (None, first.dtype):
                device = kwargs.get("device") or first.device
                return first._mapped(lambda buffer: buffer.to(device, copy=True))
            elif func is aten.zero_.default:
                return _zero(first)
            elif func is aten.index_copy_.default and args[1] in (2, -2) and not first.grows:
                return _index_copy(first, func, args, kwargs)
        _refuse_lost_writes(func, args, kwargs)
        return _on_dense(func, args, kwargs)

    def _alias(self) -> CompressedKV:
        alias = CompressedKV(*self.buffers, self.row_layout, self.grows, self.shape, self.stride())
        if hasattr(self, "history"):
            alias.history = self.history
        return alias


class _ReadOnlyView(Tensor):
    """A view of decompressed values. Reading is right; writing would be lost, so it is refused."""

    @staticmethod
    def __new__(cls, dense):
        return Tensor._make_wrapper_subclass(
            cls, dense.shape, strides=dense.stride(), dtype=dense.dtype, device=dense.device
        )

    def __init__(self, dense):
        self.held = dense

    def __repr__(self) -> str:
        return repr(self.held)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        _refuse_lost_writes(func, args, kwargs or {})
        result = func(*_compat.tree_map(_plain, args), **_compat.tree_map(_plain, kwargs or {}))
        return _compat.tree_map(_read_only, result) if _is_view(func) else result


def _plain(x: Any) -> Any:
    return x.held if isinstance(x, _ReadOnlyView) else x


def _read_only(x: Any) -> Any:
    return _ReadOnlyView(x) if isinstance(x, Tensor) else x


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns) and not func._schema.is_mutable


def _on_dense(func: Any, args: Any, kwargs: Any) -> Any:
    """Run any other op on decompressed values."""
    fake = [False]

    def expand(x: Any) -> Any:
        if not isinstance(x, CompressedKV):
            return x
        if isinstance(x.window, _compat.FakeTensor):
            fake[0] = True
            return x.window.new_empty(x.shape)
        _warn_once(func)
        return x.dense()

    args, kwargs = _compat.tree_map(expand, args), _compat.tree_map(expand, kwargs)
    result = func(*args, **kwargs)
    return _compat.tree_map(_read_only, result) if _is_view(func) and not fake[0] else result


def _zero(cache: CompressedKV) -> CompressedKV:
    """All zeros: of as many tokens where the cache grows, of none where it is static (HF resets its cache so)."""
    for buffer in cache.buffers[:-1]:
        buffer.zero_()
    if not cache.grows:
        cache.counts.zero_()
    return cache


def _index_copy(cache: CompressedKV, func: Any, args: Any, kwargs: Any) -> CompressedKV:
    """New tokens in a static cache; what lay behind them is not written any more."""
    _warn_once(func)
    dense, position = cache.dense(), args[2]
    func(dense, *args[1:], **kwargs)
    tokens = position.max().reshape(1) + 1
    packed = ops.compress(dense, tokens, cache.row_layout.kept, cache.row_layout.window, cache.capacity)
    for mine, new in zip(cache.buffers, packed, strict=True):
        mine.copy_(new)
    return cache


def _refuse_lost_writes(func: Any, args: Any, kwargs: Any) -> None:
    """Raise where ``func`` writes into a compressed cache or a view of one."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        for target in given if isinstance(given, list | tuple) else [given]:
            if isinstance(target, _ReadOnlyView):
                raise CompressedWriteError(
                    f"{func} would write through a view of a compressed KV cache, and the write would be lost. Write "
                    "into a dense copy (cache.dense()) instead"
                )
            if isinstance(target, CompressedKV):
                raise CompressedWriteError(
                    f"{func} cannot write into a compressed KV cache; accepted are zero_ and, on a static cache, "
                    "index_copy_ along dimension 2"
                )


def _warn_once(func: Any) -> None:
    name = str(func)
    if name not in _reported:
        _reported.add(name)
        warnings.warn(
            f"mustafar: {name} runs on a compressed KV cache outside the compiled graphs, which decompresses it",
            stacklevel=4,
        )
