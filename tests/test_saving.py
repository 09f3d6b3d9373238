"""Saved caches: those of earlier versions load, and nothing loads that kernels could not be trusted with."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

import mustafar_compile
from mustafar_compile import CompressedKV, SavedCacheError
from mustafar_compile.cache.saving import restored_cache
from mustafar_compile.cache.tensor import restored
from mustafar_compile.lowering.format import Format
from reference import pruned_cache

SAVED = Path(__file__).parent / "saved"


def loaded(path):
    with torch.serialization.safe_globals(mustafar_compile.safe_globals()):
        return torch.load(path)


def test_caches_of_version_0_1_load():
    saved = loaded(SAVED / "version_0.1.pt")
    growing, static = saved["caches"]["growing"], saved["caches"]["static"]
    assert isinstance(growing, CompressedKV)
    assert growing.grows
    assert torch.equal(growing.dense(), pruned_cache(saved["rows"]["growing"], 0.5, 6))
    assert growing.counts.tolist() == 2 * [[45, 23, 0]]
    assert not static.grows
    expected = pruned_cache(saved["rows"]["static"][:, :, :30], 0.7, 4)
    assert torch.equal(static.dense(), torch.nn.functional.pad(expected, (0, 0, 0, 10)))


def parts(tokens=100, grows=True):
    """What a saved cache consists of."""
    torch.manual_seed(0)
    how = () if grows else (tokens,)
    cache = CompressedKV.from_dense(torch.randn(1, 2, 100, 40), 0.5, 8, *how)
    return {
        "format": cache.format.encode(),
        "buffers": [buffer.clone() for buffer in cache.buffers],
        "tokens": 100,
        "grows": grows,
        "tokens_dim": 2,
    }


class Crafted:
    """Pickles as a call of ``function`` with whatever we like."""

    def __init__(self, function, arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return loaded(file)


def load(function, *arguments):
    return through_a_file(Crafted(function, arguments))


def with_buffer(name, change):
    def craft(parts):
        place = Format.decode(parts["format"]).place(name)
        parts["buffers"][place] = change(parts["buffers"][place])

    return craft


def counts(*numbers):
    return with_buffer("counts", lambda x: torch.tensor([numbers]))


def set_bit(word, bit):
    def change(bitmap):
        bitmap[0, 1, 1, 3, word] |= bit
        return bitmap

    return with_buffer("bitmap", change)


def changed(**what):
    return lambda parts: parts.update(what)


CRAFTED = {
    "all bits set": with_buffer("bitmap", lambda x: torch.full_like(x, -1)),
    "bits too few": with_buffer("bitmap", torch.ones_like),
    "a bit too many": set_bit(0, -1),
    "a bit past the channels": set_bit(1, 1 << 30),
    "counts beyond the tokens": counts(10**9, 10**9, 0),
    "counts below zero": counts(-(10**9), -(10**9), 0),
    "held behind the tokens": counts(100, 101, 0),
    "held too early": counts(100, 0, 0),
    "fewer tokens written than said": counts(99, 76, 0),
    "a mark that is none": counts(100, 76, 2),
    "more tokens than room": lambda parts: (counts(5000, 4976, 0)(parts), parts.update(tokens=5000)),
    "tokens below zero": changed(tokens=-1),
    "tokens that are no number": changed(tokens="x"),
    "tokens as a tensor": changed(tokens=torch.tensor(100)),
    "grows that is no truth value": changed(grows="x"),
    "another dimension of tokens": changed(tokens_dim=7),
    "true as a dimension": changed(tokens_dim=True),
    "no format": changed(format="x"),
    "a number as format": changed(format=3),
    "a format of other rows": changed(format=Format.of(40, 0.7, 8).encode()),
    "a format of another window": changed(format=Format.of(40, 0.5, 9).encode()),
    "no list of buffers": changed(buffers=None),
    "a short bitmap": with_buffer("bitmap", lambda x: x[:, :, :1]),
    "a ring of another dtype": with_buffer("window", torch.Tensor.half),
    "counts of other rows": with_buffer("counts", lambda x: x.expand(2, 3)),
}


@pytest.mark.parametrize("craft", CRAFTED.values(), ids=CRAFTED)
def test_crafted_caches_are_refused(craft):
    good = parts()
    assert isinstance(load(restored, *good.values()), CompressedKV)
    craft(good)
    with pytest.raises(SavedCacheError):
        load(restored, *good.values())


@pytest.mark.parametrize("craft", [counts(101, 90, 0), counts(101, 77, 0), changed(tokens=200), changed(tokens=40)])
def test_crafted_static_caches_are_refused(craft):
    good = parts(grows=False)
    assert load(restored, *good.values()).counts.tolist() == [[100, 76, 0]]
    craft(good)
    with pytest.raises(SavedCacheError):
        load(restored, *good.values())


def test_crafted_caches_of_version_0_1_are_refused():
    format, buffers, *how = parts().values()
    values, bitmap, window, _ = restored(format, buffers, *how).ordered("blocks").buffers
    old = torch.tensor([100, 76, 0])
    assert restored_cache(values, bitmap, window, old, 100, True).counts.tolist() == [[100, 76, 0]]
    for crafted in (
        (values, torch.full_like(bitmap, -1), window, old, 100, True),
        (values, bitmap, window[:, :, :4], old, 100, True),
        (values, bitmap, window, old[:1], 100, True),
        (values[0], bitmap, window, old, 100, True),
        (None, bitmap, window, old, 100, True),
    ):
        with pytest.raises(SavedCacheError):
            restored_cache(*crafted)


@pytest.mark.parametrize("grows", [True, False])
def test_zeroed_caches_load(grows):
    """Zeroing a cache leaves rows that keep no channel; a decode step over one is found by test_fuzz_cache."""
    cache = CompressedKV.from_dense(torch.randn(1, 2, 100, 40), 0.5, 8, *(() if grows else (100,)))
    cache.zero_()
    assert torch.equal(through_a_file(cache).dense(), torch.zeros(1, 2, 100, 40))


def test_rows_that_are_not_read_may_hold_anything():
    good = parts()
    good["buffers"][1][:, :, 2, 28:] = -1  # tokens from 92 on, where the window begins
    good["buffers"][1][:, :, 3:] = -1
    assert load(restored, *good.values()).shape == (1, 2, 100, 40)


@pytest.mark.parametrize(
    ("dense", "how", "problem"),
    [
        (torch.zeros(1, 2, 50, 12), (0.5, 8), "multiple of 8"),
        (torch.zeros(2, 50, 64), (0.5, 8), "must be"),
        (torch.zeros(1, 2, 50, 64, dtype=torch.int32), (0.5, 8), "float32, float16, bfloat16"),
        (torch.zeros(1, 2, 50, 64, dtype=torch.float64), (0.5, 8), "float32, float16, bfloat16"),
        (torch.zeros(1, 2, 50, 64), (1.5, 8), "sparsity=1.5"),
        (torch.zeros(1, 2, 50, 64), (-1, 8), "sparsity=-1"),
        (torch.zeros(1, 2, 50, 64), (0.5, 0), "window"),
        (torch.zeros(1, 2, 50, 64), (0.5, 8, 51), "tokens=51"),
        (torch.zeros(1, 2, 50, 64), (0.5, 8, -1), "tokens=-1"),
    ],
)
def test_dense_caches_that_cannot_be_compressed(dense, how, problem):
    with pytest.raises(ValueError, match=problem):
        CompressedKV.from_dense(dense, *how)
