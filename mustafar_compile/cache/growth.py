"""How a growing cache goes on: handles of the same buffers, each longer or shorter than the one it comes from."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .. import _compat
from ..errors import StaleCacheError
from ..lowering.buffers import blocks_for
from ..lowering.format import grown_capacity
from ..lowering.layout import Layout
from .lineage import Branch
from .without_memory import WithoutMemory

_extents: WeakValueDictionary[tuple[int, bool], Tensor] = WeakValueDictionary()


class Form(NamedTuple):
    """What, beside its shape, decides on the code for a cache. Dynamo guards on it."""

    format: Layout
    grows: bool
    tokens_dim: int
    dtype: torch.dtype
    device: torch.device


def extent_of(blocks: int, grows: bool) -> Tensor:
    """An empty tensor [blocks, 0], one and the same for all caches of so many blocks that grow, or that do not.

    It is what Dynamo sees of the buffers, whose sizes follow from it. At each call Dynamo then compares addresses,
    which costs less than to check a buffer of each cache.
    """
    extent = _extents.get((blocks, grows))
    if extent is None:
        with torch.inference_mode(False):
            extent = torch.empty(blocks, 0, dtype=torch.uint8, device="cpu")
        if grows:
            _compat.dynamo.maybe_mark_dynamic(extent, 0)
        extent = _extents.setdefault((blocks, grows), extent)
    return extent


def _with_blocks(buffer: Tensor, blocks: int) -> Tensor:
    """``buffer`` [B, H, N, ...] with zeros behind, up to ``blocks`` blocks."""
    spare = blocks - buffer.shape[2]
    return torch.nn.functional.pad(buffer, (*(0, 0) * (buffer.dim() - 3), 0, spare))


class Handle(WithoutMemory):
    """K or V of one layer as far as some token. All handles of a growing cache share its buffers and its branch."""

    form: Form
    format: Layout
    grows: bool
    tokens_dim: int
    buffers: tuple[Tensor, ...]
    extent: Tensor
    branch: Branch

    # All else, Dynamo's marks too, is one ``__dict__`` for all handles of a branch: to fill one for each handle of each
    # step takes longer than to make the tensor.
    __slots__ = ("cropped", "tokens")
    tokens: int
    """The logical number of tokens."""
    cropped: bool

    @property
    def counts(self) -> Tensor:
        """The buffer of this name, [B, 3]; of groups of KV heads that of the last."""
        return self.buffers[-1]

    @property
    def capacity(self) -> int:
        """Tokens that the compressed part has room for."""
        return self.format.capacity_of(self.buffers)

    def own_buffers(self) -> tuple[Tensor, ...]:
        """The buffers as this handle sees them: with copies of counts, of fewer tokens, where a longer handle was made.

        Raises StaleCacheError where tokens of this handle were given up.
        """
        if not self.grows or self.is_latest():
            return self.buffers
        self._check_standing()
        return tuple(self.format.with_counts(self.buffers, lambda counts: self._counting(counts.clone())))

    def _counting(self, counts: Tensor) -> Tensor:
        """``counts``, which now say how many tokens this handle has."""
        counts[:, 0].fill_(self.tokens)
        return counts

    def _count(self) -> None:
        """Set the tokens of the buffers to those of this handle."""
        self.format.with_counts(self.buffers, self._counting)

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
        if self.counts.is_inference() and not torch.is_inference_mode_enabled():  # where nothing may write them as such
            for buffer in self.buffers:
                _compat.memory.give_version_counter(buffer)
        if not self.is_latest():
            self._check_standing()
            if not self.cropped:
                raise StaleCacheError(
                    f"this cache of {tokens} tokens was already extended to {self.branch.tokens}: its window has "
                    "moved on. To continue one past in several ways, copy.deepcopy it first"
                )
            self.__dict__ = vars(self) | {"branch": self.branch.cut(tokens)}
            self._count()
        self.cropped = False
        needed = tokens + count - self.format.window
        if needed > self.capacity:
            self.reserve(grown_capacity(needed))

    def extended(self, count: int) -> Any:
        """The handle after ``count`` more tokens were written into the buffers."""
        longer = self._handle(self.tokens + count)
        self.branch.tokens = longer.tokens
        return longer

    def crop(self, tokens: int) -> Any:
        """A handle of the first ``tokens`` tokens of a growing cache, which may be extended."""
        self._check_standing()
        shorter = self._handle(tokens)
        shorter.cropped = True
        return shorter

    def _handle(self, tokens: int) -> Any:
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
        if blocks == blocks_for(self.capacity):
            return
        with torch.inference_mode():  # where alone a cache that was made in it may be changed
            for buffer, x in zip(self.format.buffers, self.buffers, strict=True):
                if buffer.grows:
                    torch.ops.aten.set_.source_Tensor(x, _with_blocks(x, blocks))
        self.extent = extent_of(blocks, self.grows)

    def undo(self) -> None:
        """Take back what a step that failed has counted, so that it may be tried again with this handle."""
        self._count()
