"""``CompressedKV``: a tensor that stands for K or V of one layer and holds it compressed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _compat
from ..errors import ForeignCompilerError
from ..lowering import ops, portable
from ..lowering.buffers import CACHE_DTYPES, blocks_for
from ..lowering.format import CHUNK, Format, grown_capacity, order_for
from ..lowering.head_groups import decode
from ..lowering.layout import Layout
from .growth import Form, Handle, extent_of
from .lineage import Branch
from .untrusted import check_saved

_SHOWN = ["extent"]
"""Names of the tensors that Dynamo sees in a cache."""


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that plain tensors take of their storages: of one that several share, no more than there are."""
    taken, there = Counter[int](), {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        taken[storage.data_ptr()] += tensor.nbytes
        there[storage.data_ptr()] = storage.nbytes()
    return sum(min(size, there[address]) for address, size in taken.items())


class CompressedKV(Handle):
    """A cache tensor of logical shape [B, H, S, D] over the buffers that ``lowering.format`` describes.

    Or [B, S, H, D], where the model keeps it so: ``tokens_dim``, 2 or 1, is the dimension of the tokens.

    It has the shape, dtype and device of the dense tensor and stands wherever a model keeps its K or V. The backend
    works on the buffers, and so do copies, moves and selections along the batch (``dispatch``); any other op
    decompresses (with one warning for each op) and reads right values. Writes from outside are honoured for
    ``index_copy_`` and ``zero_`` and refused otherwise.

    A growing cache (``grows``) is a handle: a decode step returns a longer handle of the same buffers, and the
    shorter one can be read but no longer extended. ``cache[:, :, :n]`` (in [B, S, H, D] ``cache[:, :n]``) is a shorter
    handle that may be extended: the tokens behind it are given up then, and StaleCacheError is raised where a longer
    handle is used after that.
    """

    dispatch: ClassVar[Callable[[Any, Any, Any], Any]]
    """Carries out torch's ops; set by the module of that name."""

    buffers: tuple[Tensor, ...]
    """Those of the format, which all handles of a growing cache share. None: see ``has_only_a_shape``."""
    writable: bool = True

    @staticmethod
    def __new__(cls, buffers, form, extent, size, stride=None):
        return cls.shaped(size, stride, form.dtype, form.device)

    def __init__(self, buffers, form, extent, size, stride=None):
        self.buffers, self.form, self.extent = buffers, form, extent
        self.format, self.grows, self.tokens_dim, *_ = form
        self._flattened = _SHOWN, form
        self.tokens, self.cropped = size[self.tokens_dim], False

    @classmethod
    def from_buffers(
        cls, format: Layout, buffers: Iterable[Tensor], tokens: int, grows: bool, tokens_dim: int = 2
    ) -> CompressedKV:
        """A new cache over ``buffers`` with ``tokens`` tokens (a growing cache) or room for them (a static one)."""
        buffers = tuple(buffers)
        window, heads = format.window_of(buffers), format.heads_of(buffers)
        batch, _, _, head_dim = window.shape
        size = (batch, heads, tokens, head_dim) if tokens_dim == 2 else (batch, tokens, heads, head_dim)
        form = Form(format, grows, tokens_dim, window.dtype, window.device)
        cache = cls(buffers, form, extent_of(blocks_for(format.capacity_of(buffers)), grows), size)
        cache.branch = Branch(tokens)
        if grows:
            _compat.dynamo.maybe_mark_dynamic(cache, tokens_dim)
        return cache

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        sparsity: float,
        window: int,
        tokens: int | None = None,
        code: str = "none",
        strategy: str = "magnitude",
        queries: Tensor | None = None,
    ) -> CompressedKV:
        """Compress a dense [B, H, S, D] of which ``tokens`` are written (default: all, and the cache can grow).

        dense: float32, float16 or bfloat16, D a multiple of 8. sparsity: in [0, 1). window: at least 1. code: how kept
        elements are stored, one of ``lowering.format.CODES``. strategy: one of ``lowering.strategies.STRATEGIES``.
        queries: of keys, those of the last n tokens as attention sees them, [B, Hq, n, D] with Hq a multiple of H; not
        every strategy wants them. Raises ValueError for anything else.
        """
        _check_dense(dense, tokens)
        _check_queries(dense, queries)
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity!r} is not accepted; it must be a number in [0, 1)")
        format = Format.of(dense.shape[3], sparsity, window, order_for(dense.device), code, strategy)
        grows = tokens is None
        length = dense.shape[2]
        capacity = grown_capacity(length) if grows else length
        written = torch.tensor([length if tokens is None else tokens], device=dense.device)
        buffers = ops.compress(dense, written, format.encode(), capacity, queries)
        return cls.from_buffers(format, buffers, length, grows)

    @property
    def stored_bytes(self) -> int:
        """Bytes that the buffers really take."""
        return storage_bytes(self.buffers)

    @_compat.dynamo.untraced
    def dense(self) -> Tensor:
        """The dense tensor that this stands for: pruned elements and unwritten tokens are zero.

        Raises StaleCacheError where tokens of this handle were given up.
        """
        if self.has_only_a_shape:
            return self.clone()
        rows = ops.decompress(self.own_buffers(), self.format.encode(), self.tokens)
        return rows if self.tokens_dim == 2 else rows.transpose(1, 2).contiguous()

    def alias(self) -> CompressedKV:
        """Another object for this very handle."""
        alias = CompressedKV(self.buffers, self.form, self.extent, self.shape, self.stride())
        alias.__dict__.update({k: v for k, v in vars(self).items() if k in ("branch", "writable")})
        alias.cropped = self.cropped
        return alias

    def mapped(self, change: Callable[[Tensor], Tensor]) -> CompressedKV:
        """A cache of its own with ``change`` applied to each buffer, all of which have the batch first."""
        return self.like(map(change, self.own_buffers()))

    def like(self, buffers: Iterable[Tensor]) -> CompressedKV:
        """A cache of its own over ``buffers``, otherwise as this one."""
        return CompressedKV.from_buffers(self.format, buffers, self.tokens, self.grows, self.tokens_dim)

    def ordered(self, order: str) -> CompressedKV:
        """This cache with its elements in the order that the kernels of a device want (see ``Format``)."""
        if self.format.ordered(order) is self.format:
            return self
        parts = zip(self.format.parts, self.format.split(self.own_buffers()), strict=True)
        buffers = [x for part, own in parts for x in portable.reordered(own, part, order)]
        return CompressedKV.from_buffers(self.format.ordered(order), buffers, self.tokens, self.grows, self.tokens_dim)

    def __getitem__(self, index: Any) -> Tensor:
        """As Tensor's, but autograd does not keep this tensor alive as the base of the result."""
        part = super().__getitem__(index)
        return part.alias() if isinstance(part, CompressedKV) and not self.has_only_a_shape else part

    def repeat_interleave(self, repeats: Any, dim: int | None = None, **options: Any) -> Tensor:
        """As Tensor.repeat_interleave. Along dimension 0 the result is compressed: torch would only show its parts."""
        if dim not in (0, -4) or self.has_only_a_shape:
            return super().repeat_interleave(repeats, dim, **options)
        return self.mapped(lambda buffer: buffer.repeat_interleave(repeats, 0, **options))

    def __copy__(self) -> CompressedKV:
        return self.alias()

    def __reduce_ex__(self, protocol: Any) -> Any:
        buffers = [buffer.detach() for buffer in self.own_buffers()]  # without Dynamo's marks
        return restored, (self.format.encode(), buffers, self.tokens, self.grows, self.tokens_dim)

    def __tensor_flatten__(self):
        return self._flattened

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return CompressedKV((), context, inner["extent"], outer_size, outer_stride)

    @property
    def has_only_a_shape(self) -> bool:
        """Whether this is what Dynamo traces with.

        Raises ForeignCompilerError where another compiler goes on with it, which would need the values.
        """
        if self.buffers:
            return False
        if isinstance(self.extent, _compat.tracing.FakeTensor):
            return True
        raise ForeignCompilerError(
            "a compressed KV cache was given to a function that another backend compiles; accepted is "
            'torch.compile(..., backend="mustafar"), and for other backends a dense copy (cache.dense())'
        )

    def __repr__(self) -> str:
        kept = ", ".join(map(_kept, self.format.parts))
        return f"CompressedKV(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {kept})"

    @classmethod
    @_compat.dynamo.untraced  # where a frame runs op by op, Dynamo would compile what ops of ours do
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls.dispatch(func, args, kwargs or {})


def _kept(format: Format) -> str:
    kept = f"{format.kept} of {format.row_size} kept"
    kept += f" in {format.code}" if format.code != "none" else ""
    return kept + (f" by {format.strategy}" if format.strategy != "magnitude" else "")


def _check_dense(dense: Tensor, tokens: int | None) -> None:
    if dense.dim() != 4 or dense.dtype not in CACHE_DTYPES or dense.shape[3] % CHUNK or not dense.shape[3]:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in CACHE_DTYPES)
        raise ValueError(
            f"a dense cache of {list(dense.shape)} {dense.dtype} is not accepted; it must be [B, H, S, D], {accepted}, "
            f"with D a multiple of {CHUNK}"
        )
    if tokens is not None and not 0 <= tokens <= dense.shape[2]:
        raise ValueError(f"tokens={tokens} is not accepted; it must be from 0 to the {dense.shape[2]} that there are")


def _check_queries(dense: Tensor, queries: Tensor | None) -> None:
    batch, heads, _, head_dim = dense.shape
    fits = queries is None or (queries.dim() == 4 and (queries.shape[0], queries.shape[3]) == (batch, head_dim))
    if queries is not None and not (fits and queries.shape[2] and queries.shape[1] and queries.shape[1] % heads == 0):
        raise ValueError(
            f"queries of {list(queries.shape)} are not accepted; they must be [{batch}, Hq, n, {head_dim}] with Hq a "
            f"multiple of {heads} and at least one token"
        )


def restored(format: str, buffers: Sequence[Tensor], tokens: int, grows: bool, tokens_dim: int) -> CompressedKV:
    """What pickle calls to make a saved cache again. Raises SavedCacheError where that cannot be one."""
    check_saved(format, buffers, tokens, grows, tokens_dim)
    cache = CompressedKV.from_buffers(decode(format), buffers, tokens, grows, tokens_dim)
    return cache.ordered(order_for(cache.device))
