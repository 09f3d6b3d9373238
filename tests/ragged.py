"""Caches whose rows of the batch hold different numbers of tokens, written at positions of their own."""

from __future__ import annotations

import torch

from cases import assert_same_bits, assert_same_cache, attention, compressed, decompressed, randn
from mustafar_compile.lowering import portable

WRITTEN = [3, 40, 75]
WINDOW, KEPT, HEAD_DIM, CAPACITY = 4, 16, 64, 96
POSITIONS = {"behind the last": None, "given": WRITTEN, "rewound": [2, 40, 61], "far back": [0, 13, 75], "one": [3]}


def row_of(cache, row):
    """A cache of its own with one row of the batch."""
    return cache.changed(lambda x: x[row : row + 1].clone())


def ragged_dense(dtype, device, seed):
    """Rows of which ``WRITTEN`` tokens are written; NaN behind them."""
    dense = randn(len(WRITTEN), 1, CAPACITY, HEAD_DIM, seed=seed, dtype=dtype)
    written = torch.arange(CAPACITY)[:, None] < torch.tensor(WRITTEN)[:, None, None, None]
    return torch.where(written, dense, torch.nan).to(device)


def check_ragged_cache(by, dtype=torch.float32, device="cpu", order="blocks"):
    """Each row of the batch is compressed and decompressed as it is alone, by ``portable``."""
    dense = ragged_dense(dtype, device, seed=1)
    cache = compressed(dense, WRITTEN, KEPT, WINDOW, CAPACITY, by, order)
    whole = decompressed(cache, CAPACITY, by=by).cpu()
    for row, tokens in enumerate(WRITTEN):
        alone = compressed(dense[row : row + 1].cpu(), tokens, KEPT, WINDOW, CAPACITY, portable, order)
        assert_same_cache(row_of(cache, row), alone)
        assert_same_bits(whole[row : row + 1], decompressed(alone, CAPACITY, by=portable))


def check_ragged(decode, position, queries=1, dtype=torch.float32, device="cpu", order="blocks", **close):
    """A step over all rows gives each row what a step over it alone gives, by ``portable``.

    position: of each row, one for all, or None. close: how near results must be.
    """
    rows = len(WRITTEN)
    new = [randn(rows, h, queries, HEAD_DIM, seed=i, dtype=dtype, device=device) for i, h in enumerate((2, 1, 1))]
    mask = torch.where(randn(rows, 1, 1, CAPACITY, seed=5, device=device) > -1, 0.0, -torch.inf)
    dense = [ragged_dense(dtype, "cpu", seed) for seed in (1, 2)]
    before = [compressed(x, WRITTEN, KEPT, WINDOW, CAPACITY, portable, order) for x in dense]
    caches = [cache.to(device).clone() for cache in before]
    at = None if position is None else torch.tensor(position, device=device)
    out = attention(*new, *caches, at, mask, scale=0.2, decode=decode)
    for row in range(rows):
        alone = [row_of(cache, row) for cache in before]
        given = [x[row : row + 1].cpu() for x in new]
        own = None if position is None else torch.tensor([position[row % len(position)]])
        how = {"scale": 0.2, "decode": portable.decode_attention}
        expected = attention(*given, *alone, own, mask[row : row + 1].cpu(), **how)
        torch.testing.assert_close(out[row : row + 1].cpu(), expected, **close)
        for mine, other in zip(caches, alone, strict=True):
            assert_same_cache(row_of(mine, row), other)
