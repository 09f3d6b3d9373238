"""How one cache tensor (K or V of one layer) is compressed: what is kept of a row, how it is stored, what stays exact.

``buffers`` says in which tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .buffers import BLOCK_TOKENS, CHUNK, MAX_QUERY_TOKENS, Buffer, packed_buffers
from .layout import FormatError, Layout, sizes_of
from .strategies import Strategy, strategy_named

WORD_CHANNELS = 32
"""Channels of a word of the bitmap."""

EXTREME = 2.0**97
"""NaN, infinities and magnitudes from here on are extreme: tricks of fast kernels are not exact with them."""

CODES = ("none", "int8", "int4")
"""How kept elements may be stored. none: in the dtype of the cache; int8, int4: see ``codes``."""

ORDERS = ("blocks", "rows")
"""How kept elements and bits stand."""

_TEXTS = ("code", "order", "strategy")  # the fields that are no numbers

_CAPACITY_STEP = 64


def grown_capacity(tokens: Any) -> Any:
    """Tokens that a growing cache has room for when it holds ``tokens`` (an int or a SymInt).

    An eighth more than needed, in steps of 64: growing copies each token about eight times in all, and at most an
    eighth of the memory is slack.
    """
    return ((tokens + tokens // 8) // _CAPACITY_STEP + 1) * _CAPACITY_STEP


def kept_elements(head_dim: int, sparsity: float) -> int:
    """Elements kept of a row of ``head_dim``: ``ceil((1 - sparsity) * head_dim)``, rounded up to a multiple of 8.

    ``sparsity`` is taken at its decimal value, so that ``0.7`` of 80 channels keeps 24 and not 32.
    """
    exact = (1 - Fraction(repr(float(sparsity)))) * head_dim
    rounded_up = -(-exact // CHUNK) * CHUNK
    return min(int(rounded_up), head_dim)


def order_for(device: torch.device) -> str:
    """The order that the kernels of a device want."""
    return "rows" if device.type == "cpu" else "blocks"


@dataclass(frozen=True)
class Format(Layout):
    """How one cache tensor is compressed. Make one with ``of``, ``decode`` or ``interned``, which give one object each.

    head_dim: channels of a row, a multiple of 8.
    kept: elements kept of each pruned row, a multiple of 8, at most ``head_dim``.
    window: latest tokens that stay dense and exact, at least 1.
    code: how kept elements are stored, one of ``CODES``.
    order: how they and the bits stand, one of ``ORDERS``.
    strategy: by what elements are chosen, a name of ``strategies.STRATEGIES``. Where all are kept it is "magnitude".

    Raises FormatError for other values.
    """

    head_dim: int
    kept: int
    window: int
    code: str = "none"
    order: str = "blocks"
    strategy: str = "magnitude"

    def __post_init__(self) -> None:
        try:
            strategy_named(self.strategy)
        except ValueError as error:
            raise FormatError(str(error)) from None
        sizes_fit = self.head_dim > 0 and self.head_dim % CHUNK == 0 and self.window >= 1
        sizes_fit = sizes_fit and self.kept % CHUNK == 0 and 0 < self.kept <= self.row_size
        if not sizes_fit or self.code not in CODES or self.order not in ORDERS:
            raise FormatError(
                f"{self} cannot be; accepted are a head_dim and a kept that are multiples of {CHUNK}, kept at most "
                f"head_dim, by channel {BLOCK_TOKENS}, a window of at least 1, a code of {', '.join(CODES)} and an "
                f"order of {', '.join(ORDERS)}"
            )
        chooses = self.kept < self.row_size or self.strategy == "magnitude"
        if not chooses or (self.by_channel and self.order != "blocks"):
            raise FormatError(
                f"{self} cannot be; accepted is the strategy magnitude where all elements are kept, and the order "
                "blocks of strategies by channel"
            )

    @classmethod
    def interned(cls, *values: Any, **named: Any) -> Format:
        """The one object for these values of the fields: guards compare formats on every call."""
        return _interned(cls(*values, **named))

    @classmethod
    def of(
        cls,
        head_dim: int,
        sparsity: float,
        window: int,
        order: str = "blocks",
        code: str = "none",
        strategy: str = "magnitude",
    ) -> Format:
        """The format for a sparsity in [0, 1)."""
        by_channel = strategy_named(strategy).by_channel
        size = BLOCK_TOKENS if by_channel else head_dim
        kept = kept_elements(size, sparsity)
        if kept == size:
            return cls.interned(head_dim, head_dim, window, code, order)
        return cls.interned(head_dim, kept, window, code, "blocks" if by_channel else order, strategy)

    def ordered(self, order: str) -> Format:
        """This format with its elements in another order. By channel there is one only."""
        return self if order == self.order or self.by_channel else _interned(replace(self, order=order))

    @functools.cached_property
    def plain(self) -> Format:
        """This format without what its strategy adds: what kernels that are given the ranking know of it."""
        return _interned(replace(self, strategy="magnitude"))

    @property
    def ranking(self) -> Strategy:
        """Its strategy."""
        return strategy_named(self.strategy)

    def encode(self) -> str:
        """Its values as a text, as ops and saved caches hold it: "head_dim=128,kept=64,window=32".

        Fields that have their default are left out, so that a field added later leaves the texts of today valid.
        """
        values = ((f, getattr(self, f.name)) for f in fields(self))
        return ",".join(f"{f.name}={value}" for f, value in values if value != f.default)

    @classmethod
    @functools.cache
    def decode(cls, text: str) -> Format:
        """The inverse of ``encode``. Raises FormatError for any other text."""
        try:
            pairs = dict(pair.split("=") for pair in text.split(","))
            values: dict[str, Any] = {k: v if k in _TEXTS else int(v) for k, v in pairs.items()}
            return cls.interned(**values)
        except FormatError:
            raise
        except (TypeError, ValueError) as error:
            raise FormatError(f"{text!r} is not a format; accepted is such as {cls(128, 64, 32).encode()!r}") from error

    @property
    def described(self) -> str:
        """What it keeps of a row, for people: "40/128" or "40/128 int8 by output-aware"."""
        code = f" {self.code}" if self.code != "none" else ""
        strategy = f" by {self.strategy}" if self.strategy != "magnitude" else ""
        return f"{self.kept}/{self.row_size}{code}{strategy}"

    @property
    def by_channel(self) -> bool:
        """Whether a packed row is a channel of a block, and not a token."""
        return self.ranking.by_channel

    @property
    def row_size(self) -> int:
        """Elements of a row that is not packed: the channels of a token, or by channel the tokens of a block."""
        return BLOCK_TOKENS if self.by_channel else self.head_dim

    @functools.cached_property
    def channel(self) -> Format:
        """By channel: the format of a packed row by itself."""
        return Format.interned(BLOCK_TOKENS, self.kept, 1, self.code, self.order)

    @property
    def words(self) -> int:
        """Words of the bitmap of a row."""
        return -(-self.row_size // WORD_CHANNELS)

    @property
    def has_bitmap(self) -> bool:
        """Whether it is stored which channels were kept. A coded row that keeps all of them does without."""
        return self.code == "none" or self.kept < self.row_size

    def left(self, tokens: Any) -> Any:
        """Where ``tokens`` (an int or a tensor) are written, those below have left the window; none where not positive.

        By channel, blocks leave it as a whole.
        """
        past = tokens - self.window
        return past // BLOCK_TOKENS * BLOCK_TOKENS if self.by_channel else past

    @property
    def ring(self) -> int:
        """Slots of the ring of exact tokens."""
        return self.window + MAX_QUERY_TOKENS + (BLOCK_TOKENS - 1 if self.by_channel else 0)

    @functools.cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        """What a cache consists of, in the order in which the ops take it."""
        window = Buffer("window", ("batch", "heads", self.ring, self.head_dim))
        counts = Buffer("counts", ("batch", 3), torch.int64)
        return (*packed_buffers(self), window, *self.ranking.buffers(self), counts)

    @property
    def packed(self) -> tuple[Buffer, ...]:
        """The buffers that hold packed rows; they come first."""
        return tuple(buffer for buffer in self.buffers if buffer.grows)

    @property
    def parts(self) -> tuple[Format, ...]:  # type: ignore[override]
        return (self,)

    @property
    def groups(self) -> None:  # type: ignore[override]
        return None

    def place(self, name: str) -> int:
        """Where the buffer of this name stands among ``buffers``."""
        return self._places[name]

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {buffer.name: i for i, buffer in enumerate(self.buffers)}

    def state_shapes(self, batch: Any, heads: Any, dtype: torch.dtype) -> list[tuple[tuple, torch.dtype]]:
        """(shape, dtype) of each buffer that belongs to the strategy."""
        return self.state_of(self.shapes(batch, heads, 1, dtype))

    def token_bytes(self, itemsize: Any) -> Any:
        """Bytes of one compressed token of one KV head."""
        return sum(b.stored_bytes(sizes_of(1, 1, 1), itemsize) for b in self.buffers if b.grows) // BLOCK_TOKENS

    def named(self, buffers: Sequence[Tensor]) -> dict[str, Tensor]:
        """The buffers of a cache by their names."""
        return {buffer.name: x for buffer, x in zip(self.buffers, buffers, strict=True)}

    def plain_of(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """The buffers without those of the strategy: of the format ``plain``."""
        return [*buffers[: self.place("window") + 1], buffers[-1]]

    def joined(self, plain: Sequence[Tensor], state: Sequence[Tensor]) -> list[Tensor]:
        """The buffers of a cache, from those of the format ``plain`` and those of the strategy."""
        return [*plain[:-1], *state, plain[-1]]


@functools.cache
def _interned(format: Format) -> Format:
    return format
