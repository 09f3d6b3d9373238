"""Ops that act on the compressed form: selections along the batch, crops, copies on disk; and what has no memory."""

from __future__ import annotations

import copy
import io
import warnings
import weakref

import numpy as np
import pytest
import torch

from mustafar_compile import CompressedKV, CompressedWriteError, NoMemoryError, StaleCacheError, safe_globals
from reference import pruned_cache
from test_compressed_tensor import WINDOW, growing, randn, static, step


@pytest.fixture
def _nothing_decompresses():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


SELECTIONS = {
    "index_select": lambda x: x.index_select(0, torch.tensor([1, 1, 0])),
    "tensor": lambda x: x[torch.tensor([1, 0, 0])],
    "tensor and dots": lambda x: x[torch.tensor([1]), ...],
    "list": lambda x: x[[1, 0]],
    "boolean": lambda x: x[torch.tensor([False, True])],
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=0),
    "repeat_interleave by tensor": lambda x: x.repeat_interleave(torch.tensor([2, 1]), dim=0),
    "cat": lambda x: torch.cat([x, x], dim=0),
}
PARTS = {
    "slice": lambda x: x[1:],
    "narrow": lambda x: x.narrow(0, 0, 1),
    "steps": lambda x: x[::2],
    "chunk": lambda x: x.chunk(2)[1],
    "split": lambda x: x.split([1, 1])[0],
}


@pytest.mark.usefixtures("_nothing_decompresses")
@pytest.mark.parametrize("select", (SELECTIONS | PARTS).values(), ids=SELECTIONS | PARTS)
def test_selections_of_a_growing_cache_stay_compressed(select):
    kv, expected = growing()
    chosen = select(kv)
    assert type(chosen) is CompressedKV
    assert chosen.shape == select(expected).shape
    assert torch.equal(chosen.dense(), select(expected))


@pytest.mark.usefixtures("_nothing_decompresses")
@pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS)
def test_selections_of_a_static_cache_stay_compressed(select):
    kv, expected = static()
    chosen = select(kv)
    assert type(chosen) is CompressedKV
    assert not chosen.grows
    assert torch.equal(chosen.dense(), select(expected))


@pytest.mark.parametrize("select", (SELECTIONS | PARTS).values(), ids=SELECTIONS | PARTS)
def test_a_selection_goes_on_by_itself(select):
    kv, past = growing()
    chosen, before = select(kv), pruned_cache(select(past), 0.5, WINDOW)
    longer, row = step(chosen, seed=1)
    assert torch.equal(longer.dense(), pruned_cache(torch.cat([before, row], 2), 0.5, WINDOW))
    assert torch.equal(kv.dense(), past)
    kv, row = step(kv, seed=2)
    assert torch.equal(kv.dense(), pruned_cache(torch.cat([past, row], 2), 0.5, WINDOW))


def test_a_part_does_not_keep_the_whole_alive():
    kv, _ = growing()
    part, whole = kv[:1], weakref.ref(kv)
    del kv
    assert whole() is None
    assert part.shape[0] == 1


def test_extreme_values_are_remembered_in_selections():
    dense = randn(2, 3, 11, 16)
    dense[1, 0, 0, 0] = float("inf")
    kv, plain = CompressedKV.from_dense(dense, 0.5, WINDOW), growing()[0]
    assert kv[[1]].counts[0, 2] == 1
    assert torch.cat([plain, kv]).counts[:, 2].tolist() == [0, 0, 0, 1]


def test_caches_of_different_rooms_are_joined():
    a, expected = growing(tokens=62)
    b = copy.deepcopy(a)
    b.reserve(500)
    assert torch.equal(torch.cat([a, b]).dense(), torch.cat([expected, expected]))


def test_static_caches_of_different_lengths_are_joined():
    """Each row of the batch has counts of its own."""
    (a, dense), (short, short_dense) = static(written=7), static(written=3)
    joined = torch.cat([a, short])
    assert joined.counts[:, 0].tolist() == [7, 7, 3, 3]
    assert torch.equal(joined.dense(), torch.cat([dense, short_dense]))


@pytest.mark.filterwarnings("ignore:mustafar")
def test_what_cannot_be_joined_compressed_is_joined_dense():
    a, dense = static(written=7)
    joined = torch.cat([a, dense])
    assert type(joined) is torch.Tensor
    assert torch.equal(joined, torch.cat([dense, dense]))
    other = CompressedKV.from_dense(randn(2, 3, 12, 16), 0.0, WINDOW, tokens=7)
    assert torch.equal(torch.cat([a, other]), torch.cat([dense, other.dense()]))


def test_a_part_of_the_batch_cannot_be_written():
    kv, expected = growing()
    with pytest.raises(CompressedWriteError):
        kv[:1].zero_()
    assert torch.equal(kv.dense(), expected)


# ------------------------------------------------------------------------------------------------------------ cropping

CROPS = {
    "to 8": lambda x: x[:, :, :8],
    "by 3": lambda x: x[..., :-3, :],
    "narrow": lambda x: x.narrow(2, 0, 8),
    "in two steps": lambda x: x[:, :, :9][:, :, :8],
}


@pytest.mark.usefixtures("_nothing_decompresses")
@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
def test_a_crop_is_a_handle_of_the_same_buffers(crop):
    kv, expected = growing()
    shorter = crop(kv)
    assert type(shorter) is CompressedKV
    assert shorter.buffers[0].data_ptr() == kv.buffers[0].data_ptr()
    dense = randn(2, 3, 11, 16, seed=0)[:, :, :8]
    assert torch.equal(shorter.dense(), pruned_cache(dense, 0.5, WINDOW)), "as if no more had been written"
    assert torch.equal(kv.dense(), expected), "until the crop is extended, the rest is there"


@pytest.mark.parametrize(("length", "tokens"), [(0, 0), (11, 11), (99, 11), (-99, 0)])
def test_crops_to_the_borders(length, tokens):
    kv, expected = growing()
    assert torch.equal(kv[:, :, :length].dense(), expected[:, :, :tokens])


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
def test_an_extended_crop_gives_up_what_was_behind_it(crop):
    """At sparsity 0, as what was pruned stays pruned."""
    dense = randn(2, 3, 11, 16)
    kv = CompressedKV.from_dense(dense, 0.0, WINDOW)
    shorter = crop(kv)
    longer, row = step(shorter, seed=1)
    expected = torch.cat([dense[:, :, :8], row], 2)
    assert torch.equal(longer.dense(), expected)
    for _ in range(2):  # the old handle does not come to life when the new one gets as long as it
        with pytest.raises(StaleCacheError, match=r"of 11 tokens was cropped to 8 and continued: .* copy\.deepcopy it"):
            kv.dense()
        with pytest.raises(StaleCacheError, match="was cropped to 8"):
            kv.prepare(1)
        for seed in (2, 3):
            longer, row = step(longer, seed)
            expected = torch.cat([expected, row], 2)
    assert torch.equal(longer.dense(), expected)
    with pytest.raises(StaleCacheError, match="already extended"):
        shorter.prepare(1)


def test_handles_that_a_crop_left_whole_still_read():
    dense = randn(2, 3, 11, 16)
    kv = CompressedKV.from_dense(dense, 0.0, WINDOW)
    short, shorter = kv[:, :, :9], kv[:, :, :7]
    step(short, seed=1)
    assert torch.equal(shorter.dense(), dense[:, :, :7])
    again, row = step(shorter, seed=2)
    assert torch.equal(again.dense(), torch.cat([dense[:, :, :7], row], 2))
    with pytest.raises(StaleCacheError, match="cropped to 7"):
        short.dense()


def test_a_copy_of_a_shorter_handle_goes_on_by_itself():
    dense = randn(2, 3, 11, 16)
    kv = CompressedKV.from_dense(dense, 0.0, WINDOW)
    fork = copy.deepcopy(kv[:, :, :8])
    fork, row = step(fork, seed=1)
    assert torch.equal(fork.dense(), torch.cat([dense[:, :, :8], row], 2))
    assert torch.equal(kv.dense(), dense)


def test_a_crop_cannot_be_zeroed():
    kv, expected = growing()
    with pytest.raises(CompressedWriteError):
        kv[:, :, :5].zero_()
    assert torch.equal(kv.dense(), expected)


@pytest.mark.filterwarnings("ignore:mustafar")
def test_a_crop_of_a_static_cache_is_a_read_only_view():
    kv, expected = static()
    assert torch.equal(kv[:, :, :5] + 0, expected[:, :, :5])
    with pytest.raises(CompressedWriteError):
        kv[:, :, :5].zero_()


# ------------------------------------------------------------------------------------------------------ copies on disk


def saved_and_loaded(x, weights_only):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    with torch.serialization.safe_globals(safe_globals()):
        return torch.load(file, weights_only=weights_only)


@pytest.mark.usefixtures("_nothing_decompresses")
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("make", [growing, static])
def test_a_saved_cache_is_compressed_and_goes_on(make, weights_only):
    kv, expected = make()
    loaded = saved_and_loaded(kv, weights_only)
    assert type(loaded) is CompressedKV
    assert (loaded.shape, loaded.grows, loaded.format) == (kv.shape, kv.grows, kv.format)
    assert torch.equal(loaded.dense(), expected)
    if loaded.grows:
        longer, row = step(loaded, seed=1)
        assert torch.equal(longer.dense(), pruned_cache(torch.cat([expected, row], 2), 0.5, WINDOW))


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
def test_a_saved_transformers_cache(kind, weights_only):
    import transformers

    from models import hf_model

    config = hf_model().config
    cache = transformers.StaticCache(config, max_cache_len=12) if kind == "StaticCache" else transformers.DynamicCache()
    cache.update(torch.zeros(2, 3, 3, 16), torch.zeros(2, 3, 3, 16), 0)
    (kv, expected), layer = growing() if kind == "DynamicCache" else static(), cache.layers[0]
    layer.keys, layer.values = kv, kv[[1, 0]]
    loaded = saved_and_loaded(cache, weights_only).layers[0]
    assert torch.equal(loaded.keys.dense(), expected)
    assert torch.equal(loaded.values.dense(), expected[[1, 0]])


def test_loading_without_permission_names_what_is_missing():
    file = io.BytesIO()
    torch.save(growing()[0], file)
    file.seek(0)
    with pytest.raises(Exception, match="restored"):
        torch.load(file)


def test_a_shallow_copy_is_the_same_handle():
    kv, _ = growing()
    other = copy.copy(kv)
    assert other.buffers[0] is kv.buffers[0]
    step(kv, seed=1)
    with pytest.raises(StaleCacheError):
        other.prepare(1)


def test_a_saved_view_holds_the_right_values(new_notices):
    kv, expected = static()
    with pytest.warns(UserWarning, match="mustafar"):
        view = kv[1]
    assert torch.equal(saved_and_loaded(view, True), expected[1])
    assert torch.equal(copy.deepcopy(view) + 0, expected[1])


# ------------------------------------------------------------------------------------------------------ memory, or none

MEMORY = {
    "data_ptr": lambda x: x.data_ptr(),
    "share_memory_": lambda x: x.share_memory_(),
    "__dlpack__": torch.from_dlpack,
    "numpy": np.asarray,
    "tolist": lambda x: x.tolist(),
    "untyped_storage": lambda x: x.untyped_storage(),
    "storage": lambda x: x.storage(),
}


@pytest.mark.filterwarnings("ignore:mustafar", "ignore:TypedStorage")
@pytest.mark.parametrize("ask", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("make", [lambda: static()[0], lambda: static()[0][1]], ids=["cache", "view"])
def test_memory_that_is_not_there_is_refused(make, ask):
    with pytest.raises(NoMemoryError, match=r"compressed KV cache for its memory.* accepted are torch ops"):
        ask(make())


POINTERS = {
    "to_dlpack": torch.utils.dlpack.to_dlpack,
    "numpy": lambda x: x.numpy(),
    "tolist": lambda x: x.tolist(),
}


@pytest.mark.filterwarnings("ignore:mustafar")
@pytest.mark.parametrize("ask", POINTERS.values(), ids=POINTERS)
@pytest.mark.parametrize("make", [lambda: static()[0], lambda: static()[0][1]], ids=["cache", "view"])
def test_torch_refuses_the_rest(make, ask):
    with pytest.raises(RuntimeError):
        ask(make())


def test_data_is_the_same_cache_and_cannot_be_set():
    kv, expected = growing()
    assert type(kv.data) is CompressedKV
    assert torch.equal(kv.data.dense(), expected)
    with pytest.raises(CompressedWriteError, match="cannot be set"):
        kv.data = torch.zeros(2, 3, 11, 16)
    assert torch.equal(kv.dense(), expected)


@pytest.mark.filterwarnings("ignore:mustafar")
def test_disguised_as_a_plain_tensor_it_reads_right():
    kv, expected = growing()
    assert torch.equal(kv.as_subclass(torch.Tensor) + 0, expected)
    assert torch.equal(torch.nn.Parameter(kv, requires_grad=False) + 0, expected)
