"""A cache tensor in plain PyTorch: what its buffers hold of which token, and taking new tokens in.

Glossary: see ``portable``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import rows as packing
from .format import BLOCK_TOKENS, Buffer, Format
from .strategies.rings import read, ring_tokens, write

aten = torch.ops.aten


class Cache:
    """A cache tensor, its buffers by their names."""

    def __init__(self, buffers: Sequence[Tensor], format: Format) -> None:
        *packed, self.window, self.counts = format.plain_of(buffers)
        self.format = format
        self.packed = dict(zip(format.packed, packed, strict=True))

    @property
    def tokens(self) -> Tensor:
        """Tokens written, [B]."""
        return self.counts[:, 0]

    @property
    def slots(self) -> int:
        """Tokens that the packed part has room for."""
        return next(iter(self.packed.values())).shape[2] * BLOCK_TOKENS

    @property
    def batch(self) -> Tensor:
        """[B, 1]: the rows of the batch, as an index beside those of tokens [B, n]."""
        return torch.arange(self.window.shape[0], device=self.window.device).unsqueeze(-1)

    def read_rows(self, token: Tensor) -> list[Tensor]:
        """The packed rows [B, H, n, ...] of ``token`` ([B, n] or [1, n])."""
        return [aten.index(x, self._at(buffer, token)).transpose(1, 2).flatten(3) for buffer, x in self.packed.items()]

    def write_rows(self, token: Tensor, rows: Sequence[Tensor]) -> None:
        """Put packed rows [B, H, n, ...] where ``token`` [B, n] stands.

        One write for each buffer, to the buffer itself: Inductor then writes in place. Through a view it would copy
        the cache.
        """
        for (buffer, x), new in zip(self.packed.items(), rows, strict=True):
            aten.index_put_(x, self._at(buffer, token), new.unflatten(-1, buffer.row_shape).transpose(1, 2))

    def _at(self, buffer: Buffer, token: Tensor) -> list[Tensor | None]:
        """The index of ``token`` (not negative) in a buffer: [B, n, H] and what a row has."""
        between = [None] * (buffer.token_dim - 3)
        return [self.batch, None, token // BLOCK_TOKENS, *between, token % BLOCK_TOKENS]

    def all_rows(self) -> list[Tensor]:
        """All packed rows, [B, H, N, 32, ...]. Inductor does not store the result."""
        return [x.movedim(buffer.token_dim, 3).flatten(4) for buffer, x in self.packed.items()]

    def read_ring(self, token: Tensor) -> Tensor:
        """What stands in the ring for ``token`` [B, n]: [B, H, n, D]."""
        return read(self.window, token)

    def write_ring(self, token: Tensor, rows: Tensor) -> None:
        """Put rows [B, H, n, D] in the slots of ``token`` [B, n]."""
        write(self.window, token, rows)

    def ring_tokens(self) -> Tensor:
        """The token that each slot of the ring holds, [B, R]; negative: none."""
        return ring_tokens(self.tokens, self.format.ring)

    def start(self, position: Tensor | None) -> Tensor:
        """Where tokens go that come in at ``position``, None: behind the last; int64 [B, 1]."""
        return (self.tokens.clone() if position is None else of_each_row(position, self.window)).unsqueeze(-1)

    def latest(self, count: int) -> Tensor:
        """The latest ``count`` tokens, [B, count]."""
        return self.tokens.unsqueeze(-1) - count + torch.arange(count, device=self.window.device)

    def first_exact(self, count: int) -> Tensor:
        """The first token that is exact as each of the latest ``count`` tokens sees the cache, [B, count]."""
        return torch.maximum(self.counts[:, 1:2], self.format.left(self.latest(count) + 1))

    def take(self, rows: Tensor, start: Tensor) -> Tensor:
        """Put tokens [B, H, L, D] in the ring, from ``start`` [B, 1] on, and count them.

        Returns which of the tokens before it holds, too: those from [B, 1] on.
        """
        count, held = rows.shape[2], torch.minimum(self.counts[:, 1:2], start)
        self.write_ring(start + torch.arange(count, device=rows.device), rows)
        extreme = packing.extreme(rows).any(3).any(2).any(1, keepdim=True).to(torch.int64)
        end, flag = start + count, torch.maximum(self.counts[:, 2:3], extreme)
        self.counts.copy_(torch.cat([end, torch.maximum(held, end - self.format.ring), flag], dim=-1))
        return held

    def whole(self, token: Tensor, pruned: Tensor) -> Tensor:
        """The dense cache [B, H, n, D] at ``token`` [1, n]. pruned: what is packed there, in dense form."""
        written = torch.where((token < self.counts[:, 0:1])[:, None, :, None], self.read_ring(token), 0)
        is_pruned = (token < self.first_exact(1))[:, None, :, None]
        return torch.where(is_pruned, pruned.to(written.dtype), written).contiguous()


def of_each_row(tokens: Tensor, like: Tensor) -> Tensor:
    """One number, or one for each row of the batch of ``like``: int64 [B]."""
    return tokens.reshape(-1).to(torch.int64).expand(like.shape[0])
