"""``CompressedKV``: a tensor that stands for K or V of one layer and holds it compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .. import _compat
from ..errors import ForeignCompilerError, StaleCacheError
from ..lowering import ops
from ..lowering.format import BLOCK_TOKENS, Layout, blocks_for, grown_capacity
from .lineage import Branch
from .without_memory import WithoutMemory

_SHOWN = ["extent"]
"""Names of the tensors that Dynamo sees in a cache."""

_extents: WeakValueDictionary[int, Tensor] = WeakValueDictionary()


class Form(NamedTuple):
    """What, beside its shape, decides on the code for a cache. Dynamo guards on it."""

    layout: Layout
    grows: bool
    tokens_dim: int
    dtype: torch.dtype
    device: torch.device


def _extent_of(blocks: int) -> Tensor:
    """An empty tensor [blocks, 0], one and the same for all caches of so many blocks.

    It is what Dynamo sees of the buffers, whose sizes follow from it. At each call Dynamo then compares addresses,
    which costs less than to check a buffer of each cache.
    """
    extent = _extents.get(blocks)
    if extent is None:
        with torch.inference_mode(False):
            extent = torch.empty(blocks, 0, dtype=torch.uint8, device="cpu")
        _compat.maybe_mark_dynamic(extent, 0)
        extent = _extents.setdefault(blocks, extent)
    return extent


def _in_order(place: int) -> Any:
    """The buffer of a cache at this place."""
    return property(lambda self: self.buffers[place])


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of plain tensors; one that several share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _with_blocks(buffer: Tensor, blocks: int) -> Tensor:
    """``buffer`` [B, H, N, ...] with zeros behind, up to ``blocks`` blocks."""
    spare = blocks - buffer.shape[2]
    return torch.nn.functional.pad(buffer, (*(0, 0) * (buffer.dim() - 3), 0, spare))


class CompressedKV(WithoutMemory):
    """A cache tensor of logical shape [B, H, S, D] over the buffers that ``lowering.layout`` describes.

    Or [B, S, H, D], where the model keeps it so: ``tokens_dim``, 2 or 1, is the dimension of the tokens.

    It has the shape, dtype and device of the dense tensor and stands wherever a model keeps its K or V. The backend
    works on the buffers, and so do copies, moves and selections along the batch (``tensor_ops``); any other op
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
    """values, bitmap, window, counts, which all handles of a growing cache share. None: see ``has_only_a_shape``."""
    values, bitmap, window, counts = map(_in_order, range(4))
    form: Form
    extent: Tensor
    branch: Branch
    writable: bool = True

    # All else, Dynamo's marks too, is one ``__dict__`` for all handles of a branch: to fill one for each handle of each
    # step takes longer than to make the tensor.
    __slots__ = ("cropped", "tokens")
    tokens: int
    """The logical number of tokens."""
    cropped: bool

    @staticmethod
    def __new__(cls, buffers, form, extent, size, stride=None):
        return cls.shaped(size, stride, form.dtype, form.device)

    def __init__(self, buffers, form, extent, size, stride=None):
        self.buffers, self.form, self.extent = buffers, form, extent
        self.row_layout, self.grows, self.tokens_dim, *_ = form
        self._flattened = _SHOWN, form
        self.tokens, self.cropped = size[self.tokens_dim], False

    @classmethod
    def from_buffers(cls, buffers: Iterable[Tensor], tokens: int, grows: bool, tokens_dim: int = 2) -> CompressedKV:
        """A new cache over ``buffers`` with ``tokens`` tokens (a growing cache) or room for them (a static one)."""
        buffers = tuple(buffers)
        values, layout = buffers[0], Layout.of_buffers(*buffers)
        (batch, heads), head_dim = values.shape[:2], layout.head_dim
        size = (batch, heads, tokens, head_dim) if tokens_dim == 2 else (batch, tokens, heads, head_dim)
        form = Form(layout, grows, tokens_dim, values.dtype, values.device)
        # The blocks of a static cache follow from its size.
        cache = cls(buffers, form, _extent_of(values.shape[2] if grows else 0), size)
        cache.branch = Branch(tokens)
        if grows:
            _compat.maybe_mark_dynamic(cache, tokens_dim)
        return cache

    @classmethod
    def from_dense(cls, dense: Tensor, sparsity: float, window: int, tokens: int | None = None) -> CompressedKV:
        """Compress a dense [B, H, S, D] of which ``tokens`` are written (default: all, and the cache can grow)."""
        layout = Layout.of(dense.shape[3], sparsity, window)
        grows = tokens is None
        length = dense.shape[2]
        capacity = grown_capacity(length) if grows else length
        written = torch.tensor([length if tokens is None else tokens], device=dense.device)
        buffers = ops.compress(dense, written, layout.kept, layout.window, capacity)
        return cls.from_buffers(buffers, length, grows)

    @property
    def stored_bytes(self) -> int:
        """Bytes that the buffers really take."""
        return storage_bytes(self.buffers)

    @property
    def capacity(self) -> int:
        """Tokens that the compressed part has room for."""
        return BLOCK_TOKENS * self.buffers[0].shape[2]

    def dense(self) -> Tensor:
        """The dense tensor that this stands for: pruned elements and unwritten tokens are zero.

        Raises StaleCacheError where tokens of this handle were given up.
        """
        rows = ops.decompress(*self.own_buffers(), self.tokens)
        return rows if self.tokens_dim == 2 else rows.transpose(1, 2).contiguous()

    def own_buffers(self) -> tuple[Tensor, ...]:
        """The buffers as this handle sees them, see ``own_counts``."""
        if not self.grows or self.is_latest():
            return self.buffers
        return *self.buffers[:-1], self.own_counts()

    def own_counts(self) -> Tensor:
        """``counts`` as this handle sees them: a copy with fewer tokens where a longer handle was made.

        Raises StaleCacheError where tokens of this handle were given up.
        """
        if not self.grows or self.is_latest():
            return self.counts
        self._check_standing()
        counts = self.counts.clone()
        counts[:1].fill_(self.tokens)
        return counts

    def is_latest(self) -> bool:
        """Whether no other handle of this growing cache has gone further."""
        branch = self.branch
        return branch.tokens == self.tokens and branch.successor is None

    def _check_standing(self) -> None:
        standing = self.branch.standing()
        if standing < self.tokens:
            raise StaleCacheError(
                f"this cache of {self.tokens} tokens was cropped to {standing} and continued: its later tokens are "
                "gone. To continue one past in several ways, copy.deepcopy it first"
            )

    def prepare(self, count: int) -> None:
        """Make a growing cache ready to take ``count`` more tokens. Call it before they are written.

        Raises StaleCacheError if this handle was extended before, or some of its tokens were given up.
        """
        tokens = self.tokens
        if not self.is_latest():
            self._check_standing()
            if not self.cropped:
                raise StaleCacheError(
                    f"this cache of {tokens} tokens was already extended to {self.branch.tokens}: its window has "
                    "moved on. To continue one past in several ways, copy.deepcopy it first"
                )
            self.__dict__ = vars(self) | {"branch": self.branch.cut(tokens)}
            self.counts[:1].fill_(tokens)
        self.cropped = False
        needed = tokens + count - self.row_layout.window
        if needed > self.capacity:
            self.reserve(grown_capacity(needed))

    def extended(self, count: int) -> CompressedKV:
        """The handle after ``count`` more tokens were written into the buffers."""
        longer = self._handle(self.tokens + count)
        self.branch.tokens = longer.tokens
        return longer

    def crop(self, tokens: int) -> CompressedKV:
        """A handle of the first ``tokens`` tokens of a growing cache, which may be extended."""
        self._check_standing()
        shorter = self._handle(tokens)
        shorter.cropped = True
        return shorter

    def _handle(self, tokens: int) -> CompressedKV:
        """Another handle of the same buffers."""
        size = list(self.shape)
        size[self.tokens_dim] = tokens
        handle = self.shaped(size, None, self.form.dtype, self.form.device)
        handle.__dict__ = vars(self)
        handle.tokens, handle.cropped = tokens, False
        return handle

    def reserve(self, capacity: int) -> None:
        """Grow to room for ``capacity`` tokens, in place: the other handles read what is packed from now on, too."""
        blocks = blocks_for(capacity)
        if blocks == self.values.shape[2]:
            return
        with torch.inference_mode():  # where alone a cache that was made in it may be changed
            for buffer in (self.values, self.bitmap):
                torch.ops.aten.set_.source_Tensor(buffer, _with_blocks(buffer, blocks))
        self.extent = _extent_of(blocks)

    def alias(self) -> CompressedKV:
        """Another object for this very handle."""
        alias = CompressedKV(self.buffers, self.form, self.extent, self.shape, self.stride())
        alias.__dict__.update({k: v for k, v in vars(self).items() if k in ("branch", "writable")})
        alias.cropped = self.cropped
        return alias

    def mapped(self, change: Callable[[Tensor], Tensor]) -> CompressedKV:
        """A cache of its own with ``change`` applied to each buffer."""
        return self.over(map(change, self.own_buffers()))

    def rebatched(self, change: Callable[[Tensor], Tensor]) -> CompressedKV:
        """A cache of its own with ``change``, which selects along dimension 0, applied to what has a batch."""
        buffers = [*map(change, self.buffers[:-1]), self.own_counts().clone()]
        return self.over(buffers)

    def over(self, buffers: Iterable[Tensor]) -> CompressedKV:
        """A cache of its own over ``buffers``, with as many tokens."""
        return CompressedKV.from_buffers(buffers, self.tokens, self.grows, self.tokens_dim)

    def __getitem__(self, index: Any) -> Tensor:
        """As Tensor's, but autograd does not keep this tensor alive as the base of the result."""
        part = super().__getitem__(index)
        return part.alias() if isinstance(part, CompressedKV) and not self.has_only_a_shape else part

    def repeat_interleave(self, repeats: Any, dim: int | None = None, **options: Any) -> Tensor:
        """As Tensor.repeat_interleave. Along dimension 0 the result is compressed: torch would only show its parts."""
        if dim not in (0, -4) or self.has_only_a_shape:
            return super().repeat_interleave(repeats, dim, **options)
        return self.rebatched(lambda buffer: buffer.repeat_interleave(repeats, 0, **options))

    def __copy__(self) -> CompressedKV:
        return self.alias()

    def __reduce_ex__(self, protocol: Any) -> Any:
        buffers = [buffer.detach() for buffer in self.mapped(lambda buffer: buffer).buffers]  # without Dynamo's marks
        return restored_cache, (*buffers, self.tokens, self.grows, self.tokens_dim)

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
        if isinstance(self.extent, _compat.FakeTensor):
            return True
        raise ForeignCompilerError(
            "a compressed KV cache was given to a function that another backend compiles; accepted is "
            'torch.compile(..., backend="mustafar"), and for other backends a dense copy (cache.dense())'
        )

    def __repr__(self) -> str:
        kept = f"{self.row_layout.kept} of {self.row_layout.head_dim} kept"
        return f"CompressedKV(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {kept})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls.dispatch(func, args, kwargs or {})


def restored_cache(
    values: Tensor, bitmap: Tensor, window: Tensor, counts: Tensor, tokens: int, grows: bool, tokens_dim: int = 2
) -> CompressedKV:
    """What pickle calls to make a saved cache again."""
    return CompressedKV.from_buffers((values, bitmap, window, counts), tokens, grows, tokens_dim)
