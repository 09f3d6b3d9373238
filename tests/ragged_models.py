"""Models in which each row of the batch writes its cache at positions of its own, as a serving loop with slots does."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from histories import History
from live_caches import Shape
from models import BufferModel


class RaggedModel(BufferModel):
    """Buffers [B, H, S, D] written by an index_put at positions [B, L], read under a mask with rows for each row."""

    def write(self, cache: Tensor, new: Tensor, positions: Tensor) -> None:
        rows = torch.arange(len(positions)).unsqueeze(1)
        cache[rows, :, positions] = new.transpose(1, 2)

    def mask(self, positions: Tensor) -> Tensor:
        slots = torch.arange(self.k_cache.shape[2])
        return (slots <= positions.unsqueeze(-1)).unsqueeze(1)

    def step(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        self.write(self.k_cache, k, positions)
        self.write(self.v_cache, v, positions)
        return self.merge(self.attend(q, self.k_cache, self.v_cache, self.mask(positions)))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)


class OneTokenModel(RaggedModel):
    """A step of one token names its place by two indices of one dimension."""

    def write(self, cache: Tensor, new: Tensor, positions: Tensor) -> None:
        if positions.shape[1] > 1:
            return super().write(cache, new, positions)
        cache[torch.arange(len(positions)), :, positions[:, 0]] = new[:, :, 0]


class ScatterModel(RaggedModel):
    def write(self, cache: Tensor, new: Tensor, positions: Tensor) -> None:
        cache.scatter_(2, positions[:, None, :, None].expand_as(new), new)


class RepeatedScatterModel(RaggedModel):
    """The index is repeated in memory, the write is not in place."""

    def write(self, cache: Tensor, new: Tensor, positions: Tensor) -> None:
        index = positions.view(len(positions), 1, -1, 1).repeat(1, new.shape[1], 1, new.shape[3])
        cache.copy_(cache.scatter(-2, index, new))


class RowsChosenModel(RaggedModel):
    """A step of one token chooses between it and the old buffer."""

    def write(self, cache: Tensor, new: Tensor, positions: Tensor) -> None:
        if positions.shape[1] > 1:
            return super().write(cache, new, positions)
        cache.copy_(self.chosen(cache, new, torch.arange(cache.shape[2]), positions))

    def chosen(self, cache: Tensor, new: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        return torch.where(slots.view(1, 1, -1, 1) == positions.view(-1, 1, 1, 1), new, cache)


class OneHotRowsModel(RowsChosenModel):
    """Blended by a one-hot vector of each row."""

    def chosen(self, cache: Tensor, new: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        here = F.one_hot(positions, len(slots)).unsqueeze(-1).to(new.dtype)
        return cache * (1 - here) + here * new


class RowByRowModel(RaggedModel):
    """litgpt: an index_copy for each row."""

    def write(self, cache: Tensor, new: Tensor, positions: Tensor) -> None:
        for row in range(len(positions)):
            cache[row].index_copy_(1, positions[row], new[row])


class SlicedRowsModel(RaggedModel):
    """Rows are slices, and both they and their positions come in another order."""

    def write(self, cache: Tensor, new: Tensor, positions: Tensor) -> None:
        positions = positions.flip(0)
        for row in reversed(range(len(positions))):
            cache[row : row + 1, :, positions[-1 - row]] = new[row : row + 1]


class RaggedTokensFirstModel(RaggedModel):
    """Buffers [B, S, H, D]."""

    def __init__(self, batch: int = 2, slots: int = 48, dtype=torch.float32, **sizes) -> None:
        super().__init__(batch, slots, dtype, **sizes)
        self.k_cache, self.v_cache = (x.transpose(1, 2).contiguous() for x in (self.k_cache, self.v_cache))

    def write(self, cache: Tensor, new: Tensor, positions: Tensor) -> None:
        cache[torch.arange(len(positions)).unsqueeze(1), positions] = new.transpose(1, 2)

    def mask(self, positions: Tensor) -> Tensor:
        return (torch.arange(self.k_cache.shape[1]) <= positions.unsqueeze(-1)).unsqueeze(1)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return super().attend(q, keys.transpose(1, 2), values.transpose(1, 2), mask)


class TokensFirstScatterModel(RaggedTokensFirstModel):
    def write(self, cache: Tensor, new: Tensor, positions: Tensor) -> None:
        new = new.transpose(1, 2)
        cache.scatter_(1, positions[:, :, None, None].expand_as(new), new)


FORMS = {
    "index_put": RaggedModel,
    "scatter": ScatterModel,
    "where": RowsChosenModel,
    "row by row": RowByRowModel,
    "one token": OneTokenModel,
    "repeated index": RepeatedScatterModel,
    "one-hot": OneHotRowsModel,
    "sliced rows": SlicedRowsModel,
    "tokens first": RaggedTokensFirstModel,
    "tokens first, scatter": TokensFirstScatterModel,
}
"""Four spellings, then others of each."""

Steps = Sequence[tuple[Tensor, Tensor]]
"""Embeddings [B, L, E] and positions [B, L] of each step."""


def steps_at(positions: Sequence[Sequence[int]], prompt: int = 0, seed: int = 0, dtype=torch.float32) -> Steps:
    """A prompt of as many tokens in all rows, then a token at each of ``positions``, which are given by row."""
    generator, batch = torch.Generator().manual_seed(seed), len(positions[0])
    places = [torch.tensor(at).unsqueeze(1) for at in positions]
    if prompt:
        places.insert(0, torch.arange(prompt).expand(batch, -1))
    return [(torch.randn(*at.shape, 32, generator=generator).to(dtype), at) for at in places]


def run(step, steps: Steps) -> list[Tensor]:
    return [step(x, positions) for x, positions in steps]


def dense(model: RaggedModel, steps: Steps) -> list[Tensor]:
    """What a copy of ``model`` gives, eagerly."""
    return run(copy.deepcopy(model).step, steps)


def pruned(model: RaggedModel, steps: Steps, options: dict) -> list[Tensor]:
    """The oracle: each row alone, over its own tokens."""
    shape = Shape(
        heads=model.kv_heads, group=model.heads // model.kv_heads, key_dim=model.head_dim, value_dim=model.value_dim,
        dtype=model.q.weight.dtype, **options,
    )  # fmt: skip
    histories = [History.empty(shape, 1, room=1000, of_caller=True) for _ in steps[0][1]]
    return [model.merge(torch.cat(_by_row(model, histories, x, at.tolist()))) for x, at in steps]


def _by_row(model: RaggedModel, histories: list[History], x: Tensor, positions: list[list[int]]) -> list[Tensor]:
    q, *new = (t.transpose(1, 2) for t in model.project(x))
    outputs = []
    for row, (history, at) in enumerate(zip(histories, positions, strict=True)):
        unwritten = max(at[0] - history.tokens, 0)  # what the buffer is allocated with
        history.rows = [F.pad(rows, (0, 0, 0, unwritten)) for rows in history.rows]
        mine = [t[row : row + 1] for t in new]
        outputs.append(history.attend(q[row : row + 1], mine, at[0], None, eager=len(at) > 1))
    return outputs
