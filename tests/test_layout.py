"""Sizes: elements kept of a row, bytes of the buffers, growth of a cache."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mustafar_compile.lowering import ops
from mustafar_compile.lowering.format import (
    BLOCK_TOKENS,
    BUFFERS,
    CACHE_DTYPES,
    MAX_QUERY_TOKENS,
    Layout,
    blocks_for,
    grown_capacity,
    kept_elements,
)
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
    assert Layout.of(128, 0.5, 32) is Layout.interned(128, 64, 32)
    assert Layout.of(128, 0.7, 32) is not Layout.of(128, 0.5, 32)
    assert Layout.of(128, 0.5, 32) != Layout.of(128, 0.5, 31)


@pytest.mark.parametrize(("capacity", "blocks"), [(0, 1), (1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (500, 16)])
def test_blocks_of_known_cases(capacity, blocks):
    assert BLOCK_TOKENS == 32
    assert blocks_for(capacity) == blocks


@pytest.mark.parametrize(("head_dim", "words"), [(8, 1), (32, 1), (40, 2), (64, 2), (80, 3), (128, 4), (576, 18)])
def test_buffers_of_known_cases(head_dim, words):
    layout = Layout.of(head_dim, 0.5, 5)
    kept = layout.kept
    assert dict(zip(BUFFERS, layout.buffers(2, 3, 70, torch.bfloat16), strict=True)) == {
        "values": ((2, 3, 3, kept // 8, 32, 8), torch.bfloat16),
        "bitmap": ((2, 3, 3, 32, words), torch.int32),
        "window": ((2, 3, 5 + MAX_QUERY_TOKENS, head_dim), torch.bfloat16),
        "counts": ((3,), torch.int64),
    }


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 90), head_dims, sparsities, st.integers(1, 40),
    st.sampled_from(CACHE_DTYPES),
)  # fmt: skip
def test_stored_bytes_are_those_of_the_buffers(batch, heads, capacity, head_dim, sparsity, window, dtype):
    layout = Layout.of(head_dim, sparsity, window)
    dense = torch.zeros(batch, heads, 3, head_dim, dtype=dtype)
    buffers = ops.compress(dense, torch.tensor([0]), layout.kept, window, capacity)
    assert [(tuple(b.shape), b.dtype) for b in buffers] == layout.buffers(batch, heads, capacity, dtype)
    real = sum(buffer.untyped_storage().nbytes() for buffer in buffers)
    assert layout.stored_bytes(batch, heads, capacity, dtype.itemsize) == real
    assert 32 * layout.token_bytes(dtype.itemsize) == sum(b[0, 0, 0].numel() * b.element_size() for b in buffers[:2])
    assert Layout.of_buffers(*buffers) is layout


def test_stored_bytes_take_symbols():
    layout = Layout.of(128, 0.7, 32)
    batch, capacity = sympy.symbols("batch capacity", integer=True, positive=True)
    expression = layout.stored_bytes(batch, 8, capacity, 2)
    for tokens in (1, 31, 32, 33, 4096, 4097):
        assert int(expression.subs({batch: 3, capacity: tokens})) == layout.stored_bytes(3, 8, tokens, 2)
    assert layout.token_bytes(2) == 96, "37.5% of 256 bytes"


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
