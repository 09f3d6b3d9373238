"""Tensors between guard zones: whether kernels keep to their buffers, whatever positions, counts and bitmaps say."""

from __future__ import annotations

import itertools

import torch
from torch.overrides import TorchFunctionMode

from cases import assert_same_cache, attention, compressed, decompressed, make_mask, randn
from mustafar_compile.lowering import portable
from pairwise import pairwise

ZONE = 2**14  # elements before and behind a tensor, more than any index below is off by
SENTINELS = (float("nan"), -1), (3.0, 2**20)  # for floats and integers; -1 is a bitmap that keeps all channels
SLOTS, WINDOW, KEPT, HEAD_DIM, VALUE_DIM = 32, 2, 8, 64, 32

ROOM = SLOTS + WINDOW
"""Tokens that the caches here have room for."""

POSITIONS = [20, SLOTS, -1, -30, -(2**32) + 300, -(2**62), ROOM, ROOM + 1, ROOM + 2, 200, 2**33 + 40]
COUNTS = [[400, 380, 0], [400, 0, 1], [20, 400, 0], [-5, -5, 0], [-(2**40), -(2**40), 0]]
FULL, PACKED = -1, None
"""What a bitmap says: that all channels were kept, or what was packed."""

STEPS = [
    *((position, None, PACKED) for position in POSITIONS),
    *((None, counts, PACKED) for counts in COUNTS),
    *((None, None, FULL), (200, None, FULL), (None, COUNTS[0], FULL), (200, COUNTS[3], FULL), (-30, COUNTS[0], PACKED)),
]
"""Positions of the first row of the batch, counts of the second, and bitmaps."""


class Zones(TorchFunctionMode):
    """Within it all that is allocated lies between guard zones, and holds what they do. Checks them at its end."""

    def __init__(self, sentinel):
        super().__init__()
        self.sentinel, self.made = sentinel, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.empty:
            return self._between(made)
        return self.guarded(made) if function is torch.zeros else made

    def guarded(self, x):
        """A copy of ``x`` between guard zones."""
        with torch._C.DisableTorchFunction():
            return self._between(x).copy_(x)

    def _between(self, x):
        with torch._C.DisableTorchFunction():
            fill = torch.tensor(self.sentinel[0 if x.is_floating_point() else 1]).to(
                x
            )  # narrow integers: its last bits
            memory = fill.repeat(x.numel() + 2 * ZONE)
            self.made.append((memory, x.numel()))
            return memory[ZONE : ZONE + x.numel()].view(x.shape)

    def __exit__(self, *error):
        super().__exit__(*error)
        for memory, size in self.made:
            zones = torch.cat([memory[:ZONE], memory[ZONE + size :]])
            fill = torch.tensor(self.sentinel[0 if zones.is_floating_point() else 1]).to(zones)
            assert (zones.isnan() if fill.isnan() else zones == fill).all(), "written outside a buffer"


def filled(head_dim, dtype, device, seed, order, code="none", kept=KEPT):
    """A cache of [2, 1, .., head_dim] with 32 tokens; made on the CPU."""
    dense = randn(2, 1, SLOTS, head_dim, seed=seed, dtype=dtype)
    return compressed(dense, SLOTS, min(kept, head_dim), WINDOW, SLOTS, portable, order, code).to(device)


def spoilt(cache, counts, bitmap, copied):
    """A copy of a cache, each buffer by ``copied``, with such counts and such a bitmap, and floors of the same bits."""
    copy = cache.changed(copied)
    if counts is not None:
        copy.counts[1] = torch.tensor(counts)
    for buffer, x in zip(copy.format.buffers, copy, strict=True):
        if bitmap is not None and buffer.name in ("bitmap", "floors"):
            x.view(torch.int8).fill_(bitmap)
    return copy


def step_inputs(queries, group, mask, dtype, device, order="blocks", codes=("none", "none"), kept=KEPT):
    """Query, key and value of new tokens; caches; a mask."""
    sizes = (group, HEAD_DIM), (1, HEAD_DIM), (1, VALUE_DIM)
    new = [randn(2, heads, queries, dim, seed=dim, dtype=dtype, device=device) for heads, dim in sizes]
    dims = HEAD_DIM, VALUE_DIM
    caches = [filled(dim, dtype, device, dim + 1, order, code, kept) for dim, code in zip(dims, codes, strict=True)]
    return new, caches, mask and make_mask(mask, (2, group, queries, ROOM), seed=3).to(device)


def step_at(decode, new, caches, mask, place, copied):
    """The result of a step at one of ``STEPS`` and the caches after it. All tensors go through ``copied`` before."""
    position, *how = place
    caches = [spoilt(cache, *how, copied) for cache in caches]
    at = None if position is None else torch.tensor([position, 20], device=new[0].device)
    sinks = torch.ones(new[0].shape[1], device=new[0].device)
    given = [x if x is None else copied(x) for x in (*new, at, mask, sinks)]
    out = attention(*given[:3], *caches, *given[3:], 0.2, decode=decode, checked=False)
    return [out, *itertools.chain(*caches)]


def check_step(
    decode,
    queries=1,
    group=1,
    mask=None,
    dtype=torch.float32,
    device="cpu",
    steps=STEPS,
    comparable=True,
    order="blocks",
    codes=("none", "none"),
    kept=KEPT,
):
    """A step at any position, with any counts, over any bitmap: nothing outside is written, and what is read is inside.

    Whatever the zones hold, the results are the same. comparable: False where a bitmap of too many bits reads what is
    left in shared memory.
    """
    inputs = step_inputs(queries, group, mask, dtype, device, order, codes, kept)
    for place in steps:
        results = []
        for sentinel in SENTINELS:
            with Zones(sentinel) as zones:
                results.append(step_at(decode, *inputs, place, zones.guarded))
        if comparable or place[2] is not FULL:
            assert results[0][0].isfinite().all(), place
            assert all(torch.equal(x, y) for x, y in zip(*results, strict=True)), place


def check_decompress(by, dtype=torch.float32, device="cpu", order="blocks", code="none"):
    """The same of decompressing."""
    cache = filled(HEAD_DIM, dtype, device, 1, order, code)
    for counts, bitmap, length in pairwise([None, *COUNTS], (PACKED, FULL), (SLOTS, 70)):
        results = []
        for sentinel in SENTINELS:
            with Zones(sentinel) as zones:
                results.append(decompressed(spoilt(cache, counts, bitmap, zones.guarded), length, by=by))
        assert results[0].isfinite().all()
        assert torch.equal(*results)


def check_compress(by, dtype=torch.float32, device="cpu", order="blocks", code="none"):
    """The same of compressing: with any number of tokens, what ``portable`` makes of as many as there are."""
    sizes = (HEAD_DIM, 40, 32), (24, 33, 64)
    for (head_dim, length, capacity), which, sentinel in pairwise(sizes, range(4), SENTINELS):
        dense = randn(2, 1, length, head_dim, seed=length, dtype=dtype)
        tokens = ((-(2**40), 2**33 + 5), (-3, length + 1), (length + 200, 0), (20, length))[which]
        written = torch.tensor(tokens)
        expected = compressed(dense, written.clamp(max=length), KEPT, WINDOW, capacity, portable, order, code)
        with Zones(sentinel) as zones:
            given = zones.guarded(dense.to(device)), zones.guarded(written.to(device))
            made = compressed(*given, KEPT, WINDOW, capacity, by, order, code)
        assert_same_cache(made, expected)
