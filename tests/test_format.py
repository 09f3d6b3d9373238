"""Sizes: elements kept of a row, bytes of the buffers, growth of a cache."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mustafar_compile.lowering import ops
from mustafar_compile.lowering.buffers import CACHE_DTYPES, blocks_for
from mustafar_compile.lowering.format import BLOCK_TOKENS, MAX_QUERY_TOKENS, Format, grown_capacity, kept_elements
from mustafar_compile.lowering.layout import FormatError
from reference import kept_count

head_dims = st.integers(1, 64).map(lambda eights: 8 * eights)
sparsities = st.floats(0, 1, exclude_max=True) | st.integers(0, 999).map(lambda n: n / 1000)


@pytest.mark.parametrize(
    ("head_dim", "sparsity", "kept"),
    [
        (128, 0.5, 64),
        (128, 0.7, 40),
        (80, 0.7, 24),  # 32 if 0.3 were taken at its binary value, which is above 0.3
        (128, 0, 128),
        (8, 0, 8),
        (8, 0.99, 8),
        (128, 0.99, 8),
        (128, 1 - 2**-53, 8),
        (128, 1e-30, 128),
        (64, 0.5, 32),
        (96, 0.5, 48),
        (96, 0.6, 40),
    ],
)
def test_kept_elements_of_known_cases(head_dim, sparsity, kept):
    assert kept_elements(head_dim, sparsity) == kept


@given(head_dims, sparsities)
@example(80, 0.7)
def test_kept_elements_equal_the_decimal_formula(head_dim, sparsity):
    kept = kept_elements(head_dim, sparsity)
    assert kept == kept_count(head_dim, sparsity)
    assert kept % 8 == 0
    assert 8 <= kept <= head_dim


def test_equal_layouts_are_one_object():
    assert Format.of(128, 0.5, 32) is Format.interned(128, 64, 32)
    assert Format.of(128, 0.7, 32) is not Format.of(128, 0.5, 32)
    assert Format.of(128, 0.5, 32) != Format.of(128, 0.5, 31)


@pytest.mark.parametrize(("capacity", "blocks"), [(0, 1), (1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (500, 16)])
def test_blocks_of_known_cases(capacity, blocks):
    assert BLOCK_TOKENS == 32
    assert blocks_for(capacity) == blocks


@pytest.mark.parametrize(("head_dim", "words"), [(8, 1), (32, 1), (40, 2), (64, 2), (80, 3), (128, 4), (576, 18)])
def test_buffers_of_known_cases(head_dim, words):
    format = Format.of(head_dim, 0.5, 5)
    kept, names = format.kept, [buffer.name for buffer in format.buffers]
    assert dict(zip(names, format.shapes(2, 3, 70, torch.bfloat16), strict=True)) == {
        "values": ((2, 3, 3, kept // 8, 32, 8), torch.bfloat16),
        "bitmap": ((2, 3, 3, 32, words), torch.int32),
        "window": ((2, 3, 5 + MAX_QUERY_TOKENS, head_dim), torch.bfloat16),
        "counts": ((2, 3), torch.int64),
    }


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 90), head_dims, sparsities, st.integers(1, 40),
    st.sampled_from(CACHE_DTYPES),
)  # fmt: skip
def test_stored_bytes_are_those_of_the_buffers(batch, heads, capacity, head_dim, sparsity, window, dtype):
    format = Format.of(head_dim, sparsity, window)
    dense = torch.zeros(batch, heads, 3, head_dim, dtype=dtype)
    buffers = ops.compress(dense, torch.tensor([0]), format.encode(), capacity)
    assert [(tuple(b.shape), b.dtype) for b in buffers] == format.shapes(batch, heads, capacity, dtype)
    real = sum(buffer.untyped_storage().nbytes() for buffer in buffers)
    assert format.stored_bytes(batch, heads, capacity, dtype.itemsize) == real
    assert 32 * format.token_bytes(dtype.itemsize) == sum(b[0, 0, 0].numel() * b.element_size() for b in buffers[:2])
    format.check(buffers)


def test_stored_bytes_take_symbols():
    format = Format.of(128, 0.7, 32)
    batch, capacity = sympy.symbols("batch capacity", integer=True, positive=True)
    expression = format.stored_bytes(batch, 8, capacity, 2)
    for tokens in (1, 31, 32, 33, 4096, 4097):
        assert int(expression.subs({batch: 3, capacity: tokens})) == format.stored_bytes(3, 8, tokens, 2)
    assert format.token_bytes(2) == 96, "37.5% of 256 bytes"


@given(st.integers(0, 10**7))
@example(0)
@example(63)
@example(64)
def test_grown_capacity_has_room_and_little_slack(tokens):
    capacity = grown_capacity(tokens)
    assert capacity > tokens, "a full cache takes the next token"
    assert capacity - tokens <= tokens / 8 + 64
    assert capacity % 64 == 0
    assert grown_capacity(tokens + 1) >= capacity


def test_growing_token_by_token_copies_each_token_about_eight_times():
    copied, capacity, tokens = 0, 0, 100_000
    for n in range(tokens):
        if n > capacity:
            copied += capacity
            capacity = grown_capacity(n)
    assert copied < 9 * tokens


def test_grown_capacity_takes_symbols():
    tokens = sympy.Symbol("tokens", integer=True, nonnegative=True)
    expression = grown_capacity(tokens)
    assert [int(expression.subs(tokens, n)) for n in (0, 63, 64, 1000, 4097)] == [
        grown_capacity(n) for n in (0, 63, 64, 1000, 4097)
    ]


@given(head_dims, sparsities, st.integers(1, 40))
def test_a_format_is_its_text(head_dim, sparsity, window):
    format = Format.of(head_dim, sparsity, window)
    assert Format.decode(format.encode()) is format


def test_the_text_of_a_format_stays_what_it_is():
    """Saved caches hold it."""
    assert Format.of(128, 0.7, 32).encode() == "head_dim=128,kept=40,window=32"


@pytest.mark.parametrize(
    "text", ["", "head_dim=128", "head_dim=128,kept=x,window=32", "head_dim=12,kept=8,window=1", "a=1", "kept", None]
)
def test_texts_that_are_no_format(text):
    with pytest.raises((FormatError, TypeError, AttributeError)):
        Format.decode(text)


@pytest.mark.parametrize(
    "values", [(12, 8, 1), (16, 12, 1), (16, 24, 1), (16, 0, 1), (16, 8, 0), (0, 8, 1), (16, 8, 1, "int3")]
)
def test_formats_that_cannot_be(values):
    with pytest.raises(FormatError, match="accepted are"):
        Format(*values)


def test_a_format_of_as_many_chunks_as_a_block_has_tokens():
    """256 kept channels: two dimensions of 32 that must not be mixed up."""
    format = Format.of(256, 0.0, 2)
    dense = torch.randn(1, 1, 40, 256)
    buffers = ops.compress(dense, torch.tensor([40]), format.encode(), 40)
    assert torch.equal(ops.decompress(buffers, format.encode(), 40), dense)


CHANGES = {
    "one is missing": lambda b: b[:3],
    "bitmap of another length": lambda b: [b[0], b[1][:, :, :1], *b[2:]],
    "bitmap of floats": lambda b: [b[0], b[1].float(), *b[2:]],
    "values of other rows": lambda b: [b[0][:, :, :, :1], *b[1:]],
    "ring too short": lambda b: [*b[:2], b[2][:, :, :4], b[3]],
    "ring of another dtype": lambda b: [*b[:2], b[2].half(), b[3]],
    "ring of another dtype than any": lambda b: [b[0].long(), b[1], b[2].long(), b[3]],
    "ring of fewer heads": lambda b: [*b[:2], b[2][:, :1], b[3]],
    "counts of one row": lambda b: [*b[:3], b[3][:1]],
    "counts of too few numbers": lambda b: [*b[:3], b[3][:, :1]],
    "no tensor": lambda b: [*b[:3], [[1, 0, 0]]],
    "another device": lambda b: [*b[:3], b[3].to("meta")],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_buffers_that_are_not_those_of_a_format(change):
    format = Format.of(64, 0.5, 8)
    buffers = ops.compress(torch.randn(2, 2, 100, 64), torch.tensor([100]), format.encode(), 100)
    format.check(buffers)
    with pytest.raises(FormatError):
        format.check(change(buffers))


def test_strategies_of_formats():
    aware = Format.of(128, 0.5, 32, strategy="output-aware")
    assert aware.encode() == "head_dim=128,kept=64,window=32,strategy=output-aware"
    assert Format.decode(aware.encode()) is aware
    assert aware.plain is Format.of(128, 0.5, 32)
    assert aware.ordered("rows").strategy == "output-aware"
    assert Format.of(128, 0, 32, strategy="think") is Format.of(128, 0, 32), "nothing is chosen"
    names = [buffer.name for buffer in aware.buffers]
    assert names == ["values", "bitmap", "window", "queries", "counts"]
    ring = 2 * 48 * 128 * 2
    assert aware.stored_bytes(1, 2, 64, 2) == aware.plain.stored_bytes(1, 2, 64, 2) + ring
    assert aware.token_bytes(2) == aware.plain.token_bytes(2)
    cache = list(range(5))
    assert aware.joined(aware.plain_of(cache), aware.state_of(cache)) == cache
    with pytest.raises(FormatError, match="'largest' is unknown; accepted are magnitude, output-aware, think"):
        Format.decode("head_dim=128,kept=64,window=32,strategy=largest")
    with pytest.raises(FormatError, match="accepted is the strategy magnitude where all elements are kept"):
        Format(128, 128, 32, strategy="think")
