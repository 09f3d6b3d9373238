"""``CompressedKV`` as a tensor: what it shows, what reads right, what may be written, and when it is stale."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch

from mustafar_compile import (
    CompressedKV,
    CompressedWriteError,
    ForeignCompilerError,
    MustafarError,
    StaleCacheError,
    backend,
    cache_stats,
)
from mustafar_compile.lowering import ops
from mustafar_compile.lowering.format import MAX_QUERY_TOKENS, Format, grown_capacity
from reference import pruned_cache

pytestmark = pytest.mark.usefixtures("new_notices")
WINDOW = 4


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def growing(tokens=11, dtype=torch.float32, seed=0):
    """A growing cache and what it stands for."""
    dense = randn(2, 3, tokens, 16, seed=seed, dtype=dtype)
    return CompressedKV.from_dense(dense, 0.5, WINDOW), pruned_cache(dense, 0.5, WINDOW)


def static(written=7, slots=12):
    """A static cache, of which a part is written, and what it stands for."""
    dense = randn(2, 3, slots, 16)
    expected = torch.zeros_like(dense)
    expected[:, :, :written] = pruned_cache(dense[:, :, :written], 0.5, WINDOW)
    return CompressedKV.from_dense(dense, 0.5, WINDOW, tokens=written), expected


def step(kv, seed):
    """What a compiled decode step does to a growing cache: write into the buffers, hand out a longer handle."""
    row = randn(*kv.shape[:2], 1, kv.shape[3], seed=seed, dtype=kv.dtype)
    kv.prepare(1)
    value = [buffer.clone() for buffer in kv.buffers]
    text = kv.format.encode()
    ops.decode_attention(row, row, row, kv.buffers, value, text, text, None, None, None, 1.0)
    return kv.extended(1), row


# --------------------------------------------------------------------------------------------- what it shows and holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_looks_like_the_dense_tensor(dtype):
    kv, expected = growing(dtype=dtype)
    dense = randn(2, 3, 11, 16)
    assert (kv.shape, kv.dtype, kv.device) == (expected.shape, dtype, expected.device)
    assert (kv.stride(), kv.dim(), kv.numel(), len(kv)) == (dense.stride(), 4, dense.numel(), 2)
    assert kv.is_contiguous()
    assert not kv.requires_grad
    assert isinstance(kv, torch.Tensor)
    assert torch.equal(kv.dense(), expected)
    assert type(kv.dense()) is torch.Tensor


def test_its_repr_says_what_it_is_and_decompresses_nothing():
    kv, _ = growing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = repr(kv)
    assert text == "CompressedKV(shape=(2, 3, 11, 16), dtype=torch.float32, device=cpu, 8 of 16 kept)"
    assert text == str(kv)


def test_a_part_written_static_cache_reads_zero_behind():
    kv, expected = static()
    assert kv.shape == (2, 3, 12, 16)
    assert torch.equal(kv.dense(), expected)


@pytest.mark.parametrize("tokens", [1, WINDOW, WINDOW + 1, 63, 64, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_bytes_are_what_is_allocated(tokens, dtype):
    kv, _ = growing(tokens, dtype)
    capacity = grown_capacity(tokens)
    assert kv.stored_bytes == Format.of(16, 0.5, WINDOW).stored_bytes(2, 3, capacity, dtype.itemsize)
    assert kv.stored_bytes == sum(buffer.numel() * buffer.element_size() for buffer in kv.buffers)


@pytest.mark.parametrize(("slots", "capacity"), [(12, 32), (32, 32), (33, 64)])
def test_a_static_cache_allocates_a_slot_for_each_token_in_whole_blocks(slots, capacity):
    kv, _ = static(slots=slots)
    assert kv.capacity == capacity
    format = Format.of(16, 0.5, WINDOW, "rows")
    assert kv.stored_bytes == format.stored_bytes(2, 3, slots, 4) == format.stored_bytes(2, 3, capacity, 4)
    assert [(tuple(b.shape), b.dtype) for b in kv.buffers] == format.shapes(2, 3, slots, torch.float32)


# ---------------------------------------------------------------------------------------------------- copies and moves


@pytest.mark.parametrize("make", [growing, static])
@pytest.mark.parametrize("duplicate", [torch.clone, copy.deepcopy, lambda kv: kv.to("cpu", copy=True)])
def test_a_copy_is_compressed_and_independent(make, duplicate):
    kv, expected = make()
    other = duplicate(kv)
    assert type(other) is CompressedKV
    assert (other.shape, other.format, other.grows) == (kv.shape, kv.format, kv.grows)
    kv.zero_()
    assert torch.equal(other.dense(), expected)
    for mine, theirs in zip(kv.buffers, other.buffers, strict=True):
        assert mine.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("duplicate", [torch.clone, copy.deepcopy])
def test_copies_of_one_cache_continue_in_different_ways(duplicate):
    kv, past = growing()
    other = duplicate(kv)
    kv, first = step(kv, seed=1)
    other, second = step(other, seed=2)
    assert torch.equal(kv.dense(), pruned_cache(torch.cat([past, first], 2), 0.5, WINDOW))
    assert torch.equal(other.dense(), pruned_cache(torch.cat([past, second], 2), 0.5, WINDOW))


def test_moving_to_where_it_is_copies_nothing():
    kv, expected = growing()
    assert kv.to("cpu") is kv
    assert kv.to(torch.float32) is kv
    assert torch.equal(kv.detach().dense(), expected)
    assert kv.detach().buffers[0].data_ptr() == kv.buffers[0].data_ptr()


def test_another_dtype_is_dense():
    kv, expected = growing()
    with pytest.warns(UserWarning, match="_to_copy"):
        half = kv.half()
    assert type(half) is torch.Tensor
    assert torch.equal(half, expected.half())


def test_moving_to_another_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    kv, expected = growing()
    moved = kv.to("cuda")
    assert type(moved) is CompressedKV
    assert moved.device.type == "cuda"
    assert torch.equal(moved.dense().cpu(), expected)


# ------------------------------------------------------------------------------------------------------------- reading

READS = [
    ("aten.add.Tensor", lambda x: x + 1),
    ("aten.mul.Tensor", lambda x: 2 * x),
    ("aten.sum.default", lambda x: x.sum()),
    ("aten.index_select.default", lambda x: x.index_select(2, torch.tensor([10, 0]))),
    ("aten.cat.default", lambda x: torch.cat([torch.zeros(2, 3, 1, 16), x], dim=2)),
    ("aten.slice.Tensor", lambda x: x[:, :, 3:9]),
    ("aten.select.int", lambda x: x[1]),
    ("aten.transpose.int", lambda x: x.transpose(1, 2)),
    ("aten.split.Tensor", lambda x: x.split(5, dim=2)[1]),
    ("aten.view.default", lambda x: x.view(6, 11, 16)),
    ("aten.index.Tensor", lambda x: x[:, torch.tensor([1, 0, 0])]),
]


@pytest.mark.parametrize(("name", "read"), READS, ids=[name for name, _ in READS])
def test_any_op_reads_right_values_and_says_once_that_it_decompresses(name, read):
    kv, expected = growing()
    message = rf"mustafar: {re.escape(name)} runs on a compressed KV cache .* which decompresses it"
    with pytest.warns(UserWarning, match=message) as caught:
        result = read(kv)
    assert len(caught) == 1
    assert torch.equal(result + 0, read(expected))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read(kv) + 0, read(expected))


def test_each_op_is_named_in_a_warning_of_its_own():
    kv, _ = growing()
    with pytest.warns(UserWarning, match="mustafar") as caught:
        _ = kv + 1, kv + 2, kv.sum(), kv.sum()
    assert [str(w.message).split()[1] for w in caught] == ["aten.add.Tensor", "aten.sum.default"]


def test_it_may_be_copied_into_a_dense_tensor():
    kv, expected = growing()
    target = torch.empty_like(expected)
    with pytest.warns(UserWarning, match=r"aten\.copy_"):
        target.copy_(kv)
    assert torch.equal(target, expected)


# ------------------------------------------------------------------------------------------------------------- writing

REFUSED = {
    "add_": lambda x: x.add_(1),
    "mul_": lambda x: x.mul_(2),
    "fill_": lambda x: x.fill_(0),
    "copy_": lambda x: x.copy_(torch.zeros(x.shape)),
    "index_put_": lambda x: x.index_put_((torch.tensor([0]),), torch.zeros(())),
    "masked_fill_": lambda x: x.masked_fill_(torch.tensor(True), 0),
    "index_copy_ along another dimension": lambda x: x.index_copy_(0, torch.tensor([0]), torch.zeros(1, *x.shape[1:])),
}


@pytest.mark.parametrize("make", [growing, static])
@pytest.mark.parametrize("write", REFUSED.values(), ids=REFUSED)
def test_writes_that_are_refused_change_nothing(make, write):
    kv, expected = make()
    with pytest.raises(CompressedWriteError, match=r"cannot write into a compressed KV cache; accepted are zero_"):
        write(kv)
    assert torch.equal(kv.dense(), expected)


def test_a_growing_cache_takes_no_index_copy():
    kv, expected = growing()
    with pytest.raises(CompressedWriteError, match="on a static cache"):
        kv.index_copy_(2, torch.tensor([0]), torch.zeros(2, 3, 1, 16))
    assert torch.equal(kv.dense(), expected)


VIEW_WRITES = {
    "slice": lambda x: x[:, :, 2:4].zero_(),
    "item assignment": lambda x: x.__setitem__((slice(None), slice(None), 2), 0),
    "a view of a view": lambda x: x[0].transpose(0, 1)[3:].mul_(2),
    "view": lambda x: x.view(-1).fill_(1),
    "unbind": lambda x: x.unbind(2)[0].zero_(),
    "copy into a view": lambda x: x[..., :2].copy_(torch.zeros(())),
}


@pytest.mark.filterwarnings("ignore:mustafar")
@pytest.mark.parametrize("write", VIEW_WRITES.values(), ids=VIEW_WRITES)
def test_writes_through_views_are_refused(write):
    kv, expected = static()
    with pytest.raises(CompressedWriteError, match=r"would write through a view .* Write into a dense copy"):
        write(kv)
    assert torch.equal(kv.dense(), expected)


LOST = {
    "out=": lambda x: torch.add(torch.zeros(x.shape), 1, out=x),
    "foreach": lambda x: torch._foreach_add_([x], 1.0),
    "out= a view": lambda x: torch.add(torch.zeros(x[0].shape), 1, out=x[0]),
    "foreach of a view": lambda x: torch._foreach_add_([x[0]], 1.0),
}


@pytest.mark.filterwarnings("ignore:mustafar")
@pytest.mark.parametrize("write", LOST.values(), ids=LOST)
def test_no_write_is_lost_silently(write):
    kv, expected = static()
    with pytest.raises(CompressedWriteError):
        write(kv)
    assert torch.equal(kv.dense(), expected)


def test_zero_empties_a_static_cache():
    dense = randn(2, 3, 12, 16)
    dense[0, 0, 0, 0] = float("inf")
    kv = CompressedKV.from_dense(dense, 0.5, WINDOW, tokens=7)
    assert kv.counts.tolist() == [[7, 0, 1], [7, 0, 0]]
    pointers = [buffer.data_ptr() for buffer in kv.buffers]
    assert kv.zero_() is kv
    assert kv.counts.tolist() == 2 * [[0, 0, 0]]
    assert kv.dense().count_nonzero() == 0
    assert [buffer.data_ptr() for buffer in kv.buffers] == pointers, "compiled code holds on to the buffers"


def test_a_growing_cache_of_zeros_keeps_its_length():
    dense = randn(2, 3, 11, 16)
    dense[0, 0, 0, 0] = float("inf")
    kv = CompressedKV.from_dense(dense, 0.5, WINDOW)
    kv.zero_()
    assert kv.counts.tolist() == 2 * [[11, 0, 0]]
    kv, row = step(kv, seed=1)
    assert torch.equal(kv.dense(), torch.cat([torch.zeros(2, 3, 11, 16), row], dim=2))


@pytest.mark.parametrize("dim", [2, -2])
@pytest.mark.parametrize("positions", [[7], [7, 8, 9, 10, 11], [0, 1, 2]], ids=["next", "many", "from the start"])
def test_index_copy_into_a_static_cache(dim, positions):
    """As HF's static cache writes a chunk: what lies behind the chunk is not written any more."""
    kv, expected = static(written=7)
    pointers = [buffer.data_ptr() for buffer in kv.buffers]
    rows, where = randn(2, 3, len(positions), 16, seed=5), torch.tensor(positions)
    with pytest.warns(UserWarning, match=r"aten\.index_copy_"):
        assert kv.index_copy_(dim, where, rows) is kv
    written = positions[-1] + 1
    expected = pruned_cache(expected.index_copy(2, where, rows)[:, :, :written], 0.5, WINDOW)
    assert kv.counts.tolist() == 2 * [[written, max(written - WINDOW - MAX_QUERY_TOKENS, 0), 0]]
    assert torch.equal(kv.dense()[:, :, :written], expected)
    assert kv.dense()[:, :, written:].count_nonzero() == 0
    assert [buffer.data_ptr() for buffer in kv.buffers] == pointers


# ------------------------------------------------------------------------------------------------------------- growing


def test_a_handle_goes_stale_when_its_cache_is_extended():
    old, past = growing()
    new, row = step(old, seed=1)
    with pytest.raises(StaleCacheError, match=r"of 11 tokens was already extended to 12: .* copy\.deepcopy it first"):
        old.prepare(1)
    assert issubclass(StaleCacheError, MustafarError)
    whole = pruned_cache(torch.cat([past, row], 2), 0.5, WINDOW)
    assert torch.equal(new.dense(), whole)
    assert torch.equal(old.dense(), past), "it can still be read, as it was"


def test_aliases_share_their_branch():
    kv, _ = growing()
    alias = kv.detach()
    kv.extended(1)
    with pytest.raises(StaleCacheError):
        alias.prepare(1)


def test_growth_keeps_the_contents():
    kv, dense = growing(tokens=62)
    capacities = {kv.capacity}
    for n in range(150):
        kv, row = step(kv, seed=n)
        dense = torch.cat([dense, row], dim=2)
        capacities.add(kv.capacity)
        assert kv.shape[2] == 63 + n
        assert kv.capacity >= kv.shape[2] - WINDOW, "the token had no room"
    assert len(capacities) >= 2, "the case never grew"
    assert torch.equal(kv.dense(), pruned_cache(dense, 0.5, WINDOW))
    assert kv.stored_bytes == kv.format.stored_bytes(2, 3, kv.capacity, 4)
    assert kv.capacity <= grown_capacity(kv.shape[2]), "more slack than a new cache has"


def test_older_handles_read_what_was_packed_after_growth():
    kv, _ = growing(tokens=50)
    dense, handles, capacity = randn(2, 3, 50, 16), [kv], kv.capacity
    for n in range(60):
        kv, row = step(handles[-1], seed=n)
        dense = torch.cat([dense, row], dim=2)
        handles.append(kv)
    assert kv.capacity > capacity, "the case never grew"
    for old in handles[:30]:  # all of its rows have left the ring
        assert torch.equal(old.dense(), pruned_cache(dense[:, :, : old.shape[2]], 0.5, 0))


@pytest.mark.parametrize("made", [True, False])
def test_growth_in_and_out_of_inference_mode(made):
    with torch.inference_mode(made):
        kv, dense = growing(tokens=62)
    with torch.inference_mode(not made):
        kv.reserve(300)
        assert kv.capacity == 320
        assert torch.equal(kv.dense(), dense)


def test_a_cache_of_no_tokens():
    """As loops hand in before the first token."""
    empty = CompressedKV.from_dense(torch.zeros(2, 3, 0, 16), 0.5, WINDOW)
    assert empty.dense().shape == (2, 3, 0, 16)
    kv, row = step(empty, seed=1)
    assert torch.equal(kv.dense(), row)


# --------------------------------------------------------------------------------------------------------- cache_stats


def pair(tokens=11, dtype=torch.float32):
    return growing(tokens, dtype)[0], growing(tokens, dtype, seed=1)[0]


def test_stats_of_a_compressed_cache():
    key, value = pair(tokens=500)
    stats = cache_stats(((key, value),))
    assert (stats.tokens, stats.tensors, stats.compressed_tensors) == (500, 2, 2)
    assert stats.stored_bytes == key.stored_bytes + value.stored_bytes
    assert stats.dense_bytes == 2 * 2 * 3 * 500 * 16 * 4
    assert stats.ratio == stats.stored_bytes / stats.dense_bytes
    assert 0.56 < stats.ratio < 0.7, "36 of 64 bytes a row and some slack"


def test_stats_of_a_dense_cache():
    dense = torch.zeros(2, 3, 10, 16), torch.zeros(2, 3, 10, 16)
    stats = cache_stats(dense)
    assert (stats.tokens, stats.tensors, stats.compressed_tensors, stats.ratio) == (10, 2, 0, 1.0)


def test_stats_of_a_static_cache_count_written_tokens():
    kv, _ = static(written=7, slots=12)
    assert cache_stats([kv]).tokens == 7


@pytest.mark.parametrize(
    "wrap",
    [
        lambda k, v: (k, v),
        lambda k, v: [[k, v]],
        lambda k, v: {"layer": {"k": k, "v": v}},
        lambda k, v: ((k, v), (k, v)),  # the same tensors twice are there once
        lambda k, v: [None, "text", 3, (k, v), torch.zeros(5)],
    ],
    ids=["tuple", "nested list", "nested dict", "twice", "with other things"],
)
def test_stats_find_tensors_in_any_nesting(wrap):
    key, value = pair()
    stats = cache_stats(wrap(key, value))
    assert (stats.tensors, stats.compressed_tensors, stats.tokens) == (2, 2, 11)
    assert stats.stored_bytes == key.stored_bytes + value.stored_bytes


def test_stats_of_transformers_caches():
    from transformers import DynamicCache, EncoderDecoderCache

    key, value = pair()
    filled = DynamicCache()
    filled.update(torch.zeros(2, 3, 11, 16), torch.zeros(2, 3, 11, 16), 0)
    assert cache_stats(filled).compressed_tensors == 0
    filled.layers[0].keys, filled.layers[0].values = key, value
    for found in (cache_stats(filled), cache_stats(EncoderDecoderCache(filled, DynamicCache()))):
        assert (found.tokens, found.tensors, found.compressed_tensors) == (11, 2, 2)


def test_stats_of_a_module():
    module = torch.nn.Module()
    module.register_buffer("k", torch.zeros(1, 2, 6, 8))
    module.inner = torch.nn.Linear(3, 3)
    module.inner.cache, _ = growing()
    stats = cache_stats(module)
    assert (stats.tokens, stats.tensors, stats.compressed_tensors) == (11, 2, 1)


def test_stats_of_two_views_count_their_storage_once():
    """K and V as the halves of one tensor."""
    both = torch.zeros(2, 1, 2, 10, 16)
    stats = cache_stats(tuple(both.unbind(0)))
    assert (stats.dense_bytes, stats.stored_bytes) == (both.nbytes, both.nbytes)


def test_stats_of_a_view_are_not_those_of_all_that_is_allocated():
    stats = cache_stats(torch.zeros(4, 3, 100, 16)[:2, :, :10])
    assert (stats.tokens, stats.stored_bytes, stats.dense_bytes) == (10, 2 * 3 * 10 * 16 * 4, 2 * 3 * 10 * 16 * 4)


def test_stats_of_a_dense_cache_with_the_tokens_first():
    assert cache_stats(torch.zeros(2, 100, 3, 16), tokens_dim=1).tokens == 100
    with pytest.raises(ValueError, match=r"tokens_dim=0 is not accepted; it must be 2 \(\[B, H, S, D\]\) or 1"):
        cache_stats(torch.zeros(2, 100, 3, 16), tokens_dim=0)


def test_stats_of_a_mixed_cache():
    key, _ = growing()
    dense = torch.zeros(2, 3, 20, 16)
    stats = cache_stats((key, dense))
    assert (stats.tokens, stats.tensors, stats.compressed_tensors) == (20, 2, 1)
    assert stats.stored_bytes == key.stored_bytes + dense.nbytes


def test_stats_do_not_decompress():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache_stats(pair())


@pytest.mark.parametrize("junk", [None, 3, "cache", (), [], {}, torch.zeros(3, 3), [torch.zeros(1, 2, 3, 4).long()]])
def test_stats_of_anything_else_are_refused(junk):
    name = type(junk).__name__
    with pytest.raises(TypeError, match=f"no cache tensors found in a {name}; accepted are a transformers Cache"):
        cache_stats(junk)


def test_stats_print_in_one_line():
    key, value = pair(tokens=1000, dtype=torch.bfloat16)
    stats = cache_stats((key, value))
    kib = stats.stored_bytes / 1024
    assert str(stats) == (
        f"1000 tokens, {kib:.1f} KiB stored, 375.0 KiB dense (ratio {stats.ratio:.3f}), 2 of 2 tensors compressed"
    )


# ------------------------------------------------------------------------------------------------------ in the compiler


@pytest.mark.parametrize("make", [growing, static])
def test_another_backend_is_refused(make):
    kv, _ = make()
    torch._dynamo.reset()
    with (
        torch.no_grad(),
        pytest.raises(Exception, match=r'accepted is torch.compile\(..., backend="mustafar"\)') as caught,
    ):
        torch.compile(lambda cache: cache * 2, backend="aot_eager")(kv)
    assert ForeignCompilerError.__name__ in str(caught.value)


@pytest.mark.parametrize("make", [growing, static])
def test_a_graph_that_cannot_be_traced_runs_op_by_op(make, monkeypatch):
    def fail(*_):
        raise RuntimeError("no way")

    monkeypatch.setattr(backend, "normalise", fail)
    kv, expected = make()
    torch._dynamo.reset()
    with torch.no_grad(), pytest.warns(UserWarning, match="decompresses it"):
        result = torch.compile(lambda cache: cache * 2, backend="mustafar")(kv)
    assert torch.equal(result, expected * 2)


@pytest.mark.parametrize("make", [growing, static])
def test_dynamo_guards_one_buffer(make):
    """Guards run at each call: with four buffers they took longer than all the rest."""
    kv, _ = make()
    names, context = kv.__tensor_flatten__()
    assert names == ["extent"]
    assert copy.deepcopy(context)[0] is kv.format
